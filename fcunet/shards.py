"""The patterns of a datacube as Dask reads them, shard by shard; a missing shard is an error, not zeros."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from . import schema
from .remote import Place, Remote, is_transport
from .zarrfolder import block_shape_of, open_array, stamp

EVERY_SHARD = "every_shard_written"  # attribute of `intensity`: a shard that is not there was lost


class DamagedBlockError(ValueError):
    """A block of a store that is missing or does not decode."""


class Cube:
    """The stored `intensity` as Dask reads it: a path or URL when pickled; errors name block and file."""

    def __init__(self, path: Place) -> None:
        self.path = path if isinstance(path, Remote) else Path(os.path.abspath(path))
        array = self._array
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        self.block_shape = block_shape_of(array)
        self.attrs = {k: v for k, v in array.attrs.items() if k not in (EVERY_SHARD, "_ARRAY_DIMENSIONS")}
        self._every_shard = bool(array.attrs.get(EVERY_SHARD, False))
        if self.ndim != 4:
            raise ValueError(
                f"'intensity' in {path} has {self.ndim} dimensions, needed are {schema.DATACUBE_DIMS}"
            )

    @property
    def _array(self) -> zarr.Array:
        if not isinstance(self.path, Remote):
            return open_array(self.path, "intensity")
        if "_opened" not in self.__dict__:  # asking for the metadata each time would cost a round trip
            self._opened = open_array(self.path, "intensity")
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def __dask_tokenize__(self) -> tuple[str, int]:
        return str(self.path), stamp(self.path, "intensity")

    def __getitem__(self, key: Any) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        shards = self._shards(key)
        for shard, file in shards.items() if self._every_shard else ():
            if not self._has(file):
                raise DamagedBlockError(self._message(shard, file, "the file is missing"))
        try:
            basic = all(isinstance(k, int | np.integer | slice) for k in key)
            return np.asarray(self._array[key] if basic else self._array.oindex[key])
        except Exception as err:  # codecs raise whatever their library raises
            if isinstance(self.path, Remote) and is_transport(err):
                raise self.path.explain(err) from err
            for shard, file in shards.items():
                try:
                    self._array[
                        tuple(
                            slice(i * b, (i + 1) * b) for i, b in zip(shard, self.block_shape, strict=False)
                        )
                    ]
                except Exception as inner:
                    raise DamagedBlockError(
                        self._message(shard, file, f"it does not decode ({inner})")
                    ) from err
            raise

    def _has(self, file: str) -> bool:
        return self.path.has(file) if isinstance(self.path, Remote) else (self.path / file).exists()

    def _shards(self, key: tuple[Any, ...]) -> dict[tuple[int, int], str]:
        """Index and file of each block that `key` touches."""
        touched = []
        for n, b, k in zip(self.shape[:2], self.block_shape, (*key, slice(None), slice(None)), strict=False):
            touched.append(np.unique(np.atleast_1d(np.arange(n)[k]) // b))
        encode = self._array.metadata.encode_chunk_key
        return {
            (int(i), int(j)): "intensity/" + encode((int(i), int(j), 0, 0))
            for i in touched[0]
            for j in touched[1]
        }

    def _message(self, shard: tuple[int, int], file: str, why: str) -> str:
        return (
            f"block {shard} of {self.path.name} cannot be read from {file}: {why}; "
            "restore it from a backup, or convert the scan anew: fcunet convert INPUT OUTPUT.zarr --overwrite"
        )
