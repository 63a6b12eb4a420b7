"""Patterns per CPU second of the correlation detector, one thread.

    python -m benchmarks.speed

CPU seconds rather than wall seconds, so that a busy machine matters less; the best of five runs. py4DSTEM is
timed on the same patterns if its environment is there (`benchmarks.peers.py4dstem_agreement` makes it).
"""

import argparse
import json
import time

import torch

from benchmarks.disks import simulate_disks
from benchmarks.peers.environment import peer_python, run_worker
from benchmarks.peers.py4dstem_agreement import to_py4dstem
from fcunet.kernels.correlation import find_disks, make_kernel

OPTIONS = {"min_relative_intensity": 0.005, "min_peak_spacing": 18.0, "edge_boundary": 12, "sigma_cc": 1.0}
OPTIONS |= {"max_num_peaks": 100}
VARIANTS = [
    {"subpixel": "pixel"},
    {"subpixel": "parabola"},
    {"subpixel": "upsampled"},
    {"subpixel": "upsampled", "transform": "log"},
    {"subpixel": "upsampled", "corr_power": 0.8},
]


def cpu_seconds(work, repeats: int = 5) -> float:
    """Least CPU time of one call, after a first one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, batches of {args.patterns}")
    print(f"{'size':>5} {'method':32} {'peaks':>6} {'ms':>7} {'patterns/s':>10} {'py4DSTEM':>9} {'ratio':>6}")
    for size in args.sizes:
        scale = size / 256
        scan = simulate_disks(
            (8, 8), (size, size), radius_px=9 * scale, spacing_px=30.5 * scale, electrons=1e5
        )
        kernel = make_kernel(scan.probe)
        patterns = torch.from_numpy(scan.patterns.reshape(-1, size, size))
        patterns = patterns.repeat(-(-args.patterns // len(patterns)), 1, 1)[: args.patterns].contiguous()
        spectrum = torch.fft.rfft2(patterns[:8])
        pair = cpu_seconds(lambda p=patterns[:8]: torch.fft.rfft2(p)) / 8
        pair += cpu_seconds(lambda s=spectrum: torch.fft.irfft2(s)) / 8
        print(f"{size:5} {'forward and inverse FFT alone':32} {'':6} {pair * 1e3:7.3f} {1 / pair:10.0f}")
        options = [
            OPTIONS | {"min_peak_spacing": 18 * scale, "edge_boundary": int(12 * scale)} | v for v in VARIANTS
        ]
        ours = [cpu_seconds(lambda o=o, p=patterns, k=kernel: find_disks(p, k, **o)) for o in options]
        theirs = _py4dstem(scan.patterns, kernel, options)
        for option, variant, seconds, other in zip(options, VARIANTS, ours, theirs, strict=True):
            n_peaks = find_disks(patterns, kernel, **option).n_peaks.double().mean()
            rate = args.patterns / seconds
            name = ", ".join(str(v) if k == "subpixel" else f"{k} {v}" for k, v in variant.items())
            line = f"{size:5} {name:32} {n_peaks:6.1f} {1e3 / rate:7.3f} {rate:10.0f}"
            print(line + (f" {other:9.0f} {rate / other:6.1f}" if other else ""), flush=True)


def _py4dstem(patterns, kernel, options) -> list[float | None]:
    """Patterns per CPU second of py4DSTEM for each set of options; None without its environment."""
    if peer_python("py4dstem", install=False) is None:
        return [None] * len(options)
    some = patterns[:2]
    given = {
        "patterns": some,
        "kernel": kernel.numpy(),
        "options": json.dumps([to_py4dstem(o) for o in options]),
    }
    found = run_worker("py4dstem", "py4dstem_worker.py", "speed", **given)
    return [some.shape[0] * some.shape[1] / float(found[f"cpu_{n}"]) for n in range(len(options))]


if __name__ == "__main__":
    main()
