import csv
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fcunet.nn.weights import load_model, training_facts
from fcunet.training.loop import TrainConfig, learning_rate, recalibrate, train

TINY = {
    "network": {"widths": [8, 8, 8, 8], "attention_layers": 1, "attention_heads": 2},
    "size": 64,
    "validation_size": 64,
    "validation_patterns": 4,
    "validation_doses": (1e4, 1e6),
    "selection_doses": (1e4,),
    "batch": 2,
    "precision": "fp32",
    "device": "cpu",
    "warmup_steps": 2,
    "log_every": 1,
    "checkpoint_every_s": 0,
    "validate_every_s": 1e9,
}


@pytest.fixture
def make_source(toy_source):
    return lambda split, size, seed, dose: toy_source(size, seed, dose)


class Killed(Exception):
    pass


def stopping(make_source, after):
    """Sources that fail at one of the training batches, as a kill would."""

    def make(split, size, seed, dose):
        source = make_source(split, size, seed, dose)
        if split == "train":
            draw, count = source.batch, [0]

            def batch(n):
                count[0] += 1
                if count[0] > after:
                    raise Killed
                return draw(n)

            source.batch = batch
        return source

    return make


def test_train__resumed_after_a_kill_gives_the_same_bytes(tmp_path, make_source):
    whole = train(TrainConfig(out=tmp_path / "whole", steps=6, **TINY), make_source=make_source)
    config = TrainConfig(out=tmp_path / "parts", steps=6, **TINY)
    with pytest.raises(Killed):
        train(config, make_source=stopping(make_source, 4))
    parts = train(config, make_source=make_source)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    rows = [list(csv.reader((tmp_path / name / "log.csv").open())) for name in ("whole", "parts")]
    # all but the clock
    assert [[*r[:2], *r[3:]] for r in rows[0]] == [[*r[:2], *r[3:]] for r in rows[1]]
    assert [r[0] for r in rows[0][1:]] == ["1", "2", "3", "4", "5", "6"]


def test_train__writes_weights_that_load_with_card_and_figures(tmp_path, make_source):
    folder = train(TrainConfig(out=tmp_path, steps=2, **TINY), make_source=make_source)
    model = load_model(folder, device="cpu")
    assert model.config.widths == (8, 8, 8, 8)
    assert "| recall at 1 px |" in (folder / "README.md").read_text()
    with (tmp_path / "validation.csv").open() as file:
        assert {row["dose"] for row in csv.DictReader(file)} == {"10000", "1e+06"}


@pytest.mark.parametrize("kind", ["paper", "paired"])
def test_train__the_published_networks_train_too(tmp_path, make_source, kind):
    network = {"kind": kind, "filters": 4, "levels": 4}
    folder = train(TrainConfig(out=tmp_path, steps=2, **TINY | {"network": network}), make_source=make_source)
    assert load_model(folder, device="cpu").config.kind == kind


def test_train__learns(tmp_path, make_source):
    train(
        TrainConfig(out=tmp_path, steps=30, **TINY | {"batch": 4, "learning_rate": 1e-2}),
        make_source=make_source,
    )
    with (tmp_path / "log.csv").open() as file:
        loss = [float(row["loss"]) for row in csv.DictReader(file)]
    assert sum(loss[-5:]) < 0.7 * sum(loss[:5])


def test_train__refuses_the_folder_of_another_network(tmp_path, make_source):
    train(TrainConfig(out=tmp_path, steps=1, **TINY), make_source=make_source)
    other = TINY | {"network": {"widths": [16, 8, 8, 8], "attention_heads": 2}}
    with pytest.raises(ValueError, match="another network"):
        train(TrainConfig(out=tmp_path, steps=1, **other), make_source=make_source)


def test_learning_rate__warms_up_and_falls_to_a_hundredth():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(config, 50, 0.5) == pytest.approx(0.505)
    assert learning_rate(config, 100, 1.0) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("steps: 3\nbatchsize: 4\n", "unknown setting 'batchsize'; did you mean 'batch'"),
        ("steps: 3\nsize: 100\n", "'size'.*multiple of 16"),
        ("steps: 3\nnetwork: {width: 3}\n", "did you mean 'widths'"),
        ("steps: 3\nloss: {gamma: 3}\n", "gamma"),
        ("batch: 4\n", "how long to train"),
        ("- 1\n", "key: value"),
    ],
)
def test_train_config__explains_what_is_wrong(tmp_path, text, match):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        TrainConfig.load(path)


@pytest.mark.parametrize(
    ("name", "stage"),
    [("train", "maps"), ("train_disks", "disks"), ("train_gpu", "maps"), ("train_disks_gpu", "disks")],
)
def test_train_config__the_shipped_examples_load(name, stage):
    path = Path(__file__).parents[2] / f"workflows/configs/{name}.yaml"
    config = TrainConfig.load(path, budget_s=1.0, out=None)
    assert config.budget_s == 1.0
    assert config.stage == stage


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from conftest import ToySource
from fcunet.training.loop import TrainConfig, train
torch.set_num_threads(1)
config = TrainConfig(out={out!r}, **{options!r})
train(config, make_source=lambda split, size, seed, dose: ToySource(size, seed, dose))
"""


def write_script(folder, **options):
    path = folder / "script.py"
    options = {k: v for k, v in (TINY | options).items()}
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(folder / "out"), options=options))
    return path


@pytest.mark.slow
def test_train__survives_sigkill(tmp_path):
    script = write_script(tmp_path, steps=400)
    process = subprocess.Popen([sys.executable, script])
    checkpoint = tmp_path / "out/checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = torch.load(checkpoint, weights_only=True)["step"]
    subprocess.run([sys.executable, write_script(tmp_path, steps=before + 3)], check=True)
    assert torch.load(checkpoint, weights_only=True)["step"] == before + 3


@pytest.mark.slow
def test_train__two_processes_end_with_one_network(tmp_path):
    script = write_script(tmp_path, steps=4)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    saved = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    assert (saved["step"], saved["samples"], saved["world"]) == (4, 16, 2)
    assert all(
        bool(torch.isfinite(t).all()) for t in load_file(tmp_path / "out/weights/model.safetensors").values()
    )


def test_train__draws_patterns_ahead_in_other_processes(tmp_path, toy_source):
    config = TrainConfig(**TINY, out=tmp_path, steps=6, draw_processes=1, large_every=3, large_size=128)
    folder = train(config, make_source=partial(_make_toy, toy_source))
    assert (folder / "model.safetensors").is_file()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 7


def test_train__draws_several_batches_at_once(tmp_path, toy_source):
    config = TrainConfig(**TINY, out=tmp_path, steps=6, draw_together=2, large_every=3, large_size=128)
    folder = train(config, make_source=partial(_make_toy, toy_source))
    assert (folder / "model.safetensors").is_file()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 7


def test_settings__draw_in_one_way_only(tmp_path):
    with pytest.raises(ValueError, match=r"draw_processes: 1 and draw_together: 4 exclude each"):
        TrainConfig(**TINY, out=tmp_path, steps=1, draw_processes=1, draw_together=4)


def test_train__sees_before_it_begins_that_the_pool_lacks_a_split(tmp_path):
    config = TrainConfig(**TINY, out=tmp_path / "out", pool=tmp_path, steps=1)
    with pytest.raises(FileNotFoundError, match=r"no orientations of the 'train' split.*--scatter 4000"):
        train(config)
    (tmp_path / "train-0000-00000.npz").touch()
    with pytest.raises(FileNotFoundError, match="--scatter 128 --split validation"):
        train(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("drawing", [{}, {"draw_processes": 1}, {"draw_together": 2}])
def test_train__on_a_gpu_ends_with_calibrated_weights(tmp_path, drawing):
    options = TINY | {"device": "cuda", "precision": "bf16", "source": {"pool_size": 16, "start_size": 16}}
    folder = train(TrainConfig(**options, **drawing, out=tmp_path, steps=4))
    assert all(bool(torch.isfinite(t).all()) for t in load_file(folder / "model.safetensors").values())


def _make_toy(toy_source, split, size, seed, dose):
    return toy_source(size, seed, dose)


def test_recalibrate__keeps_the_tensors_and_the_facts_and_tunes_the_rest(tmp_path, toy_source):
    make = partial(_make_toy, toy_source)
    first = train(TrainConfig(**TINY, out=tmp_path / "a", steps=3), make_source=make)
    again = recalibrate(TrainConfig(**TINY, out=tmp_path / "b", steps=3), first, make_source=make)
    before, after = (load_file(f / "model.safetensors") for f in (first, again))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert training_facts(again)["samples"] == training_facts(first)["samples"] == 6
    assert not (tmp_path / "b" / "checkpoint.pt").exists()
