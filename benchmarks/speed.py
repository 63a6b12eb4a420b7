"""Detectors, lattice and strain beside other programs: speed and error in one table.

    python -m benchmarks.speed                       # those peers whose environments are there
    python -m benchmarks.peers.environment           # makes them (a few minutes, 3 GB)

The same patterns go to all: 256 x 256 px, disks of 9 px radius, exact truth. CPU seconds of one thread, the
best of several runs, so that a busy machine matters less; detectors of fcunet are timed before and after the
peers, and both times are kept. Peers run with the settings that were tuned for them on other simulated
disks (`benchmarks.peers.detect`). The position error is the rms per axis over the disks that every detector
found, so that none gains by finding bright disks only.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from benchmarks.disks import DiskScan, simulate_disks
from benchmarks.peers.detect import detect as detect_with_peer
from benchmarks.peers.environment import peer_python, run_worker
from fcunet.kernels.correlation import DiskFinder, centre_probe, make_kernel
from fcunet.kernels.lattice import fit_lattice as fit_kernel
from fcunet.kernels.peaks import Peaks
from fcunet.kernels.strain import deformation_gradient, strain_from_F
from fcunet.memory import keep_freed_memory
from fcunet.nn.detect import detect
from fcunet.nn.weights import load_model
from fcunet.pipeline import compute_strain, fit_lattice

RESULTS = Path(__file__).with_name("results")
RADIUS, SPACING, ELECTRONS = 9.0, 30.5, 1e5
# as benchmarks.peers.detect has it for py4DSTEM: the same disks are looked for
OPTIONS = {"min_relative_intensity": 0.02, "min_peak_spacing": 2 * RADIUS, "edge_boundary": int(RADIUS)}
OPTIONS |= {"sigma_cc": 1.0, "max_num_peaks": 200}
OURS: dict[str, dict] = {
    "correlation, upsampled x 16": {},
    "correlation, parabola": {"subpixel": "parabola"},
    "correlation of the logarithm, upsampled x 16": {"transform": "log", "min_relative_intensity": 0.1},
}
PEERS = {
    "py4dstem": ("tuned", "poly", "log"),
    "quantem": ("tuned", "parabolic", "log"),
    "libertem": ("tuned", "fast"),
}
Positions = tuple[np.ndarray, np.ndarray]  # qy, qx (n, peaks), NaN-padded


def cpu_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Least CPU time of one call, after a first one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def fft_pair_seconds(patterns: torch.Tensor) -> float:
    """CPU time of a real FFT and its inverse, per pattern: the floor of any correlation."""
    spectrum = torch.fft.rfft2(patterns)
    forward = cpu_seconds(lambda: torch.fft.rfft2(patterns), 15)
    return (forward + cpu_seconds(lambda: torch.fft.irfft2(spectrum), 15)) / len(patterns)


def our_detectors(scan: DiskScan) -> dict[str, Callable[[torch.Tensor], Peaks]]:
    """Name and detector: correlation, and the network in both precisions."""
    kernel, probe = make_kernel(scan.probe), centre_probe(scan.probe)
    found: dict[str, Callable[[torch.Tensor], Peaks]] = {}
    for name, options in OURS.items():
        found[name] = DiskFinder(kernel, **(OPTIONS | options))
    for precision in ("fp32", "bf16"):
        model = load_model("default", device="cpu", precision=precision)
        prepared = model.prepare(probe[None], probe)

        def infer(patterns, model=model, prepared=prepared):
            parts = [detect(model, p, prepared, edge_boundary=RADIUS) for p in patterns.split(4)]
            return Peaks(*(torch.cat(column) for column in zip(*parts, strict=True)))

        found[f"network, {precision}"] = infer
    return found


def position_errors(truth: np.ndarray, found: dict[str, Positions]) -> dict[str, tuple[float, float]]:
    """Per detector: rms error per axis (px) over the disks that all have found, and share of all disks found.

    `truth` is (n, disks, 2), NaN where a disk is not in the frame.
    """
    errors, hits = {}, {}
    for name, (qy, qx) in found.items():
        difference = np.stack([qy, qx], -1)[:, None] - truth[:, :, None]  # (n, disks, peaks, 2)
        distance = np.where(np.isnan(difference[..., 0]), np.inf, np.hypot(*np.moveaxis(difference, -1, 0)))
        nearest = distance.argmin(-1)
        hits[name] = distance.min(-1) < RADIUS / 2
        errors[name] = np.take_along_axis(difference, nearest[..., None, None], 2)[:, :, 0]
    common = np.logical_and.reduce(list(hits.values()))
    there = np.isfinite(truth[..., 0])
    return {k: (float(np.sqrt((errors[k][common] ** 2).mean())), float(hits[k][there].mean())) for k in found}


def detector_rows(scan: DiskScan, repeats: int) -> list[dict]:
    """One row per detector, ours and theirs."""
    shape = scan.patterns.shape
    patterns = torch.from_numpy(scan.patterns.reshape(-1, *shape[2:]))
    found: dict[str, Positions] = {}
    seconds: dict[str, float] = {}
    timed: dict[str, list[float]] = {}
    ours = our_detectors(scan)

    def time_ours() -> None:
        for name, detector in ours.items():
            some = patterns[:16] if name.startswith("network") else patterns
            one = cpu_seconds(lambda d=detector, p=some: d(p), repeats) / len(some)
            timed.setdefault(name, []).append(one)
            seconds[name] = min(timed[name])

    with torch.inference_mode():
        for name, detector in ours.items():
            peaks = detector(patterns)
            found[name] = (peaks.qy.double().numpy(), peaks.qx.double().numpy())
        time_ours()
        for package, settings in PEERS.items():
            if peer_python(package, install=False) is None:
                continue
            for setting in settings:
                name = f"{package}, {setting}"
                peaks, total = detect_with_peer(package, scan.patterns, scan.probe, setting, repeats=2)
                seconds[name] = total / len(patterns)
                found[name] = tuple(peaks[k].reshape(len(patterns), -1) for k in ("qy", "qx"))
                print(f"{name}: {1 / seconds[name]:.0f} patterns per CPU second", flush=True)
        time_ours()
    errors = position_errors(scan.positions.reshape(len(patterns), -1, 2), found)
    return [
        {
            "name": name,
            "peaks": float(np.isfinite(found[name][0]).sum(1).mean()),
            "ms": 1e3 * seconds[name],
            "rate": 1 / seconds[name],
            "before_and_after_ms": [1e3 * s for s in timed.get(name, [])],
            "error_px": errors[name][0],
            "found": errors[name][1],
        }
        for name in found
    ]


def made_peaks(side: int = 96, noise_px: float = 0.03) -> tuple[xr.Dataset, np.ndarray]:
    """Peaks of a strained lattice with Gaussian errors, and their basis: what follows detection, alone."""
    rng = np.random.default_rng(11)
    basis = SPACING * np.array([[0.15, 1.0], [1.1, -0.1]])
    strain = 0.01 * rng.standard_normal((side, side, 2, 2))
    h, k = (a.ravel() for a in np.mgrid[-3:4, -3:4])
    g = basis @ np.linalg.inv(np.eye(2) + strain)
    places = 128 + np.stack([h, k], -1) @ g
    places += noise_px * rng.standard_normal(places.shape)
    intensity = np.broadcast_to(np.exp(-np.hypot(h, k) / 2), places.shape[:-1]).astype(np.float32)
    dims = ("scan_y", "scan_x", "peak")
    values = {"peak_qy": places[..., 0], "peak_qx": places[..., 1]}
    values |= {"peak_intensity": intensity, "peak_sigma": np.full(intensity.shape, noise_px)}
    arrays = {name: (dims, np.asarray(v, np.float32)) for name, v in values.items()}
    return xr.Dataset(arrays, attrs={"detector_shape": [256, 256]}), basis


def strain_rows(repeats: int) -> list[dict]:
    """Positions per CPU second from peaks to strain maps: index, fit, reference, strain.

    The search for the common lattice, once per scan, is in neither program's time.
    """
    peaks, basis = made_peaks()
    positions = peaks.sizes["scan_y"] * peaks.sizes["scan_x"]

    def ours() -> xr.Dataset:
        return compute_strain(fit_lattice(peaks, basis=basis, origin=(128.0, 128.0)), peaks=peaks).compute()

    rows = [{"name": "fcunet", "rate": positions / cpu_seconds(ours, repeats)}]
    if peer_python("py4dstem", install=False) is not None:
        found = run_worker(
            "py4dstem",
            "py4dstem_worker.py",
            "strain_speed",
            qy=peaks["peak_qy"].values,
            qx=peaks["peak_qx"].values,
            intensity=peaks["peak_intensity"].values,
            detector_shape=[256, 256],
            origin=[128.0, 128.0],
            max_peak_spacing=6.0,
            repeats=3,
        )
        rows.append({"name": "py4dstem", "rate": positions / float(found["cpu_seconds"])})
    return rows


def precision_difference(scan: DiskScan) -> dict[str, float]:
    """Strain in bf16 less strain in fp32, rms over patterns and components, and the error of fp32 itself."""
    shape = scan.patterns.shape
    patterns, strains = torch.from_numpy(scan.patterns.reshape(-1, *shape[2:])), []
    detectors = our_detectors(scan)
    with torch.inference_mode():
        for precision in ("fp32", "bf16"):
            peaks = detectors[f"network, {precision}"](patterns)
            fit = fit_kernel(
                peaks.qy.numpy(), peaks.qx.numpy(), g=scan.g_ref, origin=np.array(shape[2:]) // 2,
                sigma=peaks.sigma.numpy(),
            )  # fmt: skip
            strain = strain_from_F(deformation_gradient(fit.g, scan.g_ref))
            strains.append(np.stack([strain[k] for k in ("e_xx", "e_yy", "e_xy", "theta")]))
    true = strain_from_F(scan.F.reshape(-1, 2, 2)[:, ::1, ::1])
    truth = np.stack([true[k] for k in ("e_xx", "e_yy", "e_xy", "theta")])
    rms = lambda a: float(np.sqrt(np.nanmean(a**2)))  # noqa: E731
    return {"difference": rms(strains[1] - strains[0]), "error": rms(strains[0] - truth)}


def report(facts: dict) -> str:
    """The table in Markdown."""
    lines = [
        f"# Speed, {facts['date']}",
        "",
        f"{facts['machine']}; torch {facts['torch']}, one thread; load {facts['load']:.0f} on "
        f"{facts['cores']} cores. {facts['patterns']} patterns of 256 x 256 px, disk radius {RADIUS:g} px, "
        f"{ELECTRONS:.0e} electrons. "
        f"One real FFT and its inverse: {1e3 * facts['fft_pair_s']:.3f} ms.",
        "",
        "| detector | peaks | ms | patterns per CPU s | position error, px | disks found |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in facts["detectors"]:
        lines.append(
            f"| {r['name']} | {r['peaks']:.1f} | {r['ms']:.2f} | {r['rate']:.0f} | {r['error_px']:.4f} | "
            f"{100 * r['found']:.1f} % |"
        )
    lines += [
        "",
        "| from peaks to strain maps | positions per CPU s | times py4DSTEM |",
        "| --- | --- | --- |",
    ]
    slowest = facts["strain"][-1]["rate"] if len(facts["strain"]) > 1 else float("nan")
    lines += [f"| {r['name']} | {r['rate']:.0f} | {r['rate'] / slowest:.1f} |" for r in facts["strain"]]
    p = facts["precision"]
    lines += [
        "",
        f"Network: strain in bf16 differs from fp32 by {p['difference']:.1e} rms; the error of fp32 on these "
        f"patterns is {p['error']:.1e}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=8, help="positions per side of the scan")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    scan = simulate_disks(
        (args.side, args.side), radius_px=RADIUS, spacing_px=SPACING, electrons=ELECTRONS, seed=3
    )
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "patterns": args.side**2,
        "fft_pair_s": fft_pair_seconds(torch.from_numpy(scan.patterns.reshape(-1, 256, 256)[:8])),
        "detectors": detector_rows(scan, args.repeats),
        "strain": strain_rows(args.repeats),
        "precision": precision_difference(scan),
    }
    print(report(facts))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "speed.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.out / "speed.md").write_text(report(facts))


if __name__ == "__main__":
    main()
