"""How a scan is cut into blocks: one Dask block is one shard, about 128 MiB, both detector axes whole.

Arithmetic only; the stores themselves are in `fcunet.store`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import schema

MIB = 2**20
SHARD_BYTES, CHUNK_BYTES = 128 * MIB, 2 * MIB
_SLACK = 1.5  # a tile may exceed its target by this factor: 576 px keeps 16 x 16 (162 MiB) rather than 8 x 8
_MIN_BLOCKS = 8  # smaller shards for a small scan, so that several workers have something to do


def pair(sizes: Sequence[int]) -> tuple[int, int]:
    """The first two of `sizes`, as plain integers."""
    return int(sizes[0]), int(sizes[1])


@dataclass(frozen=True)
class Layout:
    """Scan positions (y, x) in one shard and in one inner chunk; both detector axes are always whole."""

    shard: tuple[int, int]
    chunk: tuple[int, int]


def plan_layout(scan_shape: tuple[int, int], detector_shape: tuple[int, int], dtype: Any) -> Layout:
    """Shard of about 128 MiB and chunk of about 2 MiB for a scan, sides a power of two.

    A scan too small for eight such shards gets smaller ones, to keep several workers busy.

    Parameters
    ----------
    scan_shape, detector_shape : tuple of int
        (y, x).
    dtype : dtype-like
        Of one detector pixel.

    Raises
    ------
    ValueError
        If a size is not positive.
    """
    if min(*scan_shape, *detector_shape) < 1:
        raise ValueError(
            f"scan {scan_shape} and detector {detector_shape} must be at least one pixel each way"
        )
    pattern_bytes = detector_shape[0] * detector_shape[1] * np.dtype(dtype).itemsize
    n = _power_of_four(SHARD_BYTES * _SLACK / pattern_bytes)
    shard = _tile(n, scan_shape)
    while n > 1 and np.prod(BlockGrid(scan_shape, shard).n_blocks) < _MIN_BLOCKS:
        n //= 2
        shard = _tile(n, scan_shape)
    return Layout(shard, _tile(_power_of_four(CHUNK_BYTES * _SLACK / pattern_bytes), shard))


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of a scan: `block_shape` positions (y, x) each, those at the far edges possibly fewer."""

    scan_shape: tuple[int, int]
    block_shape: tuple[int, int]

    @property
    def n_blocks(self) -> tuple[int, int]:
        """Number of blocks along (y, x)."""
        (ny, nx), (by, bx) = self.scan_shape, self.block_shape
        return -(-ny // by), -(-nx // bx)

    def slices(self, iy: int, ix: int) -> tuple[slice, slice]:
        """Scan region (y, x) of block (iy, ix)."""
        if not (0 <= iy < self.n_blocks[0] and 0 <= ix < self.n_blocks[1]):
            raise ValueError(
                f"there is no block ({iy}, {ix}): the scan has {self.n_blocks} blocks, from (0, 0)"
            )
        (ny, nx), (by, bx) = self.scan_shape, self.block_shape
        return slice(iy * by, min((iy + 1) * by, ny)), slice(ix * bx, min((ix + 1) * bx, nx))

    def shape(self, iy: int, ix: int) -> tuple[int, int]:
        """Scan positions (y, x) in block (iy, ix)."""
        ys, xs = self.slices(iy, ix)
        return ys.stop - ys.start, xs.stop - xs.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Indices of all blocks, row by row."""
        return iter([(int(iy), int(ix)) for iy, ix in np.ndindex(*self.n_blocks)])

    def __len__(self) -> int:
        return self.n_blocks[0] * self.n_blocks[1]


def check_blocks(array: Any, shard: tuple[int, int] | None = None) -> None:
    """Refuse a Dask array whose blocks split a pattern, are irregular, or differ from `shard` (y, x).

    Arrays that are not chunked pass: they are cut by whoever writes them.

    Raises
    ------
    ValueError
        With the rechunk call to make.
    """
    if array.chunks is None:
        return
    call = f"scan_y={shard[0]}, scan_x={shard[1]}" if shard else "scan_y=16, scan_x=16"
    call = f"rechunk first: datacube.chunk({call}" + (", qy=-1, qx=-1)" if "qy" in array.dims else ")")
    sizes = dict(zip(map(str, array.dims), array.chunks, strict=True))
    for dim in ("qy", "qx", "peak"):
        if len(sizes.get(dim, (0,))) > 1:
            raise ValueError(
                f"{dim!r} is split into {len(sizes[dim])} chunks of {_short(sizes[dim])}, but one pattern "
                f"must lie in one chunk; {call}"
            )
    for dim, n in zip(schema.SCAN_DIMS, shard or (None, None), strict=True):
        first = sizes[dim][0] if n is None else min(n, array.sizes[dim])
        if any(size != first for size in sizes[dim][:-1]) or sizes[dim][0] > first or sizes[dim][-1] > first:
            needed = "equal blocks are needed" if n is None else f"one block must be one shard of {n}"
            raise ValueError(f"{dim!r} is cut into {_short(sizes[dim])}, but {needed}; {call}")


def check_whole_peaks(peaks: Any) -> None:
    """Refuse a dataset of peaks in which those of one pattern lie in several blocks.

    Raises
    ------
    ValueError
        With the rechunk call to make.
    """
    chunks = peaks["peak_qy"].chunks
    if chunks is not None and len(chunks[2]) > 1:
        raise ValueError(
            f"'peak' is split into {len(chunks[2])} chunks, but the peaks of one pattern must lie in one; "
            "rechunk first: peaks.chunk(peak=-1)"
        )


def inner_chunk(shard: tuple[int, int], detector_shape: tuple[int, int], dtype: Any) -> tuple[int, int]:
    """Inner chunk of about 2 MiB that divides a given shard."""
    pattern_bytes = detector_shape[0] * detector_shape[1] * np.dtype(dtype).itemsize
    planned = _tile(_power_of_four(CHUNK_BYTES * _SLACK / pattern_bytes), shard)
    return _divisor(shard[0], planned[0]), _divisor(shard[1], planned[1])


def _power_of_four(limit: float) -> int:
    """Largest power of four not above `limit`, at least 1."""
    return int(4 ** max(0, np.floor(np.log2(max(limit, 1)) / 2)))


def _tile(n: int, shape: tuple[int, int]) -> tuple[int, int]:
    """About `n` positions (a power of two) as a rectangle, as square as `shape` allows."""
    ceiling = [1 << max(0, size - 1).bit_length() for size in shape]
    ty = min(1 << (n.bit_length() - 1) // 2, ceiling[0])
    tx = min(n // ty, ceiling[1])
    return min(n // tx, ceiling[0]), tx


def _divisor(n: int, limit: int) -> int:
    """Largest divisor of `n` not above `limit`."""
    return max(d for d in range(1, limit + 1) if n % d == 0)


def _short(sizes: tuple[int, ...]) -> str:
    return str(sizes) if len(sizes) <= 6 else f"({', '.join(map(str, sizes[:5]))}, ... {sizes[-1]})"
