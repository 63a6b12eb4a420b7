"""Which format a file has, told from its contents, and the reader for it."""

import zipfile
from pathlib import Path
from typing import Any

from . import raw
from .base import Source

_HDF5 = b"\x89HDF\r\n\x1a\n"
KNOWN = (
    "Gatan dm3/dm4, NanoMEGAS blo and app5, Merlin mib, EMPAD xml/raw, TVIPS, Direct Electron mrc, Velox "
    "emd, HyperSpy "
    "hspy/zspy, py4DSTEM, stempy events and other HDF5, DECTRIS Arina, Zarr, NumPy npy"
)


def open_source(
    path: str | Path,
    *,
    scan_shape: tuple[int, int] | None = None,
    detector_shape: tuple[int, int] | None = None,
    dtype: Any = None,
    offset: int = 0,
    dataset: str | None = None,
    depth: int | None = None,
) -> Source:
    """Open a file or folder with the reader that its contents ask for.

    Parameters
    ----------
    path : path
        File, or folder of a Zarr store.
    scan_shape : tuple of int, optional
        (y, x), where the file does not say.
    detector_shape, dtype, offset
        Of a raw binary; `detector_shape` makes any file one.
    dataset : str, optional
        Path inside an HDF5 file or Zarr store, or number of the signal in a file with several.
    depth : int, optional
        Which of several exit depths, in a simulated scan.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`.
    ValueError
        If the format is unknown, the file damaged, or more must be known to read it.
    ImportError
        If an optional package is needed; the message has the command that installs it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_dir():
        if any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zarray")):
            from .zarrs import read_zarr

            return read_zarr(path, dataset)
        inside = sorted(p.name for p in path.iterdir() if p.is_file())[:5]
        raise ValueError(
            f"{path} is a folder but no Zarr store; give one of the files in it"
            + (f", such as {', '.join(inside)}" if inside else "")
        )
    if detector_shape is not None:
        if dtype is None:
            raise ValueError(f"to read {path.name} as raw binary give its dtype too, such as --dtype uint16")
        return raw.read_raw(path, dtype, detector_shape, offset)
    with path.open("rb") as stream:
        head = stream.read(1024)
    if not head:
        raise ValueError(f"{path.name} is empty")
    suffix = path.suffix.lower()
    if head.startswith(b"\x93NUMPY"):
        return raw.read_npy(path)
    if head.startswith(_HDF5) or (
        suffix in (".h5", ".hdf5", ".emd", ".hspy", ".nxs") and _has_user_block(path)
    ):
        from .hdf5 import read_hdf5

        return read_hdf5(path, dataset, depth)
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path, dataset)
    if (head.lstrip()[:1] == b"<" and raw.is_empad_xml(path)) or raw.is_empad_raw(path):
        return raw.read_empad(path)
    if head.startswith(b"MQ1,"):
        from .merlin import read_merlin

        return read_merlin(path, scan_shape)
    if (kind := _vendor(head, suffix)) is not None:
        from .rosetta import read_rosetta

        return read_rosetta(path, kind, scan_shape, dataset)
    if suffix == ".tvips":
        first = f"{path.stem[:-3]}000{path.suffix}"
        raise ValueError(
            f"{path.name} is a later part of a TVIPS series, or damaged; convert the first, {first}"
        )
    raise ValueError(
        f"{path.name} has none of the known formats ({KNOWN}); a raw binary needs its layout: "
        "--dtype uint16 --detector-shape 256,256 --scan-shape ROWS,COLUMNS [--offset BYTES]"
    )


def _vendor(head: bytes, suffix: str) -> str | None:
    """Name of the rosettasciio reader for a file that starts with `head`."""
    if head.startswith(b"IMGBLO"):
        return "blockfile"
    if head[:4] in (b"\x00\x00\x00\x03", b"\x00\x00\x00\x04") and suffix in (".dm3", ".dm4", ".dm"):
        return "digitalmicrograph"
    if head[208:211] == b"MAP" or suffix == ".mrc":
        return "mrc"
    # the header of 256 bytes starts with its own size and the version
    if head[:8] in (b"\x00\x01\x00\x00\x01\x00\x00\x00", b"\x00\x01\x00\x00\x02\x00\x00\x00"):
        return "tvips"
    return None


def _has_user_block(path: Path) -> bool:
    """True if an HDF5 signature stands at one of the offsets that the format allows after a user block."""
    with path.open("rb") as stream:
        for power in range(9, 16):
            stream.seek(1 << power)
            if stream.read(8) == _HDF5:
                return True
    return False


def _read_zip(path: Path, dataset: str | None) -> Source:
    names = zipfile.ZipFile(path).namelist()
    if any(name in (".zgroup", ".zarray", "zarr.json") for name in names):
        from .zarrs import read_zarr

        return read_zarr(path, dataset)
    files = [name for name in names if not name.endswith("/")][:3]
    raise ValueError(
        f"{path.name} is a zip archive of {', '.join(files)} ...; unpack it and convert the file in it "
        "that you mean"
    )
