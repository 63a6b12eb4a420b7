"""What runs inside quantem's environment (protocol.py): detection, lattice and strain as its notebooks do.

Imports nothing of ours. quantem's vectors are (row, column), as ours.
"""

import numpy as np
import torch
from protocol import best_cpu_seconds, main, options_of, padded
from quantem.core.datastructures.dataset4dstem import Dataset4dstem
from quantem.diffraction import BraggVectors, StrainMap

torch.set_num_threads(1)
TRANSFORMS = {"none": np.asarray, "sqrt": np.sqrt, "log": np.log1p}


def workflow(patterns, probe, transform="none"):
    """A BraggVectors workflow with the vacuum probe as template; `transform` compresses the counts first."""
    cube = TRANSFORMS[transform](np.asarray(patterns, dtype=np.float32)).astype(np.float32)
    vectors = BraggVectors.from_dataset(Dataset4dstem.from_array(cube))
    template = TRANSFORMS[transform](probe) if transform == "sqrt" else probe
    return vectors.make_template_from_probe(np.ascontiguousarray(template, dtype=np.float32))


def peaks_of(found, shape):
    """A quantem Vector as padded arrays."""
    return padded([found[i, j].numpy() for i in range(shape[0]) for j in range(shape[1])], shape)


def detect(given):
    """Disks of every pattern; `min_relative_intensity` becomes the absolute threshold that quantem knows."""
    options = options_of(given)
    transform = options.pop("transform", "none")
    relative = options.pop("min_relative_intensity", 0.0)
    patterns, shape = given["patterns"], given["patterns"].shape[:2]
    few = workflow(patterns[:1, :4], given["probe"], transform)

    def run(part):
        vectors = workflow(part, given["probe"], transform)
        return vectors.detect_disks(**options, progressbar=False)

    brightest = [few.correlation_map(0, n).max() for n in range(few.dataset.shape[1])]
    options["min_abs_intensity"] = max(
        options.get("min_abs_intensity", 0.0), relative * float(np.median(brightest))
    )
    found, seconds = best_cpu_seconds(
        lambda: run(patterns), given["repeats"], warm_up=lambda: run(patterns[:1, :4])
    )
    return peaks_of(found, shape) | {"cpu_seconds": seconds}


def lattice_strain(given):
    """Strain of given lattices (scan_y, scan_x, 2, 2): rows g1, g2, columns (row, column)."""
    lattice = np.asarray(given["lattice"])
    reference = np.asarray(given["reference"])
    strain = StrainMap(
        lattice[..., 0, :],
        lattice[..., 1, :],
        (*lattice.shape[:2], 1, 1),
        real_space=False,
        g1_ref=reference[0],
        g2_ref=reference[1],
    )
    names = {"rows": "e_rr", "columns": "e_cc", "shear": "e_rc", "theta": "phi"}
    return {name: getattr(strain, theirs).array for name, theirs in names.items()}


def fitted_strain(given):
    """Lattices and strain that quantem fits to given peaks, origin and basis; explicit reference."""
    from quantem.core.datastructures.vector import Vector

    shape = given["qy"].shape[:2]
    stacked = np.stack([given["qy"], given["qx"], given["intensity"]], -1)
    cells = [[c[np.isfinite(c[:, 0])] for c in row] for row in stacked]
    size = tuple(int(n) for n in given["detector_shape"])
    vectors = BraggVectors.from_dataset(Dataset4dstem.from_array(np.zeros((*shape, *size), np.float32)))
    vectors.peaks = Vector.from_data(cells, fields=("q_row", "q_col", "intensity"), name="bragg_peaks")
    vectors.compute_bvm()
    origin, basis = given["origin"], given["basis"]
    vectors.choose_basis_vectors(
        origin=tuple(origin), g1=tuple(basis[0]), g2=tuple(basis[1]), num_candidates=300, plot=False
    )
    vectors.index_peaks(plot=False)
    vectors.fit_lattice(max_peak_shift=float(given["max_peak_spacing"]), plot=False, progressbar=False)
    strain = vectors.calculate_strain_map(
        g1_ref=np.asarray(given["reference"][0]), g2_ref=np.asarray(given["reference"][1])
    )
    names = {"rows": "e_rr", "columns": "e_cc", "shear": "e_rc", "theta": "phi"}
    found = {name: getattr(strain, theirs).array for name, theirs in names.items()}
    return found | {"lattice": np.stack([vectors.g1_array, vectors.g2_array], -2)}


if __name__ == "__main__":
    main({"detect": detect, "lattice_strain": lattice_strain, "fitted_strain": fitted_strain})
