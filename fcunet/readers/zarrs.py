"""Zarr stores of formats 2 and 3: HyperSpy ``.zspy``, datacubes of this package, and other arrays."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import zarr
from zarr.storage import ZipStore

from .. import schema
from .base import Axis, Source


def read_zarr(path: Path, dataset: str | None = None) -> Source:
    """A Zarr folder or zip.

    Parameters
    ----------
    path : path
        Of the store.
    dataset : str, optional
        Path of the array in it, needed where several could be meant.

    Raises
    ------
    ValueError
        If no array, or more than one, could be the scan.
    """
    store: Any = ZipStore(path, mode="r") if path.is_file() else path
    node: Any = zarr.open(store, mode="r")
    if isinstance(node, zarr.Array):
        return Source(path, f"Zarr {node.metadata.zarr_format}", node)
    if dataset is not None:
        array = node.get(dataset)
        if not isinstance(array, zarr.Array):
            raise ValueError(
                f"{path.name} has no array {dataset!r}; it has {', '.join(_names(node)) or 'none'}"
            )
        return Source(path, f"Zarr {array.metadata.zarr_format}", array)
    if "Experiments" in node:
        return _read_zspy(path, node["Experiments"])
    if "intensity" in node and node.attrs.get("fcunet_format") == "datacube":
        return _read_datacube(path, node)
    arrays = {name: node[name] for name in _names(node)}
    name = choose(path, {name: array.shape for name, array in arrays.items()})
    return Source(path, f"Zarr {arrays[name].metadata.zarr_format}", arrays[name])


def _read_zspy(path: Path, experiments: Any) -> Source:
    signals = {name: group for name, group in experiments.groups() if "data" in group}
    name = choose(path, {name: group["data"].shape for name, group in signals.items()})
    group = signals[name]
    axes = [dict(axis.attrs) for key, axis in sorted(group.groups()) if key.startswith("axis-")]
    source = Source(path, "HyperSpy zspy", group["data"])
    apply_hyperspy_axes(source, axes)
    tem = _get(group, "metadata/Acquisition_instrument/TEM")
    source.attrs |= tem_attrs(dict(tem.attrs) if tem is not None else {})
    return source


def _read_datacube(path: Path, node: Any) -> Source:
    source = Source(path, "fcunet datacube", node["intensity"])
    for dim in schema.DATACUBE_DIMS:
        if dim in node and node[dim].attrs.get("units") != schema.UNIT_PIXEL and node[dim].shape[0] > 1:
            values = node[dim][:]
            step = (values[-1] - values[0]) / (len(values) - 1)
            source.axes[dim] = Axis(float(step), str(node[dim].attrs.get("units")), float(values[0]))
    source.variables = {n: node[n][:] for n in schema.DATACUBE if n != "intensity" and n in node}
    own = ("source_file", "source_format", "source_fingerprint", "reader", "handedness")
    source.attrs = {k: v for k, v in node.attrs.items() if k in schema.DATACUBE_ATTRS and k not in own}
    source.handedness = str(node.attrs.get("handedness", source.handedness))
    return source


def choose(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Name of the one array with most of 4, 3 or 2 dimensions.

    Raises
    ------
    ValueError
        If there is none, or several of the same rank.
    """
    for ndim in (4, 3, 2):
        found = [name for name, shape in shapes.items() if len(shape) == ndim]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{path.name} holds several arrays of {ndim} dimensions; {_pick(found, shapes)}")
    held = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no array"
    raise ValueError(f"{path.name} holds {held}, but no patterns: an array of 2, 3 or 4 dimensions is needed")


def _pick(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    return "choose one with --dataset: " + ", ".join(f"{name} {shapes[name]}" for name in names)


def apply_hyperspy_axes(source: Source, axes: list[dict[str, Any]]) -> None:
    """Take steps and units from HyperSpy's axis dictionaries; refuses spectra.

    Raises
    ------
    ValueError
        If the signal has other than two dimensions, or navigation axes come after signal axes.
    """
    signal = [axis for axis in axes if not _true(axis.get("navigate"))]
    flags = [_true(axis.get("navigate")) for axis in axes]
    if len(signal) not in (2, len(axes)) or flags != sorted(flags, reverse=True):
        raise ValueError(
            f"{source.path.name} holds a signal of shape {tuple(source.data.shape)} with {len(signal)} "
            "signal axes; "
            "diffraction patterns have two, after the scan axes"
        )
    names = dict(zip(reversed(schema.DATACUBE_DIMS), reversed(axes), strict=False))
    for dim, axis in names.items():
        units = axis.get("units")
        if isinstance(units, str) and units not in ("", "_None_", "<undefined>", "px", "pixel"):
            offset = float(axis.get("offset") or 0.0)
            source.axes[dim] = Axis(float(axis.get("scale", 1.0)), units, offset or None)


def tem_attrs(tem: Mapping[str, Any]) -> dict[str, Any]:
    """Root attributes from HyperSpy's ``Acquisition_instrument.TEM``: keV, mm and mrad there too."""
    names = {"beam_energy": "beam_energy_keV", "camera_length": "camera_length_mm"}
    names |= {"convergence_angle": "convergence_semiangle_mrad"}
    found = {new: _positive(tem.get(old)) for old, new in names.items()}
    return {key: value for key, value in found.items() if value is not None}


def _positive(value: Any) -> float | None:
    try:
        return float(value) if value is not None and float(value) > 0 else None
    except (TypeError, ValueError):
        return None


def _true(value: Any) -> bool:
    return bool(value) and str(value) != "False"


def _names(node: zarr.Group) -> list[str]:
    return sorted(name for name, member in node.members(max_depth=3) if isinstance(member, zarr.Array))


def _get(group: zarr.Group, path: str) -> zarr.Group | None:
    node: Any = group
    for part in path.split("/"):
        if not isinstance(node, zarr.Group) or part not in node:
            return None
        node = node[part]
    return node
