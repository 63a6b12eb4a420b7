"""What runs inside py4DSTEM's own environment: ``python py4dstem_worker.py TASK INPUT.npz OUTPUT.npz``.

Imports nothing of ours. py4DSTEM's x is the row and its y the column; arrays leave here as (row, column).
"""

import json
import sys
import time

import numpy as np
import py4DSTEM

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


def map_strain(vectors, max_peak_spacing, reference=None):
    """Basis, lattice and strain with StrainMap; the origin must be calibrated.

    `reference` holds two vectors (row, column) that span the reference lattice in any basis; default: median.
    """
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
        start = time.process_time()
        vectors = find_disks(given["patterns"], kernel, options)
        out[f"cpu_{n}"] = np.array(time.process_time() - start)
        out |= {f"{k}_{n}": v for k, v in as_arrays(vectors).items()}
        shape, origin = vectors.Rshape, given["origin"]
        vectors.calibration.set_origin((np.full(shape, origin[0]), np.full(shape, origin[1])))
        found = map_strain(vectors, float(given["max_peak_spacing"]))
        out |= {f"{k}_{n}": v for k, v in found.items()}
    return out


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


def kernels(given):
    """Kernels of one probe, unit by unit: flat, gaussian, sigmoid."""
    make = py4DSTEM.Probe
    probe, origin = given["probe"], tuple(given["origin"])
    return {
        "flat": make.get_probe_kernel_flat(probe, origin=origin),
        "gaussian": make.get_probe_kernel_edge_gaussian(
            probe, float(given["sigma"]), origin=origin, bilinear=False
        ),
        "sigmoid": make.get_probe_kernel_edge_sigmoid(
            probe, tuple(given["radii"]), origin=origin, bilinear=False
        ),
    }


def speed(given):
    """CPU seconds for disk detection alone."""
    out = {}
    for n, options in enumerate(json.loads(str(given["options"]))):
        start = time.process_time()
        find_disks(given["patterns"], given["kernel"], options)
        out[f"cpu_{n}"] = np.array(time.process_time() - start)
    return out


TASKS = {"agreement": agreement, "kernels": kernels, "opens": opens, "speed": speed}

if __name__ == "__main__":
    task, source, target = sys.argv[1:]
    with np.load(source) as loaded:
        result = TASKS[task](dict(loaded))
    np.savez(target, **result)
