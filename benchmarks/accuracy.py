"""Strain from multislice patterns against its exact truth, for each detector, through `convert` and `run`.

    python -m benchmarks.abtem_scan runs/abtem            # once; needs the extra fcunet[validation]
    python -m benchmarks.accuracy runs/abtem --out benchmarks/results/abtem.json

The patterns come from an independent code (abTEM) and a crystal whose whole prototype no network was
trained on. Poisson noise is added here with a fixed seed for every dose; ``inf`` keeps the patterns
without noise. The reference is exact: the in-plane reciprocal vectors of the undeformed crystal, so
errors that the whole scan has in common count. Rows of the scan differ in thickness and mistilt, columns
in deformation. The bound is that of Cramer and Rao for evenly filled disks with the same electrons
(`benchmarks.bounds`).
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import numpy as np
import xarray as xr
from scipy.ndimage import gaussian_filter

from fcunet.cluster import connect
from fcunet.config import Config
from fcunet.convert import convert
from fcunet.pipeline import compare_with_truth, compute_strain
from fcunet.runner import run
from fcunet.schema import SCAN_DIMS, STRAIN_COMPONENTS
from fcunet.simulation.crystals import load_crystal
from fcunet.simulation.scattering import zone_rotation
from fcunet.store import open_datacube, open_peaks

from .bounds import strain_bound

METHODS: dict[str, dict] = {
    "FCU-Net": {"method": "fcunet"},
    "correlation, counts": {"method": "correlation", "transform": "none", "min_relative_intensity": 0.001},
    "correlation, sqrt": {"method": "correlation", "transform": "sqrt", "min_relative_intensity": 0.01},
    "correlation, log": {"method": "correlation", "transform": "log"},
}
NOISE_FREE_ELECTRONS = 1e9  # scale of the patterns kept without noise


def in_plane_vectors(meta: dict) -> np.ndarray:
    """Reciprocal vectors (n, 2) of the undeformed crystal that lie in the zone, (y, x) in px."""
    crystal = load_crystal(meta["crystal"])
    rotation = zone_rotation(crystal, tuple(meta["zone"]))
    cell = np.linalg.inv(crystal.primitive_cell).T @ rotation.T
    n = np.arange(-8, 9)
    g = np.stack(np.meshgrid(n, n, n, indexing="ij"), -1).reshape(-1, 3) @ cell
    flat = g[(np.abs(g[:, 2]) < 1e-6) & (np.hypot(g[:, 0], g[:, 1]) < 2)]
    return flat[:, [1, 0]] / meta["q_pixel"]


def exact_reference(lattice: xr.Dataset, vectors: np.ndarray) -> np.ndarray:
    """The exact vectors nearest to the median measured basis, (2, 2)."""
    found = [[float(np.nanmedian(lattice[f"g{i}_q{a}"])) for a in "yx"] for i in (1, 2)]
    return np.array([vectors[np.hypot(*(vectors - g).T).argmin()] for g in found])


def blurred(frames: np.ndarray, psf_px: float, background: float) -> np.ndarray:
    """Frames (..., qy, qx) with a Gaussian point spread and a share of their intensity as a broad hump.

    The hump is a Gaussian about the middle, a third of the frame wide: thermal diffuse scattering.
    """
    if psf_px:
        axes = (frames.ndim - 2, frames.ndim - 1)
        frames = gaussian_filter(frames, psf_px, axes=axes, mode="constant", truncate=6)
    if background:
        height, width = frames.shape[-2:]
        y, x = np.ogrid[:height, :width]
        hump = np.exp(-0.5 * (((y - height // 2) ** 2 + (x - width // 2) ** 2) / (width / 3) ** 2))
        total = frames.sum(axis=(-2, -1), keepdims=True)
        frames = (1 - background) * frames + background * total * hump / hump.sum()
    return frames.astype(np.float32)


def noisy(scan: np.ndarray, dose: float, seed: int) -> np.ndarray:
    """Counts at `dose` electrons per pattern; without noise for an infinite dose."""
    if np.isinf(dose):
        return scan * np.float32(NOISE_FREE_ELECTRONS)
    return np.random.default_rng(seed).poisson(scan * dose).clip(max=65535).astype(np.uint16)


def bound(scan: np.ndarray, vectors: np.ndarray, meta: dict, dose: float) -> dict[str, float]:
    """Root mean square over the scan of the Cramer-Rao bound, from the electrons found under each disk."""
    radius = meta["convergence_semiangle_mrad"] * 1e-3 / wavelength(meta["beam_energy_keV"]) / meta["q_pixel"]
    shape = np.array(scan.shape[2:])
    centre = np.array(meta["origin_px"], float)
    y, x = np.mgrid[: shape[0], : shape[1]]
    inside = (np.abs(vectors) < shape / 2 - radius - 1).all(1)
    disks = np.stack([np.hypot(y - cy, x - cx) <= radius + 1 for cy, cx in vectors[inside] + centre])
    electrons = np.einsum("abyx,dyx->abd", scan, disks, optimize=True) * (1e7 if np.isinf(dose) else dose)
    each = [strain_bound(vectors[inside], n, radius, 0.5) for n in electrons.reshape(-1, disks.shape[0])]
    return {c: float(np.sqrt(np.mean([b[c] ** 2 for b in each]))) for c in STRAIN_COMPONENTS}


def wavelength(energy_keV: float) -> float:
    """Relativistic electron wavelength, angstrom."""
    return 12.2643 / np.sqrt(energy_keV * 1e3 * (1 + 0.97845e-6 * energy_keV * 1e3))


def evaluate(
    folder: Path,
    doses: list[float],
    work: Path,
    methods: list[str],
    *,
    psf_px: float = 0.0,
    background: float = 0.0,
) -> list[dict]:
    """One row per dose and method."""
    meta = json.loads((folder / "meta.json").read_text())
    scan, truth = np.load(folder / "scan.npy"), np.load(folder / "truth.npz")
    scan = blurred(scan, psf_px, background)
    probe = work / "probe.npy"
    np.save(probe, blurred(np.load(folder / "probe.npy"), psf_px, 0.0))
    known = xr.Dataset({c: (SCAN_DIMS, truth[c]) for c in STRAIN_COMPONENTS}, attrs={"frame": "scan"})
    vectors = in_plane_vectors(meta)
    rows = []
    with connect(workers=1, dashboard_address="127.0.0.1:0") as client:
        for dose in doses:
            name = f"{dose:g}"
            array = work / f"scan_{name}.npy"
            store = work / f"scan_{name}.zarr"
            if not store.exists():
                np.save(array, noisy(scan, dose, seed=20261121))
                convert(
                    array,
                    store,
                    q_pixel=meta["q_pixel"],
                    beam_energy_keV=meta["beam_energy_keV"],
                    convergence_semiangle_mrad=meta["convergence_semiangle_mrad"],
                    scan_rotation_degree=0.0,
                    probe=probe,
                    progress=False,
                )
                array.unlink()
            limit = bound(scan, vectors, meta, dose)
            for label in methods:
                out = work / f"run_{name}_{label.replace(', ', '_')}"
                config = Config.load(store=store, out=out, **METHODS[label])
                tree = run(config, client=client, progress=False)
                lattice = tree["lattice"].to_dataset().load()
                strain = compute_strain(lattice, reference=exact_reference(lattice, vectors))
                errors = compare_with_truth(strain, known)
                peaks = open_peaks(out / "peaks.zarr")
                rows.append(
                    {
                        "dose": None if np.isinf(dose) else dose,
                        "method": label,
                        "peaks": float(peaks["n_peaks"].mean()),
                        "lattices": int(strain["valid"].sum()),
                        "positions": int(strain["valid"].size),
                        "errors": errors,
                        "bound": None if np.isinf(dose) else limit,
                    }
                )
                print(as_line(rows[-1]), flush=True)
            with open_datacube(store) as datacube:
                assert datacube["intensity"].shape == scan.shape
    return rows


HEADER = (
    f"{'dose':>6} {'method':22} {'peaks':>5} {'e_xx':>6} {'e_yy':>6} {'e_xy':>6} {'theta':>6}   "
    f"{'bias xx':>7} {'bias yy':>7} {'slope xx':>8} {'in 1 s':>6} {'in 2 s':>6} {'/bound':>6}"
)


def as_line(row: dict) -> str:
    """One row of the table: rms errors and biases in 1e-3."""
    e = row["errors"]
    rms = " ".join(f"{1e3 * e[c]['rms']:6.2f}" for c in STRAIN_COMPONENTS)
    within = [np.mean([e[c][k] for c in STRAIN_COMPONENTS]) for k in ("within_1", "within_2")]
    ratio = f"{e['e_xx']['rms'] / row['bound']['e_xx']:6.1f}" if row["bound"] else f"{'':>6}"
    dose = f"{row['dose']:g}" if row["dose"] else "inf"
    return (
        f"{dose:>6} {row['method']:22} {row['peaks']:5.0f} {rms}   {1e3 * e['e_xx']['bias']:+7.2f} "
        f"{1e3 * e['e_yy']['bias']:+7.2f} {e['e_xx']['slope']:8.3f} {within[0]:6.2f} {within[1]:6.2f} {ratio}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what benchmarks.abtem_scan wrote")
    parser.add_argument("--dose", default="inf,1e6,1e5,1e4", help="electrons per pattern, with commas")
    parser.add_argument("--methods", default=";".join(METHODS), help="which, with semicolons")
    parser.add_argument("--psf", type=float, default=0.0, help="Gaussian point spread of the detector, px")
    parser.add_argument("--background", type=float, default=0.0, help="share of the electrons, 0 to 1")
    parser.add_argument("--work", type=Path, help="stores and runs [FOLDER/runs]")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if not (options.folder / "meta.json").is_file():
        parser.error(
            f"{options.folder} holds no scan; make one: python -m benchmarks.abtem_scan {options.folder}"
        )
    name = f"runs_psf{options.psf:g}_background{options.background:g}"
    work = options.work or options.folder / (name if options.psf or options.background else "runs")
    work.mkdir(parents=True, exist_ok=True)
    print("rms errors and biases x 1e-3; in 1 s, in 2 s: share of true values inside 1 and 2 error bars")
    print(HEADER)
    rows = evaluate(
        options.folder,
        [float(d) for d in options.dose.split(",")],
        work,
        options.methods.split(";"),
        psf_px=options.psf,
        background=options.background,
    )
    if options.out:
        facts = {
            "command": f"python -m benchmarks.accuracy {options.folder.name} --dose {options.dose}"
            + f" --psf {options.psf:g} --background {options.background:g}",
            "data": json.loads((options.folder / "meta.json").read_text()),
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {platform.system()}",
        }
        options.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
