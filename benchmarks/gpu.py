"""One device in one go: right results, patterns per second, a run from Zarr, a profile, memory over time.

    python -m benchmarks.gpu                        # the first GPU; some five minutes
    python -m benchmarks.gpu --device cpu --quick   # the same steps on a CPU, small: its twin for tests

Times are wall times around `torch.cuda.synchronize` on a GPU, CPU times of one thread on a CPU. The roofline
of a GPU is printed beside what was measured: arithmetic of the network, from its layers, over `--tflops`.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.disks import DiskScan, simulate_disks
from fcunet.datacube import DatacubeWriter
from fcunet.kernels.correlation import DiskFinder, centre_probe, make_kernel
from fcunet.kernels.lattice import fit_lattice
from fcunet.kernels.strain import deformation_gradient, strain_from_F
from fcunet.layout import Layout
from fcunet.memory import rss
from fcunet.nn.detect import detect
from fcunet.nn.weights import load_model

RESULTS = Path(__file__).with_name("results")
SIZES = (128, 256, 512, 576)


def make_scan(side: int, size: int, seed: int = 5) -> DiskScan:
    """Patterns of `size` px whose disks scale with it, up to the radius that the network takes unbinned."""
    scale = min(size, 256) / 256
    return simulate_disks(
        (side, side), (size, size), radius_px=9 * scale, spacing_px=30.5 * scale, electrons=1e5, seed=seed
    )


def detectors(scan: DiskScan, device: torch.device, precision: str) -> dict[str, Callable]:
    """Network and correlation for the patterns of a scan, on `device`."""
    probe = centre_probe(scan.probe).to(device)
    radius = float(np.sqrt((scan.probe > 0.5).sum() / np.pi))
    model = load_model("default", device=device, precision=precision)
    with torch.inference_mode():
        prepared = model.prepare(probe[None], probe)
    finder = DiskFinder(
        make_kernel(scan.probe).to(device), min_relative_intensity=0.02, min_peak_spacing=2 * radius,
        edge_boundary=int(radius), sigma_cc=1.0, max_num_peaks=128,
    )  # fmt: skip
    return {
        "network": lambda p: detect(model, p, prepared, edge_boundary=radius),
        "correlation": finder,
        "maps alone": lambda p: model(p, prepared),
    }


def strain_of(scan: DiskScan, peaks) -> np.ndarray:
    """(4, n) strain of peaks against the exact reference."""
    fit = fit_lattice(
        peaks.qy.double().cpu().numpy(), peaks.qx.double().cpu().numpy(), g=scan.g_ref,
        origin=np.array(scan.probe.shape) // 2, sigma=peaks.sigma.double().cpu().numpy(),
    )  # fmt: skip
    strain = strain_from_F(deformation_gradient(fit.g, scan.g_ref))
    return np.stack([strain[k] for k in ("e_xx", "e_yy", "e_xy", "theta")])


def correctness(device: torch.device, precision: str, size: int, side: int) -> dict[str, float]:
    """Strain on `device` in `precision` less strain on the CPU in fp32, rms; 2e-5 is harmless."""
    scan = make_scan(side, size)
    patterns = torch.from_numpy(scan.patterns.reshape(-1, size, size))
    here, there = detectors(scan, torch.device("cpu"), "fp32"), detectors(scan, device, precision)
    out = {}
    with torch.inference_mode():
        for name in ("network", "correlation"):
            a, b = here[name](patterns), there[name](patterns.to(device))
            difference = strain_of(scan, b) - strain_of(scan, a)
            out[f"{name}, strain"] = float(np.sqrt(np.nanmean(difference**2)))
            out[f"{name}, patterns with another number of peaks"] = int((a.n_peaks != b.n_peaks.cpu()).sum())
    return out


def seconds_per_pattern(work: Callable, patterns: torch.Tensor, seconds: float) -> float:
    """Time of one pattern, of the fastest call within `seconds`."""
    cuda = patterns.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    work(patterns)
    best, end = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or not np.isfinite(best):
        if cuda:
            torch.cuda.synchronize()
        start = clock()
        work(patterns)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best / len(patterns)


def throughput(device: torch.device, precision: str, size: int, quick: bool) -> dict[str, float]:
    """Patterns per second of each detector, the batch doubled until it does not help or does not fit."""
    scan = make_scan(2, size)
    patterns = torch.from_numpy(scan.patterns.reshape(-1, size, size)).to(device)
    out: dict[str, float] = {}
    with torch.inference_mode():
        for name, work in detectors(scan, device, precision).items():
            best, n = 0.0, 4
            while n <= (4 if quick else 8 if device.type == "cpu" else 1024):
                batch = patterns.repeat(n // 4, 1, 1)
                try:
                    rate = 1 / seconds_per_pattern(work, batch, 0.1 if quick else 1.0)
                except torch.cuda.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    break
                if rate < 1.02 * best:
                    break
                best, n = rate, 2 * n
            out[name] = best
    return out


def compiled_gain(device: torch.device, precision: str) -> float:
    """How many times faster the maps are with ``torch.compile`` and CUDA graphs; NaN on a CPU."""
    if device.type != "cuda":
        return float("nan")
    scan = make_scan(4, 256)
    patterns = torch.from_numpy(scan.patterns.reshape(-1, 256, 256)).to(device).repeat(8, 1, 1)
    model = load_model("default", device=device, precision=precision)
    probe = centre_probe(scan.probe).to(device)
    with torch.inference_mode():
        prepared = model.prepare(patterns, probe)
        plain = seconds_per_pattern(lambda p: model(p, prepared), patterns, 1.0)
        fast = torch.compile(model, mode="reduce-overhead")
        return plain / seconds_per_pattern(lambda p: fast(p, prepared), patterns, 1.0)


def whole_run(device: torch.device, side: int, size: int) -> dict:
    """Patterns per second of a run, Zarr in, strain out, and its memory."""
    from fcunet import runner
    from fcunet.config import Config

    block = min(32, side)
    with tempfile.TemporaryDirectory() as folder:
        path, layout = Path(folder, "scan.zarr"), Layout((block, block), (max(block // 8, 1),) * 2)
        some = make_scan(min(block, 8), size)
        tiled = np.tile(some.patterns.astype(np.uint16), (block // len(some.patterns),) * 2 + (1, 1))
        with DatacubeWriter(path, (side, side, size, size), np.uint16, layout=layout, attrs={}) as writer:
            for at in writer.blocks:
                writer.write_block(*at, tiled)
            writer.write_variable("probe", some.probe)
        out = Path(folder, "run")
        config = Config.load(store=path, out=out, device=device.type, workers=1)
        runner.run(config, progress=False)
        summary = json.loads((out / "summary.json").read_text())
        return {name: summary[name] for name in ("patterns_per_s", "seconds", "peak_rss_worker")}


def memory_curve(device: torch.device, precision: str, size: int, batches: int) -> list[float]:
    """MiB held after each tenth of `batches` batches: reserved on a GPU, resident on a CPU."""
    scan = make_scan(2, size)
    work = detectors(scan, device, precision)["network"]
    patterns = torch.from_numpy(scan.patterns.reshape(-1, size, size)).to(device)
    curve = []
    with torch.inference_mode():
        for n in range(batches):
            work(patterns)
            if (n + 1) % max(batches // 10, 1) == 0:
                held = torch.cuda.memory_reserved() if device.type == "cuda" else rss()
                curve.append(held / 2**20)
    return curve


def profile(device: torch.device, precision: str, size: int) -> str:
    """The ten operations that take most time."""
    scan = make_scan(2, size)
    work = detectors(scan, device, precision)["network"]
    patterns = torch.from_numpy(scan.patterns.reshape(-1, size, size)).to(device)
    with torch.inference_mode():
        work(patterns)
        with torch.profiler.profile() as profiler:
            work(patterns)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=40)


def operations(size: int, disks: int = 51) -> dict[str, float]:
    """Multiplications and additions of convolutions and linear layers per pattern, counted in the layers."""
    model, counted = load_model("default", device="cpu", precision="fp32"), {"maps": 0.0, "disks": 0.0}
    handles = []

    def count(layer, given, result, part):
        each = layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else layer.in_features
        counted[part] += 2 * each * result.numel()

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            part = "disks" if name.startswith("reader") else "maps"
            handles.append(layer.register_forward_hook(lambda m, g, r, part=part: count(m, g, r, part)))
    scan = make_scan(1, size)
    patterns, probe = torch.from_numpy(scan.patterns[0]), centre_probe(scan.probe)
    with torch.inference_mode():
        model(patterns, probe)
        y = torch.full((1, 128), size / 2.0)  # one group of 128 disks goes through as it is
        model.read_disks(patterns, probe, y, y)
    for handle in handles:
        handle.remove()
    return {"maps": counted["maps"], "disks": counted["disks"] * disks / 128}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument(
        "--tflops", type=float, default=989 * 0.4, help="bf16 within reach; default H200, 40 %%"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args(arguments)
    device, main_size = torch.device(args.device), 256 if 256 in args.sizes else args.sizes[0]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    facts: dict = {"date": datetime.now(UTC).isoformat(timespec="minutes"), "device": name}
    facts |= {"torch": torch.__version__, "precision": args.precision, "load": os.getloadavg()[0]}
    steps: dict[str, Callable] = {
        "strain against CPU fp32": lambda: correctness(
            device, args.precision, main_size, 2 if args.quick else 8
        ),
        "patterns per s": lambda: {s: throughput(device, args.precision, s, args.quick) for s in args.sizes},
        "torch.compile, times": lambda: compiled_gain(device, args.precision),
        "operations per pattern": lambda: {s: operations(s) for s in args.sizes},
        "whole run": lambda: whole_run(device, 4 if args.quick else 64, main_size),
        "memory, MiB": lambda: memory_curve(device, args.precision, main_size, 10 if args.quick else 1000),
        "profile": lambda: profile(device, args.precision, main_size),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for step, work in steps.items():
        facts[step] = work()
        print(f"{step}: {facts[step]}", flush=True)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")  # what is known, should the time run out
    facts["roofline, patterns per s"] = {
        s: args.tflops * 1e12 / sum(v.values()) for s, v in facts["operations per pattern"].items()
    }
    print(f"roofline, patterns per s: {facts['roofline, patterns per s']}")
    args.out.write_text(json.dumps(facts, indent=1) + "\n")
    return facts


if __name__ == "__main__":
    main()
