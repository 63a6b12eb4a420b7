"""Plain arrays and EMPAD: NumPy ``.npy``, raw binary with shape and dtype given, EMPAD raw files."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .base import Frames, Source

_EMPAD_SHAPE, _EMPAD_ROWS = (130, 128), 128  # the last two rows of a frame are not image


def read_npy(path: Path) -> Source:
    """A ``.npy`` array, mapped into memory; it has no calibration."""
    try:
        data = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as err:
        raise ValueError(f"{path.name} is a NumPy file that cannot be read ({err}); is it complete?") from err
    if not isinstance(data, np.memmap) or data.ndim not in (3, 4) or not data.flags.c_contiguous:
        return Source(path, "NumPy array", data)
    n = int(np.prod(data.shape[:-2]))
    frames = Frames(path, _frame(data.dtype, data.shape[-2:]), n, data.offset)
    return Source(path, "NumPy array", frames, scan_shape=data.shape[:2] if data.ndim == 4 else None)


def read_raw(path: Path, dtype: Any, detector_shape: tuple[int, int], offset: int = 0) -> Source:
    """Frames of `detector_shape` and `dtype`, one after the other, from byte `offset` on.

    Raises
    ------
    ValueError
        If the file does not hold a whole number of such frames.
    """
    dtype, (qy, qx) = np.dtype(dtype), detector_shape
    size, frame = path.stat().st_size - offset, qy * qx * dtype.itemsize
    if offset < 0 or size < frame or size % frame:
        raise ValueError(
            f"{path.name} has {path.stat().st_size} bytes; after an offset of {offset} that is "
            f"{size / frame:.6g} frames of "
            f"{qy} x {qx} {dtype}, not a whole number: it is truncated, or --dtype, --detector-shape or "
            "--offset is wrong"
        )
    return Source(path, "raw binary", Frames(path, _frame(dtype, (qy, qx)), size // frame, offset))


def read_empad(path: Path) -> Source:
    """EMPAD: the XML beside the raw file, or a raw file named ``scan_x4_y4.raw`` or with an XML.

    Not carried over, for both are doubtful: the field of view, as the XML does not say whether the scan size
    is in it, and ``calibrated_pixelsize``, which some programs read as 1/m per pixel, but which is the field
    of view divided by 25000.
    """
    notes, attrs, scan_shape, raw = [], {}, None, path
    if path.suffix.lower() != ".xml":
        path = next((xml for xml in sorted(path.parent.glob("*.xml")) if _raw_name(xml) == path.name), path)
    if path.suffix.lower() == ".xml":
        root = _parse(path)
        raw = path.with_name(_raw_name(path) or "")
        if root.findtext("pix_x") and root.findtext("pix_y"):
            scan_shape = int(root.findtext("pix_y", "")), int(root.findtext("pix_x", ""))
        measured = root.find("iom_measurements")
        volt = _number(measured, "source.get_voltage") or _number(measured, "high_voltage")
        attrs["beam_energy_keV"] = volt / 1e3 if volt else None
        length = _number(measured, "optics.get_cameralength") or _number(measured, "nominal_camera_length")
        attrs["camera_length_mm"] = length * 1e3 if length else None
        if measured is not None:
            notes.append(
                "EMPAD calibrations are left out: field of view and pixel size in the XML are ambiguous; "
                "give --scan-step and --q-pixel"
            )
    if not raw.is_file():
        raise ValueError(
            f"{path.name} names the data file {raw.name}, which is missing; put it into {path.parent}"
        )
    if scan_shape is None and (found := re.search(r"_x(\d+)_y(\d+)", raw.stem)):
        scan_shape = int(found[2]), int(found[1])
    source = read_raw(raw, "<f4", _EMPAD_SHAPE)
    source.data = Frames(raw, _frame("<f4", _EMPAD_SHAPE), source.data.shape[0], rows=slice(_EMPAD_ROWS))
    source.path, source.format, source.scan_shape = path, "EMPAD", scan_shape
    source.attrs = attrs | {"detector": "EMPAD"}
    source.notes = notes
    return source


def _frame(dtype: Any, shape: tuple[int, ...]) -> np.dtype:
    return np.dtype([("data", dtype, tuple(shape))])


def is_empad_xml(path: Path) -> bool:
    """True for an XML file that names a raw file."""
    return bool(_raw_name(path))


def is_empad_raw(path: Path) -> bool:
    """True for a raw file of whole EMPAD frames that is named like one or has its XML beside it."""
    if path.suffix.lower() != ".raw" or path.stat().st_size % (4 * _EMPAD_SHAPE[0] * _EMPAD_SHAPE[1]):
        return False
    named = re.search(r"_x\d+_y\d+", path.stem) is not None
    return named or any(_raw_name(xml) == path.name for xml in path.parent.glob("*.xml"))


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as err:
        raise ValueError(f"{path.name} is not readable XML ({err})") from err


def _raw_name(xml: Path) -> str | None:
    """Name of the data file in an EMPAD XML, None if there is none."""
    try:
        element = _parse(xml).find("raw_file")
    except ValueError:
        return None
    return None if element is None else Path(element.get("filename", "")).name


def _number(element: ElementTree.Element | None, name: str) -> float | None:
    text = None if element is None else element.findtext(name)
    try:
        return float(text) if text else None
    except ValueError:
        return None
