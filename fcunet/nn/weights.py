"""Weights on disk: one folder with ``config.json``, ``model.safetensors`` and a model card ``README.md``.

``config.json`` holds the architecture, the thresholds and calibration tuned with it, and the SHA-256 of the
tensor file, which is checked on every load. Weights are told apart by a SHA-256 over both, because the same
tensors with another calibration give other peaks. Nothing is ever downloaded.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from .disks import least_dilation
from .model import FCUNetConfig, Network
from .published import build_network

FORMAT = "fcunet-weights"
FORMAT_VERSION = 1
CONFIG_NAME, TENSORS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"
PACKAGED = Path(__file__).parent / "weights"

_models: dict[tuple[str, str, str, str], Network] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class WeightsInfo:
    """What was loaded: for provenance, and the decision thresholds that belong to it."""

    name: str
    sha256: str
    config: FCUNetConfig

    @property
    def threshold(self) -> float:
        """Smallest height of the Bragg map that is a peak."""
        return self.config.threshold


def packaged_weights() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(p.parent.name for p in PACKAGED.glob(f"*/{CONFIG_NAME}"))


def resolve_weights(name: str | os.PathLike[str] = "default") -> tuple[Path, str]:
    """Folder and SHA-256 of packaged weights or of a weights folder; reads only ``config.json``.

    The SHA-256 is that of tensors, architecture and calibration together.

    Raises
    ------
    FileNotFoundError
        If `name` is neither packaged nor a folder with weights.
    ValueError
        If its ``config.json`` cannot be understood.
    """
    folder = PACKAGED / str(name)
    if not (os.sep not in str(name) and (folder / CONFIG_NAME).is_file()):
        folder = Path(name).expanduser()
    missing = [f for f in (CONFIG_NAME, TENSORS_NAME) if not (folder / f).is_file()]
    if missing:
        why = f"it lacks {' and '.join(missing)}" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"no weights {str(name)!r}: {why}; packaged are {', '.join(packaged_weights()) or 'none'}; "
            "or give the path of a folder written by 'fcunet train'"
        )
    return folder, _identity(_read_config(folder))


def training_facts(weights: str | os.PathLike[str]) -> dict[str, Any]:
    """What the weights say of their training: data, time, figures."""
    folder, _ = resolve_weights(weights)
    return dict(_read_config(folder).get("training", {}))


def network_config(weights: str | os.PathLike[str]) -> FCUNetConfig:
    """Architecture and thresholds of packaged weights or of a weights folder."""
    folder, _ = resolve_weights(weights)
    return FCUNetConfig.from_dict(_read_config(folder)["model"])


def least_shared_dilation(weights: str | os.PathLike[str]) -> float:
    """The smallest `shared_dilation_std` that a network states: that part is alike in all patterns."""
    config = network_config(weights)
    if not config.reader_width:
        return config.dilation_floor
    return least_dilation(config.dilation_scale, config.dilation_floor)


def load_model(
    weights: str | os.PathLike[str] = "default",
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
) -> Network:
    """A network ready for inference, loaded once per process, device and precision.

    Parameters
    ----------
    weights : str or path
        Name of packaged weights, or a folder.
    device : str
        "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one.
    precision : {"auto", "fp32", "bf16"}
        Arithmetic of the trunk. "auto" is bf16 on a GPU and on a CPU that computes in it (AVX512-BF16 or
        AMX: half the time), else fp32. Positions differ by 0.002 px, a few per cent of their error.

    Returns
    -------
    Network
        In eval mode, batch norms folded, gradients off; ``.info`` is its :class:`WeightsInfo`. Shared by all
        callers: do not train it.

    Raises
    ------
    FileNotFoundError
        If there are no such weights.
    ValueError
        If they are damaged (checksum), do not fit this version, or the device or precision is unknown or
        absent.
    """
    folder, sha256 = resolve_weights(weights)
    where = pick_device(device)
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}; choose auto, fp32 or bf16")
    if precision == "auto":
        precision = "bf16" if where.type == "cuda" or _cpu_has_bf16() else "fp32"
    values = _read_config(folder)
    key = (sha256, str(values.get("name", folder.name)), str(where), precision)
    with _lock:  # threads of a worker ask at the same time
        if key not in _models:
            model = _build(folder, values).to(where)
            model.precision = precision
            if precision == "bf16" and model.config.kind == "default":
                model.store_bf16()
            _models[key] = model
        return _models[key]


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bf16; torch emulates it on others, which is slower than fp32."""
    return any(
        bool(getattr(torch.cpu, name, bool)())  # names of torch that may go; then fp32
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def load_parts(model: Network, weights: str | os.PathLike[str]) -> list[str]:
    """Take over the tensors of `weights` that `model` has in the same shape; returns the names of the rest.

    To train on from other weights, or a new part of a network beside trained ones. Transformer layers of the
    second stage beyond those of `weights` begin as identities, so that the network says what it said before.

    Raises
    ------
    ValueError
        If nothing fits.
    """
    folder, _ = resolve_weights(weights)
    own, stored = model.state_dict(), load_file(folder / TENSORS_NAME)
    fitting = {k: v for k, v in stored.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        raise ValueError(
            f"no tensor of the weights {str(weights)!r} fits this network: are they of another kind?"
        )
    rest = sorted(set(own) - set(fitting))
    if any(k.startswith("reader.blocks.") for k in fitting):
        last = ("out.weight", "out.bias", "mlp.2.weight", "mlp.2.bias")
        added = [k for k in rest if k.startswith("reader.blocks.") and k.endswith(last)]
        fitting |= {k: torch.zeros_like(own[k]) for k in added}
    model.load_state_dict(own | fitting)
    return rest


def save_weights(
    folder: str | os.PathLike[str], model: Network, *, card: str, extra: Mapping[str, Any] | None = None
) -> str:
    """Write weights, configuration and model card; returns their SHA-256, see :func:`resolve_weights`.

    Parameters
    ----------
    folder : path
        Created if needed; its name becomes the name of the weights.
    model : Network
        Not fused.
    card : str
        Markdown: what it was trained on, for how long, what it reaches, what it cannot do.
    extra : mapping, optional
        Training facts and figures for ``config.json``, under "training".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    payload = save(state, metadata={"format": FORMAT})
    sha256 = hashlib.sha256(payload).hexdigest()
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": folder.name,
        "sha256": sha256,
        "model": model.config.to_dict(),
        "training": dict(extra or {}),
    }
    _write_atomically(folder / TENSORS_NAME, payload)
    _write_atomically(folder / CARD_NAME, card.encode())
    _write_atomically(folder / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())
    return _identity(config)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The torch device of that name; "auto" is the first GPU, or the CPU.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as err:
        raise ValueError(f"device is {str(device)!r}; choose auto, cpu, cuda or cuda:N") from err
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device is {str(device)!r}, but {count} GPUs are visible; choose auto or cpu")
    return where


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as err:
        raise ValueError(f"{path} is not valid JSON ({err}); copy the weights folder again") from err
    if (
        not isinstance(values, dict)
        or values.get("format") != FORMAT
        or "sha256" not in values
        or "model" not in values
    ):
        raise ValueError(f"{path} is not of fcunet; give a folder written by 'fcunet train'")
    if values.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {values['format_version']}, but this fcunet reads up to "
            f"{FORMAT_VERSION}; upgrade fcunet"
        )
    return values


def _identity(values: Mapping[str, Any]) -> str:
    """SHA-256 of the tensors and of what is done with them."""
    text = json.dumps([values["sha256"], values["model"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _build(folder: Path, values: Mapping[str, Any]) -> Network:
    path = folder / TENSORS_NAME
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != values["sha256"]:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {found[:12]}..., not {str(values['sha256'])[:12]}...; "
            "copy the weights folder again"
        )
    config = FCUNetConfig.from_dict(values["model"])
    model = build_network(config)
    try:
        model.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as err:
        raise ValueError(f"{path} does not fit the network that {CONFIG_NAME} describes: {err}") from err
    model = model.eval().requires_grad_(False).fuse().channels_last()
    name = str(values.get("name", folder.name))
    model.info = WeightsInfo(name=name, sha256=_identity(values), config=config)
    return model


def _write_atomically(path: Path, payload: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(payload)
    os.replace(partial, path)
