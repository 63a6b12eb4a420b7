"""``fcunet doctor``: is this machine ready for a run? Each check says what to do when it is red."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import __version__
from .checks import Check, guarded

_PACKAGES = ("numpy", "torch", "xarray", "zarr", "dask", "distributed", "dask-jobqueue")
_SCRATCH_GIB = 2


def examine() -> list[Check]:
    """Run every check; none of them raises, and none leaves anything behind."""
    return [guarded(name, check) for name, check in _CHECKS.items()]


def examine_scan(
    store: str | os.PathLike[str],
    cluster: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Check]:
    """What a run over a datacube would take here or on `cluster`, and whether it fits: a ten-second trial."""
    from .config import Config
    from .predict import predict

    def look() -> Check:
        where: dict[str, Any] = {} if cluster is None else {"cluster": cluster}
        config = Config.load(store=store, storage_options=dict(storage_options or {}), **where)
        predicted = predict(config)
        text = "; ".join(" ".join(line.split()) for line in predicted.lines())
        return Check("run", not predicted.problems, text, "; ".join(predicted.problems))

    return [guarded("run", look)]


def _packages() -> Check:
    found, missing = [], []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    text = f"fcunet {__version__}, Python {platform.python_version()}, " + ", ".join(found)
    if missing:
        return Check("versions", False, f"missing: {', '.join(missing)}", "install again: make install")
    return Check("versions", sys.version_info >= (3, 11), text, "Python 3.11 or newer is needed")


def _device() -> Check:
    import torch

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        note = f" (CUDA_VISIBLE_DEVICES is {hidden!r})" if hidden is not None else ""
        return Check("device", True, f"no CUDA device{note}: the CPU is used, {os.cpu_count()} cores")
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Check("device", True, ", ".join(f"{p.name} {p.total_memory / 2**30:.0f} GiB" for p in names))


def _scratch() -> Check:
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free / 2**30
    return Check(
        "scratch",
        free >= _SCRATCH_GIB,
        f"{folder}: {free:.1f} GiB free",
        f"at least {_SCRATCH_GIB} GiB are needed; point TMPDIR to a larger local disk",
    )


def _store() -> Check:
    import numpy as np
    import xarray as xr

    from .schema import DATACUBE_DIMS
    from .store import open_datacube, write_datacube

    patterns = np.arange(4 * 4 * 16 * 16, dtype=np.uint16).reshape(4, 4, 16, 16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.zarr"
        write_datacube(path, xr.Dataset({"intensity": (DATACUBE_DIMS, patterns)}))
        with open_datacube(path) as back:
            same = bool((back["intensity"].values == patterns).all())
    return Check(
        "store", same, "a shard written and read back", "the disk returns other bytes than were written"
    )


def _weights() -> Check:
    from .nn.weights import load_model

    model = load_model("default", device="cpu")
    count = sum(p.numel() for p in model.parameters())
    return Check("weights", True, f"default network, {count / 1e6:.2f} M parameters, checksum right")


def _workers() -> Check:
    from .cluster import connect

    with connect("local", workers=1, dashboard_address="127.0.0.1:0") as client:
        answer = client.submit(os.getpid, pure=False).result(timeout=60)
    return Check("workers", answer != os.getpid(), "a local worker started and answered", "see the log above")


def _readers() -> Check:
    found = []
    for package in ("rosettasciio", "h5py", "hdf5plugin"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            return Check(
                "readers", False, f"{package} is missing", "for vendor files: pip install 'fcunet[io]'"
            )
    return Check("readers", True, ", ".join(found))


_CHECKS: dict[str, Callable[[], Check]] = {
    "versions": _packages,
    "device": _device,
    "scratch": _scratch,
    "store": _store,
    "weights": _weights,
    "workers": _workers,
    "readers": _readers,
}
