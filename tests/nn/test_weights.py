import dataclasses
import json
import threading

import pytest
import torch

from fcunet.nn import weights
from fcunet.nn.model import FCUNet, FCUNetConfig
from fcunet.nn.weights import load_model, resolve_weights, save_weights

SMALL = FCUNetConfig(widths=(8, 8, 8, 8), attention_layers=1, attention_heads=2, threshold=0.4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_models", {})
    torch.manual_seed(1)
    save_weights(tmp_path / "mine", FCUNet(SMALL), card="# mine\n", extra={"samples": 3})
    return tmp_path / "mine"


def test_load_model__gives_back_what_was_saved(folder):
    model = load_model(folder, device="cpu")
    assert model.config == SMALL
    assert (model.info.name, model.info.threshold) == ("mine", 0.4)
    assert not model.training
    path, sha256 = resolve_weights(folder)
    assert (path, sha256) == (folder, model.info.sha256)
    torch.manual_seed(1)
    original = FCUNet(SMALL).eval()
    x, probe = torch.rand(1, 32, 32), torch.ones(32, 32)
    expected = original(x, probe).bragg_map.detach()
    torch.testing.assert_close(
        load_model(folder, device="cpu")(x, probe).bragg_map, expected, rtol=1e-4, atol=1e-6
    )


def test_weights_with_another_calibration__are_other_weights(folder, tmp_path):
    torch.manual_seed(1)
    other = FCUNet(dataclasses.replace(SMALL, sigma_scale=1.1))
    said = save_weights(tmp_path / "other", other, card="# other\n")
    first, second = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "other"))
    assert first["sha256"] == second["sha256"]  # the same tensors
    assert resolve_weights(tmp_path / "other")[1] == load_model(tmp_path / "other").info.sha256 == said
    assert said != resolve_weights(folder)[1]
    torch.manual_seed(1)
    assert save_weights(tmp_path / "same", FCUNet(SMALL), card="") == resolve_weights(folder)[1]


def test_load_model__stores_weights_as_they_are_computed_with(folder):
    model = load_model(folder, device="cpu", precision="bf16")
    assert model.enc1[0].weight.dtype == torch.bfloat16
    assert model.position_head.weight.dtype == torch.float32
    rounded = load_model(folder, device="cpu", precision="fp32")
    rounded.precision = "bf16"  # rounds its weights in every call
    x, probe = torch.rand(1, 32, 32), torch.ones(32, 32)
    for a, b in zip(model(x, probe)[:4], rounded(x, probe)[:4], strict=True):
        assert torch.equal(a, b)


def test_load_model__loads_once_for_many_threads(folder):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(load_model(folder, device="cpu"))) for _ in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({id(m) for m in found}) == 1


def test_load_model__notices_damaged_tensors(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged.*SHA-256"):
        load_model(folder, device="cpu")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_load_model__refuses_a_key_of_the_future(folder):
    change(folder, model=SMALL.to_dict() | {"mixture": 4})
    with pytest.raises(ValueError, match="'mixture'.*newer"):
        load_model(folder, device="cpu")


def test_load_model__refuses_a_format_of_the_future(folder):
    change(folder, format_version=99)
    with pytest.raises(ValueError, match="upgrade fcunet"):
        load_model(folder, device="cpu")


def test_load_model__refuses_tensors_of_another_network(folder):
    change(folder, model=SMALL.to_dict() | {"n_radial": 7})
    with pytest.raises(ValueError, match="does not fit"):
        load_model(folder, device="cpu")


def test_resolve_weights__names_what_is_packaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder; packaged are .*default"):
        resolve_weights(tmp_path / "nothing")


def test_resolve_weights__names_the_missing_file(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        resolve_weights(folder)


def test_resolve_weights__refuses_json_of_something_else(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not of fcunet"):
        resolve_weights(folder)


@pytest.mark.parametrize(
    ("options", "match"), [({"device": "tpu0"}, "choose"), ({"precision": "fp8"}, "fp32")]
)
def test_load_model__refuses_unknown_device_and_precision(folder, options, match):
    with pytest.raises(ValueError, match=match):
        load_model(folder, **({"device": "cpu"} | options))


def test_load_model__refuses_an_absent_gpu(folder):
    with pytest.raises(ValueError, match="GPUs are visible"):
        load_model(folder, device=f"cuda:{torch.cuda.device_count()}")
