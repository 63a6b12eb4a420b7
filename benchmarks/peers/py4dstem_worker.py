"""What runs inside py4DSTEM's environment (protocol.py): detection, lattice and strain.

Imports nothing of ours. py4DSTEM's x is the row and its y the column; arrays leave here as (row, column).
"""

import json
import time

import numpy as np
import py4DSTEM
from protocol import best_cpu_seconds, main, options_of

FILTERS = {"none": None, "sqrt": np.sqrt, "log": np.log1p}


def find_disks(patterns, kernel, options):
    """BraggVectors of a scan, found with py4DSTEM."""
    options = dict(options)
    options["filter_function"] = FILTERS[options.pop("transform", "none")]
    cube = py4DSTEM.DataCube(np.ascontiguousarray(patterns))
    return cube.find_Bragg_disks(template=kernel, **options)


def as_arrays(vectors):
    """Peaks of a scan, padded with NaN: row, column, intensity, each (scan_y, scan_x, peaks)."""
    shape = vectors.Rshape
    lists = [[vectors.raw[i, j].data for j in range(shape[1])] for i in range(shape[0])]
    slots = max(max(len(peaks) for peaks in row) for row in lists)
    out = np.full((3, *shape, max(slots, 1)), np.nan)
    for i, row in enumerate(lists):
        for j, peaks in enumerate(row):
            for n, name in enumerate(("qx", "qy", "intensity")):
                out[n, i, j, : len(peaks)] = peaks[name]
    return {"qy": out[0], "qx": out[1], "intensity": out[2]}


def map_strain(vectors, max_peak_spacing, reference=None, *, setcal=True):
    """Basis, lattice and strain with StrainMap; the origin must be calibrated.

    `reference` holds two vectors (row, column) that span the reference lattice in any basis; default: median.
    """
    if setcal:
        vectors.setcal(center=True, rotate=False, ellipse=False, pixel=False)
    strain = py4DSTEM.StrainMap(vectors)
    strain.choose_basis_vectors(maxNumPeaks=500, minSpacing=max_peak_spacing, sigma=1)
    strain.fit_basis_vectors(max_peak_spacing=max_peak_spacing)
    basis = np.array([strain.g1, strain.g2])
    if reference is not None:
        change = np.round(reference @ np.linalg.inv(basis))
        reference = np.linalg.inv(change) @ reference
    strain.get_strain(gvects=None if reference is None else tuple(reference))
    names = ("g1x", "g1y", "g2x", "g2y")
    lattice = np.stack([strain.g1g2_map[name].data for name in names], -1).reshape(*vectors.Rshape, 2, 2)
    found = {name: strain.data[i] for i, name in enumerate(("rows", "columns", "shear", "theta", "mask"))}
    return found | {"basis": basis, "lattice": lattice}


def agreement(given):
    """Peaks and strain for each of a list of option sets, on the same patterns."""
    out = {}
    for n, options in enumerate(json.loads(str(given["options"]))):
        kernel = given[f"kernel_{n}"]
        vectors, out[f"cpu_{n}"] = best_cpu_seconds(
            lambda k=kernel, o=options: find_disks(given["patterns"], k, o)
        )
        out |= {f"{k}_{n}": v for k, v in as_arrays(vectors).items()}
        shape, origin = vectors.Rshape, given["origin"]
        vectors.calibration.set_origin((np.full(shape, origin[0]), np.full(shape, origin[1])))
        found = map_strain(vectors, float(given["max_peak_spacing"]))
        out |= {f"{k}_{n}": v for k, v in found.items()}
    return out


def lattice_strain(given):
    """Strain of given lattices (scan_y, scan_x, 2, 2): rows g1, g2, columns (row, column)."""
    from py4DSTEM.process.strain.latticevectors import get_strain_from_reference_g1g2

    lattice = np.asarray(given["lattice"])
    slices = [*np.moveaxis(lattice.reshape(*lattice.shape[:2], 4), -1, 0), np.ones(lattice.shape[:2])]
    vectors = py4DSTEM.RealSlice(np.stack(slices), slicelabels=("g1x", "g1y", "g2x", "g2y", "mask"))
    strain = get_strain_from_reference_g1g2(vectors, *(tuple(g) for g in given["reference"]))
    names = {"rows": "e_xx", "columns": "e_yy", "shear": "e_xy", "theta": "theta"}
    return {name: strain.get_slice(label).data for name, label in names.items()}


def vectors_of(given):
    """BraggVectors of given peaks (scan_y, scan_x, peak), NaN-padded."""
    vectors = py4DSTEM.BraggVectors(given["qy"].shape[:2], tuple(int(n) for n in given["detector_shape"]))
    for at in np.ndindex(given["qy"].shape[:2]):
        kept = np.isfinite(given["qy"][at])
        record = np.zeros(kept.sum(), vectors._v_uncal.dtype)
        for theirs, ours in (("qx", "qy"), ("qy", "qx"), ("intensity", "intensity")):
            record[theirs] = given[ours][at][kept]
        vectors._v_uncal[at].add(record)
    return vectors


def strain_speed(given):
    """CPU seconds from given peaks to strain maps; figures are left out where py4DSTEM lets one."""
    import matplotlib.pyplot as plt

    shape = given["qy"].shape[:2]
    origin = [np.full(shape, float(o)) for o in given["origin"]]

    def run():
        vectors = vectors_of(given)
        vectors.calibration.set_origin(tuple(origin))
        start = time.process_time()
        vectors.setcal(center=True, rotate=False, ellipse=False, pixel=False)
        strain = py4DSTEM.StrainMap(vectors)
        seconds = time.process_time() - start
        strain.choose_basis_vectors(maxNumPeaks=500, minSpacing=float(given["max_peak_spacing"]), sigma=1)
        strain.show_strain = lambda **_: (None, None)  # the figure that get_strain draws
        start = time.process_time()
        strain.fit_basis_vectors(max_peak_spacing=float(given["max_peak_spacing"]))
        strain.get_strain(returncalc=False)
        plt.close("all")
        return seconds + time.process_time() - start

    return {"cpu_seconds": min(run() for _ in range(int(given["repeats"])))}


def saved_strain(given):
    """Save given peaks with origin, rotation, flip and ellipse; what StrainMap finds with them."""
    vectors = vectors_of(given)
    calibration = vectors.calibration
    calibration.set_origin(tuple(np.array(given[name]) for name in ("origin_qy", "origin_qx")))
    calibration.set_Q_pixel_size(0.02)
    calibration.set_Q_pixel_units("A^-1")
    calibration.set_R_pixel_size(2.0)
    calibration.set_R_pixel_units("nm")
    if "rotation" in given:
        calibration.set_QR_rotation(float(given["rotation"]))
        calibration.set_QR_flip(bool(given["flip"]))
        calibration.set_ellipse(tuple(float(v) for v in given["ellipse"]))
    py4DSTEM.save(str(given["path"]), vectors, mode="o")
    again = py4DSTEM.read(str(given["path"]))
    again.setcal()
    spacing = float(given["max_peak_spacing"])
    medians = map_strain(again, spacing, setcal=False)
    found = map_strain(again, spacing, given["reference"], setcal=False)
    return found | {f"median_{name}": value for name, value in medians.items()}


def opens(given):
    """Contents of an exported file, and the strain fitted to its peaks."""
    file = str(given["path"])
    vectors = py4DSTEM.read(file, datapath="fcunet_root/braggvectors")
    stored = py4DSTEM.read(file, datapath="fcunet_root/strain")
    out = as_arrays(vectors)
    out["classes"] = np.array([type(vectors).__name__, type(stored).__name__])
    out["labels"] = np.array(list(stored.slicelabels))
    for name, label in {"rows": "e_xx", "columns": "e_yy", "shear": "e_xy", "theta": "theta"}.items():
        out[f"stored_{name}"] = np.asarray(stored.get_slice(label).data)
    return out | map_strain(vectors, float(given["max_peak_spacing"]), given["reference"])


def opens_cube(given):
    """Contents of an exported datacube."""
    file = str(given["path"])
    cube = py4DSTEM.read(file, datapath="fcunet_root/datacube")
    probe = py4DSTEM.read(file, datapath="fcunet_root/probe")
    calibration = cube.calibration
    origin = calibration.get_origin()
    return {
        "classes": np.array([type(cube).__name__, type(probe).__name__]),
        "data": cube.data,
        "probe": probe.probe,
        "qx0": origin[0],
        "qy0": origin[1],
        "ellipse": np.array(calibration.get_ellipse()),
        "rotation": np.array(calibration.get_QR_rotation()),
        "flip": np.array(calibration.get_QR_flip()),
        "pixels": np.array([calibration.get_Q_pixel_size(), calibration.get_R_pixel_size()]),
        "units": np.array([calibration.get_Q_pixel_units(), calibration.get_R_pixel_units()]),
    }


def make_kernel(kind, probe, origin, *, sigma=None, radii=None):
    """A kernel of py4DSTEM from a vacuum probe centred at `origin` (row, column)."""
    make, origin = py4DSTEM.Probe, tuple(float(v) for v in origin)
    probe = np.array(probe, dtype=np.float64)
    if kind == "flat":
        return make.get_probe_kernel_flat(probe, origin=origin)
    if kind == "gaussian":
        return make.get_probe_kernel_edge_gaussian(probe, sigma, origin=origin, bilinear=False)
    return make.get_probe_kernel_edge_sigmoid(probe, radii, origin=origin, bilinear=False)


def kernels(given):
    """Kernels of one probe: flat, gaussian, sigmoid."""
    options = {"sigma": float(given["sigma"]), "radii": tuple(given["radii"])}
    return {
        kind: make_kernel(kind, given["probe"], given["origin"], **options)
        for kind in ("flat", "gaussian", "sigmoid")
    }


def detect(given):
    """Disks of every pattern, with a kernel made from the probe by `kernel`: flat or sigmoid."""
    options = options_of(given)
    kind, radii = options.pop("kernel", "flat"), options.pop("radii", None)
    kernel = make_kernel(kind, given["probe"], given["origin"], radii=radii)
    patterns = given["patterns"]
    vectors, seconds = best_cpu_seconds(
        lambda: find_disks(patterns, kernel, options),
        given["repeats"],
        warm_up=lambda: find_disks(patterns[:1, :2], kernel, options),
    )
    return as_arrays(vectors) | {"cpu_seconds": seconds}


TASKS = {
    f.__name__: f
    for f in (agreement, detect, kernels, lattice_strain, opens, opens_cube, saved_strain, strain_speed)
}

if __name__ == "__main__":
    main(TASKS)
