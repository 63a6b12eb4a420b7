"""Zarr stores: open them with handles kept per process, add arrays, put a finished folder in its place."""

import hashlib
import os
import shutil
import threading
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, overload

import numpy as np
import zarr
from zarr.codecs import BloscCodec

from .provenance import to_json
from .remote import Place, Remote, place

ZARRS = "zarrs.ZarrsCodecPipeline"
_OPENING = threading.Lock()  # Zarr takes the pipeline from a setting of the whole process
# counts: bit planes above the largest count are zeros and cost nothing; floats: sorted by byte
COUNT_CODEC = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")
FLOAT_CODEC = BloscCodec(cname="zstd", clevel=5, shuffle="shuffle")


_ARRAY_METADATA = ("zarr.json", ".zarray")


@overload
def existing(path: Path) -> Path: ...
@overload
def existing(path: str | Place) -> Place: ...
def existing(path: str | Place) -> Place:
    """`path`, if it is a Zarr store; FileNotFoundError or ValueError with what to do if not."""
    path = place(path)
    if isinstance(path, Remote):
        if not path.exists():
            raise FileNotFoundError(
                f"there is no Zarr store at {path}: neither zarr.json nor .zgroup is there; check the name, "
                "and that the whole folder NAME.zarr was copied there"
            )
        return path
    if not path.exists():
        hint = ""
        if path.with_name(path.name + ".partial").exists():
            hint = f"; only {path.name}.partial is there: run the command that makes it again, it will go on"
        raise FileNotFoundError(f"there is no store {path}{hint}")
    if not any((path / name).exists() for name in ("zarr.json", ".zgroup")):
        raise ValueError(f"{path} is not a Zarr store; make one with: fcunet convert {path} OUTPUT.zarr")
    return path


def zarr_location(path: Place) -> Any:
    """What Zarr and xarray are told to open."""
    return path.zarr_store() if isinstance(path, Remote) else path


def root_attrs(path: Place) -> dict[str, Any]:
    return dict(zarr.open_group(zarr_location(path), mode="r", use_consolidated=False).attrs)


def has_array(path: str | Place, name: str) -> bool:
    path = place(path)
    if isinstance(path, Remote):
        return any(path.has(f"{name}/{meta}") for meta in _ARRAY_METADATA)
    return any((path / name / meta).exists() for meta in _ARRAY_METADATA)


def block_shape_of(array: zarr.Array) -> tuple[int, ...]:
    return array.shards or array.chunks


def stamp(path: Place, name: str) -> int:
    """Changes when the array is written anew: part of the key of cached handles."""
    for meta in _ARRAY_METADATA:
        if isinstance(path, Remote):
            if (text := path.read(f"{name}/{meta}")) is None:
                continue
            return int.from_bytes(hashlib.sha256(text).digest()[:8])
        try:
            stat = (path / name / meta).stat()
        except FileNotFoundError:
            continue
        return hash((stat.st_mtime_ns, stat.st_ino))
    raise FileNotFoundError(f"there is no array {name!r} in {path}")


def open_array(path: str | Place, name: str, mode: Any = "r") -> zarr.Array:
    """An array of a store, kept open for the life of the process."""
    path = place(path)
    if not isinstance(path, Remote):
        path = Path(os.path.abspath(path))
    return _open_array_cached(path, name, mode, stamp(path, name))


@lru_cache(maxsize=256)
def _open_array_cached(path: Place, name: str, mode: Any, _stamp: int) -> zarr.Array:
    with _OPENING, zarr.config.set({"codec_pipeline.path": codec_pipeline(path, name, mode)}):
        return zarr.open_array(zarr_location(path), path=name, mode=mode)


def codec_pipeline(path: Place, name: str, mode: str = "r") -> str:
    """What handles the chunks of an array: `zarrs` (Rust), if installed, to read patterns from a disk.

    It reads 1.3 to 1.45 times as fast (``python -m benchmarks.storage``). Writing stays with Zarr's own,
    which gives a shard its name when it is complete: after a kill there are whole shards only.
    """
    if name == "intensity" and mode == "r" and isinstance(path, Path):
        format_3 = (path / name / "zarr.json").exists()
        if format_3 and find_spec("zarrs") is not None:
            return ZARRS
    return str(zarr.config.get("codec_pipeline.path"))


def put_array(
    group: zarr.Group, name: str, values: np.ndarray, dims: tuple[str, ...], attrs: Mapping[Any, Any]
) -> None:
    """Write a small array in one chunk, replacing an earlier one of that name."""
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=values.shape,
        dtype=values.dtype,
        compressors=FLOAT_CODEC,
        fill_value=np.nan if values.dtype.kind == "f" else 0,
        dimension_names=dims,
        attributes=to_json(attrs),
        overwrite=True,
    )
    array[...] = values


def replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`; an earlier `final` is moved away first and deleted last."""
    if not final.exists():
        new.rename(final)
        return
    old = final.with_name(f"{final.name}.old.{os.getpid()}")
    final.rename(old)
    new.rename(final)
    shutil.rmtree(old)
