"""Where a store came from: what its root attributes say of input, code, settings and machine.

Everything is flat and JSON-safe, without absolute paths or user names.
"""

import hashlib
import itertools
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zarr

import fcunet

from . import schema
from .remote import Place, Remote, place

_PACKAGES = ("torch", "numpy", "xarray", "zarr", "dask")
_HEAD = 2**20


def provenance(**facts: Any) -> dict[str, Any]:
    """Root attributes for a new store: version, commit, time, packages, job, plus the given `facts`.

    Facts that are None or NaN are left out, for what is unknown stays missing. Usual
    ones: ``config_json``, ``config_sha256``, ``input_title``, ``input_fingerprint``, ``weights_name``,
    ``weights_sha256``, ``device``.
    """
    found: dict[str, Any] = {
        "fcunet_version": fcunet.__version__,
        "fcunet_commit": _commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }
    return to_json(found | facts)


def to_json(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """`attrs` with NumPy scalars and arrays as Python ones and paths as names; None and NaN are dropped."""
    plain = {str(key): _plain(value) for key, value in attrs.items()}
    return {
        key: value
        for key, value in plain.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


def fingerprint(path: str | Path) -> str:
    """Identity of a file or folder in milliseconds: ``size-sha256`` of its first and last MiB (16 digits).

    For a folder (a Zarr store): of its metadata files and of the names and sizes of all others. Two files of
    one size that differ only in the middle have the same fingerprint.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    digest, size = hashlib.sha256(), 0
    if path.is_dir():
        for folder, folders, files in os.walk(path):
            folders.sort()
            for name in sorted(files):
                file = Path(folder, name)
                size += file.stat().st_size
                digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
                if name == "zarr.json" or name.startswith(".z"):
                    digest.update(file.read_bytes())
    else:
        size = path.stat().st_size
        with path.open("rb") as stream:
            digest.update(stream.read(_HEAD))
            if size > _HEAD:
                stream.seek(max(_HEAD, size - _HEAD))
                digest.update(stream.read(_HEAD))
    return f"{size}-{digest.hexdigest()[:16]}"


def input_fingerprint(store: str | Place) -> str:
    """Identity of a datacube in milliseconds: of its metadata, vacuum probe and mask, not of its shards.

    So a damaged shard can be put back and the run continued; whether patterns are the same, it does not tell.
    A copy of the store at a URL has the same fingerprint.
    """
    store = place(store)
    digest = hashlib.sha256()
    for name in ("", "intensity", *sorted(set(schema.DATACUBE) - {"intensity"})):
        whole = name not in ("", "intensity")
        files = _files_at(store, name, whole) if isinstance(store, Remote) else _files_in(store / name, whole)
        for file, content in files:
            digest.update(f"{name}/{file}\n".encode() + content)
    return digest.hexdigest()[:16]


_METADATA = (".zarray", ".zattrs", ".zgroup", "zarr.json")


def _files_in(folder: Path, whole: bool) -> Iterator[tuple[str, bytes]]:
    """Name and content of the metadata files in a folder, or of all below it."""
    for file in sorted(folder.rglob("*") if whole else folder.glob("*")) if folder.is_dir() else ():
        if file.is_file() and (whole or file.name in _METADATA):
            yield file.name, file.read_bytes()


def _files_at(store: Remote, name: str, whole: bool) -> Iterator[tuple[str, bytes]]:
    """The same at a URL, where folders may not be listed: chunks are known from the metadata."""
    prefix = f"{name}/" if name else ""
    found = store.read_all(prefix + file for file in _METADATA)
    if whole and (f"{prefix}zarr.json" in found or f"{prefix}.zarray" in found):
        array = zarr.open_array(store.zarr_store(), path=name, mode="r")
        counts = (-(-n // c) for n, c in zip(array.shape, array.shards or array.chunks, strict=True))
        chunks = itertools.product(*map(range, counts))
        found |= store.read_all(prefix + array.metadata.encode_chunk_key(chunk) for chunk in chunks)
    for key in sorted(found, key=PurePosixPath):
        yield PurePosixPath(key).name, found[key]


def _plain(value: Any) -> Any:
    match value:
        case np.generic():
            return value.item()
        case np.ndarray():
            return value.tolist()
        case Path():
            return value.name
        case Mapping():
            return to_json(value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    """Commit of the working copy this package runs from; None where it is installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
