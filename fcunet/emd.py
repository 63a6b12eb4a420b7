"""Scans, Bragg peaks and strain maps as py4DSTEM writes and reads them: EMD 1.0, an HDF5 layout (plain h5py).

py4DSTEM's x is the first array axis (rows, our y) and its y the second (columns, our x), so names are
exchanged here, and nowhere else. Arrays keep their order. Written files open in py4DSTEM 0.14.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask
import numpy as np
import xarray as xr

from . import schema
from .datacube import block_grid
from .kernels.ellipse import Ellipse, undistort_lattice
from .kernels.strain import COMPONENTS, deformation_gradient, rotate_frame, strain_from_F

_RECORD = np.dtype([("qx", np.float64), ("qy", np.float64), ("intensity", np.float64)])
# ours -> py4DSTEM's
_STRAIN_NAMES = {"e_yy": "e_xx", "e_xx": "e_yy", "e_xy": "e_xy", "theta": "theta"}
_Q_UNITS = {schema.UNIT_Q: "A^-1", schema.UNIT_PIXEL: "pixels"}
_ROOT = "fcunet_root"


def write_emd(
    path: Path,
    peaks: xr.Dataset | None = None,
    results: xr.DataTree | None = None,
    cube: xr.Dataset | None = None,
) -> None:
    """Write a new EMD 1.0 file with what is given: datacube, `braggvectors`, `strain` and the calibration.

    Parameters
    ----------
    path : Path
        File to create.
    peaks : Dataset, optional
        Peaks store; becomes ``braggvectors`` (raw detector positions, as py4DSTEM stores them).
    results : DataTree, optional
        Results; the strain becomes the stack ``strain`` of class RealSlice (labels e_xx, e_yy, e_xy, theta,
        mask and the standard deviations), in py4DSTEM's axes and definition. NaN where there is no lattice:
        mask is 0 there.
    cube : Dataset, optional
        Datacube; becomes ``datacube``, uncompressed in one piece, so that py4DSTEM can map it, and its vacuum
        probe ``probe``. Block by block: little memory is needed.
    """
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs.update(
            emd_group_type="file",
            version_major=1,
            version_minor=0,
            UUID=str(uuid.uuid4()),
            authoring_program="fcunet",
            authoring_user="",
        )
        root = _group(file, _ROOT, "root", "Root")
        targets = []
        if cube is not None:
            _write_cube(root, cube)
            targets.append("/datacube")
        if peaks is not None:
            _write_peaks(root, peaks)
            targets.append("/braggvectors")
        if results is not None:
            _write_strain(root, results)
            targets.append("/strain")
        facts = _calibration(peaks, results, cube) | {"_root_treepath": "", "_target_paths": targets}
        bundle = root.create_group("metadatabundle")
        bundle.attrs["emd_group_type"] = "metadatabundle"
        _write_metadata(bundle, "calibration", "Calibration", facts)


def py4dstem_strain(results: xr.DataTree) -> dict[str, np.ndarray]:
    """Strain of `results` in py4DSTEM's names, axes and definition: e_xx, e_yy, e_xy, theta, mask, std.

    The reference and the frame are those of `results`.
    """
    strain, lattice = results["strain"].dataset, results["lattice"].dataset
    names = schema.LATTICE_PARAMETERS[2:]
    g = np.stack([lattice[name].values for name in names], -1).astype(np.float64)
    g = g.reshape(*g.shape[:-1], 2, 2)
    vectors = [strain.attrs.get(f"g{i}_ref_px") for i in (1, 2)]
    # where no position has a lattice there is no reference either: all strain is NaN, whatever it is held to
    g_ref = np.eye(2) if None in vectors else np.array(vectors, dtype=np.float64)
    ratio, angle = strain.attrs.get("ellipse_ratio", 1.0), strain.attrs.get("ellipse_angle_degree", 0.0)
    g, g_ref = (undistort_lattice(v, None, Ellipse(float(ratio), float(angle)))[0] for v in (g, g_ref))
    F = rotate_frame(
        deformation_gradient(g, g_ref),
        float(strain.attrs.get("rotation_degree", 0.0)),
        transpose=bool(strain.attrs.get("transposed", 0)),
    )
    found = strain_from_F(F, convention="py4dstem")
    slices = {_STRAIN_NAMES[name]: found[name] for name in COMPONENTS}
    slices = {name: slices[name] for name in ("e_xx", "e_yy", "e_xy", "theta")}
    slices["mask"] = np.isfinite(slices["e_xx"]).astype(np.float64)
    for ours in ("e_yy", "e_xx", "e_xy", "theta"):  # equal to first order in every definition
        if f"{ours}_std" in strain:
            slices[f"{_STRAIN_NAMES[ours]}_std"] = strain[f"{ours}_std"].values.astype(np.float64)
    return slices


def _write_cube(root: Any, cube: xr.Dataset) -> None:
    intensity = cube["intensity"].transpose(*schema.DATACUBE_DIMS)
    node = _group(root, "datacube", "array", "DataCube")
    data = node.create_dataset("data", shape=intensity.shape, dtype=intensity.dtype)
    data.attrs["units"] = "pixel intensity"
    grid = block_grid(intensity)
    for at in np.ndindex(*grid.n_blocks):
        region = grid.slices(*at)
        data[region] = dask.compute(intensity[region].data, scheduler="threads")[0]
    for index, dim in enumerate(schema.DATACUBE_DIMS):
        step, units = _step(cube, dim)
        _write_axis(node, index, step, _Q_UNITS.get(units, units))
    if "probe" in cube:
        probe = np.asarray(cube["probe"].values, dtype=np.float64)
        node = _group(root, "probe", "array", "Probe")
        node.create_dataset("data", data=np.stack([probe, np.zeros_like(probe)])).attrs["units"] = "intensity"
        for index in (0, 1):
            step, units = _step(cube, schema.PATTERN_DIMS[index])
            _write_axis(node, index, step, _Q_UNITS.get(units, units), name=("Qx", "Qy")[index])
        node.create_dataset("dim2", data=np.array(["probe", "kernel"], dtype="S")).attrs["name"] = "_labels_"


def _write_axis(node: Any, index: int, step: float, units: str, *, name: str | None = None) -> None:
    """A linear axis: its first two values."""
    axis = node.create_dataset(f"dim{index}", data=np.array([0.0, step]))
    axis.attrs.update(name=name or ("Rx", "Ry", "Qx", "Qy")[index], units=units)


def _write_peaks(root: Any, peaks: xr.Dataset) -> None:
    import h5py

    ny, nx = peaks.sizes["scan_y"], peaks.sizes["scan_x"]
    node = _group(root, "braggvectors", "custom", "BraggVectors")
    data = _group(node, "_v_uncal", "custom_pointlistarray", "PointListArray").create_dataset(
        "data", (ny, nx), dtype=h5py.vlen_dtype(_RECORD)
    )
    chunks = peaks["peak_qy"].chunks
    edges = np.cumsum((0, *(chunks[0] if chunks else (ny,))))
    for start, stop in zip(edges[:-1], edges[1:], strict=True):  # one row of blocks in memory at a time
        block = peaks[["peak_qy", "peak_qx", "peak_intensity"]].isel(scan_y=slice(start, stop)).compute()
        table = np.empty(block["peak_qy"].shape, _RECORD)
        table["qx"], table["qy"] = block["peak_qy"].values, block["peak_qx"].values
        table["intensity"] = np.nan_to_num(block["peak_intensity"].values)
        present = np.isfinite(table["qx"]) & np.isfinite(table["qy"])
        for iy in range(stop - start):
            row = np.empty(nx, data.dtype)
            for ix in range(nx):
                row[ix] = table[iy, ix, present[iy, ix]]
            # `data[iy, :] = row` takes rows of equally long records for a rectangular array
            selection = data.id.get_space()
            selection.select_hyperslab((int(start + iy), 0), (1, nx))
            data.id.write(h5py.h5s.create_simple((nx,)), selection, row)
    shape = peaks.attrs.get("detector_shape")
    if shape is None:
        shape = [int(peaks[name].max()) + 2 for name in ("peak_qy", "peak_qx")]
    bundle = node.create_group("metadatabundle")
    bundle.attrs["emd_group_type"] = "metadatabundle"
    facts = {"Rshape": (ny, nx), "Qshape": tuple(int(n) for n in shape)}
    _write_metadata(bundle, "_braggvectors_shape", "Metadata", facts)


def _write_strain(root: Any, results: xr.DataTree) -> None:
    slices = py4dstem_strain(results)
    node = _group(root, "strain", "array", "RealSlice")
    stack = np.stack(list(slices.values()))
    node.create_dataset("data", data=stack, compression="gzip", shuffle=True).attrs["units"] = ""
    for index, dim in enumerate(schema.SCAN_DIMS):
        step, units = _step(results["strain"].dataset, dim)
        _write_axis(node, index, step, _Q_UNITS.get(units, units))
    labels = node.create_dataset("dim2", data=np.array(list(slices), dtype="S"))
    labels.attrs["name"] = "_labels_"


def _calibration(
    peaks: xr.Dataset | None, results: xr.DataTree | None, cube: xr.Dataset | None
) -> dict[str, Any]:
    """What is known of pixel sizes, origin, rotation and ellipse, in py4DSTEM's names and axes."""
    scan = cube if cube is not None else results["strain"].dataset if results is not None else peaks
    assert scan is not None
    step, units = _step(scan, "scan_y")
    facts: dict[str, Any] = {"R_pixel_size": step, "R_pixel_units": _Q_UNITS.get(units, units)}
    facts |= {"Q_pixel_size": 1.0, "Q_pixel_units": "pixels"}
    detector = results["diffraction"].dataset if results and "diffraction" in results.children else cube
    if detector is not None:
        step, units = _step(detector, "qy")
        if units in _Q_UNITS:
            facts |= {"Q_pixel_size": step, "Q_pixel_units": _Q_UNITS[units]}
    elif peaks is not None and "q_pixel_size" in peaks.attrs:
        facts |= {"Q_pixel_size": float(peaks.attrs["q_pixel_size"]), "Q_pixel_units": "A^-1"}
    source = results["lattice"].dataset if results is not None else peaks if peaks is not None else cube
    if source is not None and {"origin_qy", "origin_qx"} <= set(source):
        for theirs, ours in (("qx0", "origin_qy"), ("qy0", "origin_qx")):
            origin = np.asarray(source[ours].values, dtype=np.float64)
            if np.isfinite(origin).any():
                mean = float(np.nanmean(origin))
                filled = np.where(np.isfinite(origin), origin, mean)
                facts |= {theirs: filled, f"{theirs}_mean": mean, f"{theirs}_shift": filled - mean}
    return facts | _geometry(peaks, results, cube)


def _geometry(
    peaks: xr.Dataset | None, results: xr.DataTree | None, cube: xr.Dataset | None
) -> dict[str, Any]:
    """Rotation, flip and ellipse; what `readers.bragg.geometry_from_py4dstem` undoes."""
    if results is not None:
        attrs = results["strain"].attrs
        known = {"scan_transposed": attrs.get("transposed", 0)} if attrs.get("frame") == "scan" else {}
        known |= {"scan_rotation_degree": attrs.get("rotation_degree", 0.0)} if known else {}
        known |= {name: attrs[name] for name in ("ellipse_ratio", "ellipse_angle_degree") if name in attrs}
    else:
        source = cube if cube is not None else peaks
        assert source is not None
        inner = source.attrs.get("datacube")
        found = (dict(inner) if isinstance(inner, dict) else {}) | source.attrs
        known = {name: found[name] for name in schema.GEOMETRY_ATTRS if name in found}
    facts: dict[str, Any] = {}
    if {"scan_rotation_degree", "scan_transposed"} & set(known):
        degree = float(known.get("scan_rotation_degree", 0.0))
        facts |= {"QR_rotation": np.deg2rad(degree), "QR_rotation_degrees": degree}
        facts["QR_flip"] = bool(known.get("scan_transposed", 0))
    ratio = float(known.get("ellipse_ratio", 1.0))
    if ratio != 1:
        theta = np.deg2rad(90.0 - float(known.get("ellipse_angle_degree", 0.0)))
        facts |= {"a": ratio, "b": 1.0, "theta": theta}
    return facts


def _step(dataset: xr.Dataset, dim: str) -> tuple[float, str]:
    """Spacing and unit of a coordinate; one pixel without."""
    if dim not in dataset.coords or dataset.sizes[dim] < 2:
        return 1.0, schema.UNIT_PIXEL
    values = dataset[dim].values
    return float((values[-1] - values[0]) / (len(values) - 1)), dataset[dim].attrs.get(
        "units", schema.UNIT_PIXEL
    )


def _group(parent: Any, name: str, kind: str, python_class: str) -> Any:
    group = parent.create_group(name)
    group.attrs.update(emd_group_type=kind, python_class=python_class)
    return group


def _write_metadata(bundle: Any, name: str, python_class: str, items: Mapping[str, Any]) -> None:
    """A metadata group: every item a dataset that says its type."""
    group = _group(bundle, name, "metadata", python_class)
    for key, value in items.items():
        if isinstance(value, list):
            strings = group.create_group(key)
            strings.attrs.update(length=len(value), type="list_of_strings")
            for index, text in enumerate(value):
                strings.create_dataset(str(index), data=text)
            continue
        kinds = ((bool, "bool"), (str, "string"), (tuple, "tuple"), (np.ndarray, "array"))
        kind = next((label for cls, label in kinds if isinstance(value, cls)), "number")
        group.create_dataset(key, data=value).attrs["type"] = kind
