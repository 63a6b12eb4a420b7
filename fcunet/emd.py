"""Bragg peaks and strain maps as py4DSTEM writes and reads them: EMD 1.0, an HDF5 layout (plain h5py).

py4DSTEM's x is the first array axis (rows, our y) and its y the second (columns, our x), so names are
exchanged here, and nowhere else. Arrays keep their order. Written files open in py4DSTEM 0.14.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from . import schema
from .kernels.strain import COMPONENTS, deformation_gradient, rotate_frame, strain_from_F

_RECORD = np.dtype([("qx", np.float64), ("qy", np.float64), ("intensity", np.float64)])
# ours -> py4DSTEM's
_STRAIN_NAMES = {"e_yy": "e_xx", "e_xx": "e_yy", "e_xy": "e_xy", "theta": "theta"}
_Q_UNITS = {schema.UNIT_Q: "A^-1", schema.UNIT_PIXEL: "pixels"}
_ROOT = "fcunet_root"


def write_emd(path: Path, peaks: xr.Dataset | None, results: xr.DataTree | None) -> None:
    """Write a new EMD 1.0 file with what is given: `braggvectors`, `strain` and the calibration.

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
        if peaks is not None:
            _write_peaks(root, peaks)
            targets.append("/braggvectors")
        if results is not None:
            _write_strain(root, results)
            targets.append("/strain")
        facts = _calibration(peaks, results) | {"_root_treepath": "", "_target_paths": targets}
        bundle = root.create_group("metadatabundle")
        bundle.attrs["emd_group_type"] = "metadatabundle"
        _write_metadata(bundle, "calibration", "Calibration", facts)


def read_py4dstem_peaks(path: str | Path) -> xr.Dataset:
    """Bragg peaks of a py4DSTEM file, to fit lattices and strain to.

    Parameters
    ----------
    path : path
        EMD 1.0 file that holds a BraggVectors object (py4DSTEM 0.14 or newer).

    Returns
    -------
    Dataset
        `peak_qy` (their qx), `peak_qx` (their qy), `peak_intensity` (scan_y, scan_x, peak) float32, raw
        detector px, NaN-padded, brightest first; `n_peaks`, `truncated`; `origin_qy`, `origin_qx` if the file
        has origins. Pixel sizes go to the scan coordinates (nm) and ``attrs["q_pixel_size"]``; the rotation
        of the scan to ``attrs["scan_rotation_degree"]``.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or no BraggVectors in it.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an HDF5 file; needed is one written by py4DSTEM.save()")
    with h5py.File(path, "r") as file:
        found: list[Any] = []
        file.visititems(
            lambda _, node: (
                found.append(node) if _text(node.attrs.get("python_class")) == "BraggVectors" else None
            )
        )
        if not found:
            raise ValueError(
                f"{path} holds no BraggVectors; save them in py4DSTEM: py4DSTEM.save(path, braggvectors)"
            )
        node = found[0]
        records = node["_v_uncal/data"]
        ny, nx = records.shape
        rows = [records[iy] for iy in range(ny)]
        longest = max((len(record) for row in rows for record in row), default=0)
        arrays = np.full((3, ny, nx, max(longest, 1)), np.nan, np.float32)
        counts = np.zeros((ny, nx), np.int16)
        for iy, row in enumerate(rows):
            for ix, record in enumerate(row):
                record = record[np.argsort(-record["intensity"], kind="stable")]
                counts[iy, ix] = len(record)
                for array, name in zip(arrays, ("qx", "qy", "intensity"), strict=True):
                    array[iy, ix, : len(record)] = record[name]
        shape = node["metadatabundle/_braggvectors_shape/Qshape"][()]
        bundle = file[node.name.split("/")[1]].get("metadatabundle/calibration")
        facts = {} if bundle is None else {k: v[()] for k, v in bundle.items() if hasattr(v, "shape")}
    values = dict(zip(("peak_qy", "peak_qx", "peak_intensity"), arrays, strict=True))
    peaks = xr.Dataset(
        {name: (schema.PEAK_DIMS, value, schema.PEAKS[name].attrs) for name, value in values.items()}
    )
    peaks["n_peaks"] = (schema.SCAN_DIMS, counts, schema.PEAKS["n_peaks"].attrs)
    peaks["truncated"] = (schema.SCAN_DIMS, np.zeros((ny, nx), bool), schema.PEAKS["truncated"].attrs)
    for ours, theirs in (("origin_qy", "qx0"), ("origin_qx", "qy0")):
        origin = facts.get(theirs, facts.get(f"{theirs}_mean"))
        if origin is not None and np.shape(origin) in ((), (ny, nx)):
            full = np.broadcast_to(np.asarray(origin, dtype=np.float64), (ny, nx)).copy()
            peaks[ours] = (schema.SCAN_DIMS, full, schema.DATACUBE[ours].attrs)
    units, step = _text(facts.get("R_pixel_units", "pixels")), float(facts.get("R_pixel_size", 1))
    to_nm = {"nm": 1.0, "A": 0.1, "um": 1000.0, "µm": 1000.0}.get(units)
    for dim, n in zip(schema.SCAN_DIMS, (ny, nx), strict=True):
        scale, unit = (1.0, schema.UNIT_PIXEL) if to_nm is None else (step * to_nm, schema.UNIT_SCAN)
        peaks[dim] = (dim, np.arange(n) * scale, {"units": unit})
    peaks.attrs = {"detector_shape": [int(n) for n in shape], "source_format": "py4DSTEM BraggVectors"}
    if _text(facts.get("Q_pixel_units", "")) == "A^-1":
        peaks.attrs |= {"q_pixel_size": float(facts["Q_pixel_size"]), "q_pixel_units": schema.UNIT_Q}
    if "QR_rotation" in facts and not bool(facts.get("QR_flip", False)):
        peaks.attrs["scan_rotation_degree"] = float(np.rad2deg(facts["QR_rotation"]))
    return peaks


def py4dstem_strain(results: xr.DataTree) -> dict[str, np.ndarray]:
    """Strain of `results` in py4DSTEM's names, axes and definition: e_xx, e_yy, e_xy, theta, mask, std.

    The reference and the frame are those of `results`.
    """
    strain, lattice = results["strain"].dataset, results["lattice"].dataset
    names = schema.LATTICE_PARAMETERS[2:]
    g = np.stack([lattice[name].values for name in names], -1).astype(np.float64)
    g = g.reshape(*g.shape[:-1], 2, 2)
    g_ref = np.array([strain.attrs["g1_ref_px"], strain.attrs["g2_ref_px"]], dtype=np.float64)
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
        axis = node.create_dataset(f"dim{index}", data=np.array([0.0, step]))  # two numbers: a linear axis
        axis.attrs.update(name=("Rx", "Ry")[index], units="pixels" if units == schema.UNIT_PIXEL else units)
    labels = node.create_dataset("dim2", data=np.array(list(slices), dtype="S"))
    labels.attrs["name"] = "_labels_"


def _calibration(peaks: xr.Dataset | None, results: xr.DataTree | None) -> dict[str, Any]:
    """What is known of pixel sizes, origin and rotation, in py4DSTEM's names and axes."""
    facts: dict[str, Any] = {}
    scan = results["strain"].dataset if results is not None else peaks
    assert scan is not None
    step, units = _step(scan, "scan_y")
    facts |= {"R_pixel_size": step, "R_pixel_units": "pixels" if units == schema.UNIT_PIXEL else units}
    facts |= {"Q_pixel_size": 1.0, "Q_pixel_units": "pixels"}
    if results is not None and "diffraction" in results.children:
        step, units = _step(results["diffraction"].dataset, "qy")
        if units in _Q_UNITS:
            facts |= {"Q_pixel_size": step, "Q_pixel_units": _Q_UNITS[units]}
    elif peaks is not None and "q_pixel_size" in peaks.attrs:
        facts |= {"Q_pixel_size": float(peaks.attrs["q_pixel_size"]), "Q_pixel_units": "A^-1"}
    source = results["lattice"].dataset if results is not None else peaks
    if source is not None and {"origin_qy", "origin_qx"} <= set(source):
        for theirs, ours in (("qx0", "origin_qy"), ("qy0", "origin_qx")):
            origin = np.asarray(source[ours].values, dtype=np.float64)
            if np.isfinite(origin).any():
                mean = float(np.nanmean(origin))
                filled = np.where(np.isfinite(origin), origin, mean)
                facts |= {theirs: filled, f"{theirs}_mean": mean, f"{theirs}_shift": filled - mean}
    if results is not None and results["strain"].attrs.get("frame") == "scan":
        degree = float(results["strain"].attrs.get("rotation_degree", 0.0))
        facts |= {"QR_rotation": np.deg2rad(degree), "QR_rotation_degrees": degree}
        facts["QR_flip"] = bool(results["strain"].attrs.get("transposed", 0))
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


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
