"""What runs inside pyxem's environment (protocol.py): detection and strain as its documentation does them.

Imports nothing of ours. Vectors leave here as (row, column).
"""

import dask
import numpy as np
import pyxem
from protocol import best_cpu_seconds, main, options_of, padded
from pyxem.generators.displacement_gradient_tensor_generator import get_DisplacementGradientMap
from scipy.ndimage import gaussian_filter

QUIET = {"show_progressbar": False}


def find(patterns, options, radius_px):
    """Peaks per pattern: normalised correlation with a disk, local maxima, refinement on the counts."""
    signal = pyxem.signals.Diffraction2D(np.array(patterns, dtype=np.float32))
    if options["blur"]:
        sigma = (0, 0, options["blur"], options["blur"])
        signal.data = gaussian_filter(signal.data, sigma)
    matched = signal.template_match_disk(disk_r=round(radius_px), **QUIET)
    vectors = matched.get_diffraction_vectors(
        method="local_max",
        min_distance=options["min_distance"],
        threshold_abs=options["threshold"],
        get_intensity=True,
        **QUIET,
    )
    if options["refine"] is None:
        return vectors.data
    refined = vectors.subpixel_refine(
        signal,
        method=options["refine"],
        square_size=options["square_size"],
        disk_r=round(radius_px),
        upsample_factor=options.get("upsample_factor", 5),
        **QUIET,
    )
    return refined.data


def detect(given):
    """Disks of every pattern; intensities are heights of the normalised correlation."""
    options, radius = options_of(given), float(given["radius_px"])
    patterns, shape = given["patterns"], given["patterns"].shape[:2]
    with dask.config.set(scheduler="synchronous"):
        found, seconds = best_cpu_seconds(
            lambda: find(patterns, options, radius),
            given["repeats"],
            warm_up=lambda: find(patterns[:1, :2], options, radius),
        )
    peaks = [np.asarray(found[i][j], dtype=float)[:, :3] for i in range(shape[0]) for j in range(shape[1])]
    return padded(peaks, shape) | {"cpu_seconds": seconds}


def lattice_strain(given):
    """Strain of given lattices (scan_y, scan_x, 2, 2): rows g1, g2, columns (row, column)."""
    lattice = pyxem.signals.Diffraction2D(np.array(given["lattice"], dtype=float))
    gradient = get_DisplacementGradientMap(lattice, np.array(given["reference"], dtype=float))
    found = gradient.get_strain_maps().data
    return dict(zip(("rows", "columns", "shear", "theta"), found, strict=True))


def opens(given):
    """Contents of an exported zspy: the datacube of one, the strain of another."""
    import hyperspy.api as hs

    cube = hs.load(str(given["cube"]), lazy=True)
    maps = {signal.metadata.General.title: signal for signal in hs.load(str(given["maps"]))}
    axes = cube.axes_manager
    return {
        "kind": np.array(type(cube).__name__),
        "data": cube.data.compute(),
        "scales": np.array([axis.scale for axis in axes._axes]),
        "units": np.array([str(axis.units) for axis in axes._axes]),
        "navigation": np.array(axes.navigation_dimension),
        "e_xx": maps["e_xx"].data,
        "step": np.array(maps["e_xx"].axes_manager[0].scale),
    }


if __name__ == "__main__":
    main({"detect": detect, "lattice_strain": lattice_strain, "opens": opens})
