"""The detectors of the accuracy benchmark, all called alike: counts and a probe in, peaks out.

Non-learned ones are correlations with the vacuum probe through the package's own `find_disks`, so that all
have the same sub-pixel interpolation; they differ in what is done to pattern and template first. Their
settings come from `benchmarks.tune` (``benchmarks/results/tuned.json``).
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcunet.kernels.correlation import centre_probe, find_disks, make_kernel
from fcunet.kernels.peaks import Peaks
from fcunet.nn.decode import decode
from fcunet.nn.detect import detect as run_network
from fcunet.nn.model import disk_radius
from fcunet.nn.weights import load_model

RESULTS = Path(__file__).resolve().parent / "results"
TUNED_FILE = RESULTS / "tuned.json"
BATCH = 8

# what is done to the counts before they are correlated
VARIANTS = {
    "correlation, counts": "none",
    "correlation, square root": "sqrt",
    "correlation, logarithm": "log",
    "correlation, I^0.1": "power",
    "correlation of edges": "edges",
    "radial-gradient template": "ring",
}
DEFAULT_OPTIONS: dict[str, Any] = {
    "min_relative_intensity": 0.03,
    "sigma_cc": 1.0,
    "sigma_dp": 0.0,
    "corr_power": 1.0,
    "kernel": "flat",
    "base": "sqrt",  # of edges and ring: what is done to the counts before the gradient or the template
    "weighting": "sigma",
}
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "sqrt": torch.sqrt,
    "log": torch.log1p,
    "power": lambda x: x.clamp_min(0) ** 0.1,
}


@dataclass(frozen=True)
class Method:
    """A detector and the weights of the lattice fit that suit it; `options` are those of `kind`."""

    name: str
    kind: str  # "network", "correlation" or "peer"
    options: dict[str, Any] = field(default_factory=dict)
    weighting: str = "sigma"

    @property
    def key(self) -> str:
        """Changes when the detections of this method would."""
        facts: dict[str, Any] = {"options": self.options, "kind": self.kind}
        if self.kind == "network":
            facts["sha256"] = _model(self.options["weights"]).info.sha256
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _model(weights: str):
    return load_model(weights, device="cpu")


def find(method: Method, counts: Tensor, probes: Tensor, optics: Tensor) -> tuple[Peaks, float]:
    """Peaks of patterns (n, H, W) and the CPU seconds of detection; probes (n or 1, H, W), optics (n or 1,
    2)."""
    act = {"network": _network, "correlation": _correlation, "peer": _peer}[method.kind]
    return act(method.options, counts, probes, optics)


def _network(options: dict, counts: Tensor, probes: Tensor, optics: Tensor) -> tuple[Peaks, float]:
    model = _model(options["weights"])
    stages = options.get("stages", 2)
    radius = disk_radius(probes.float())
    bins = torch.ceil(radius / model.config.max_radius_px).clamp_min(1).expand(len(counts))
    parts: list[Peaks] = []
    order: list[Tensor] = []
    start = time.process_time()
    with torch.inference_mode():
        for binning in bins.unique():
            rows = (bins == binning).nonzero()[:, 0]
            for some in rows.split(BATCH):
                p = probes[some] if len(probes) > 1 else probes
                if stages == 1:
                    maps = model(counts[some], p)
                    found = decode(maps, threshold=model.config.threshold, max_num_peaks=200)
                else:
                    o = optics[some] if len(optics) > 1 else optics
                    found = run_network(model, counts[some], p, optics=o, max_num_peaks=200)
                parts.append(found)
                order.append(some)
    seconds = time.process_time() - start
    back = torch.cat(order).argsort()
    return Peaks(*(torch.cat(fields)[back] for fields in zip(*parts, strict=True))), seconds


def _correlation(options: dict, counts: Tensor, probes: Tensor, optics: Tensor) -> tuple[Peaks, float]:
    start = time.process_time()
    if len(probes) == 1:
        found = correlate(counts, probes[0], options)
    else:
        parts = [correlate(counts[i : i + 1], probes[i], options) for i in range(len(counts))]
        found = Peaks(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    return found, time.process_time() - start


def correlate(counts: Tensor, probe: Tensor, options: dict) -> Peaks:
    """One non-learned detector; `options` as `DEFAULT_OPTIONS` and ``variant``."""
    options = DEFAULT_OPTIONS | options
    variant, radius = options["variant"], float(disk_radius(probe[None])[0])
    settings = {
        "corr_power": options["corr_power"],
        "sigma_cc": options["sigma_cc"],
        "sigma_dp": options["sigma_dp"],
        "min_relative_intensity": options["min_relative_intensity"],
        "min_peak_spacing": 1.5 * radius,
        "edge_boundary": int(np.ceil(radius)),
        "max_num_peaks": 200,
    }
    if variant in ("none", "sqrt", "log"):
        kernel = make_kernel(probe, kernel=options["kernel"])
        return find_disks(counts, kernel, transform=variant, **settings)
    if variant == "power":
        images, kernel = _FUNCTIONS["power"](counts), make_kernel(probe, kernel=options["kernel"])
    elif variant == "edges":
        images = edges(_FUNCTIONS[options["base"]](counts.clamp_min(0)))
        kernel = make_kernel(edges(centre_probe(probe)[None])[0], kernel="flat")
    else:
        images = _FUNCTIONS[options["base"]](counts.clamp_min(0))
        kernel = ring_kernel(counts.shape[1:], radius)
    # a negative surround may not push the maxima of flat images below zero
    return find_disks(images - images.amin((1, 2), keepdim=True), kernel, **settings)


def edges(images: Tensor) -> Tensor:
    """Modulus of the gradient (n, H, W), Sobel."""
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    padded = torch.nn.functional.pad(images[:, None], (1, 1, 1, 1), mode="replicate")
    gradient = torch.nn.functional.conv2d(padded, torch.stack([across, across.T])[:, None])
    return gradient.square().sum(1).sqrt()


def ring_kernel(shape: tuple[int, int], radius: float) -> Tensor:
    """Template rising linearly from the centre to the rim, with a negative surround, sum 0; centre [0, 0].

    As the radial gradient with background subtraction of LiberTEM-blobfinder: the rim counts, the interior
    does not.
    """
    y, x = (torch.fft.fftfreq(n, 1 / n) for n in shape)
    r = torch.hypot(y[:, None], x)
    inside = (radius + 0.5 - r).clamp(0, 1)
    surround = (1.5 * radius + 0.5 - r).clamp(0, 1) * (1 - inside)
    slope = inside * r / radius
    return slope / slope.sum() - surround / surround.sum()


def _peer(options: dict, counts: Tensor, probes: Tensor, optics: Tensor) -> tuple[Peaks, float]:
    from .peers.detect import detect, settings

    radius = float(disk_radius(probes[:1])[0])
    chosen = settings(options["package"], options["settings"], radius) | options.get("changes", {})
    if "square_size" in chosen:  # pyxem refuses odd ones
        chosen["square_size"] += chosen["square_size"] % 2
    found, seconds = detect(options["package"], counts.numpy()[None], probes[0].numpy(), chosen)
    qy, qx, intensity = (torch.as_tensor(found[k][0], dtype=torch.float32) for k in ("qy", "qx", "intensity"))
    present = torch.isfinite(qy)
    return (
        Peaks(
            qy,
            qx,
            intensity,
            torch.full_like(qy, torch.nan),
            present.sum(1),
            torch.zeros(len(qy), dtype=bool),
            torch.zeros(len(qy)),
            torch.zeros(len(qy)),
        ),
        seconds,
    )


def disk_electrons(counts: Tensor, qy: Tensor, qx: Tensor, radius: float) -> Tensor:
    """Counts within a disk about each peak (n, P) less a local background; NaN without a peak."""
    y, x = (torch.fft.fftfreq(n, 1 / n) for n in counts.shape[1:])
    r = torch.hypot(y[:, None], x)
    disk, ring = (radius + 0.5 - r).clamp(0, 1), ((r > radius + 2) & (r < radius + 4)).float()
    spectrum = torch.fft.rfft2(counts)
    total, around = (
        torch.fft.irfft2(spectrum * torch.fft.rfft2(m).conj(), s=r.shape) for m in (disk, ring / ring.sum())
    )
    net = total - around.clamp_min(0) * disk.sum()
    rows = torch.nan_to_num(qy).round().long().clamp(0, counts.shape[1] - 1)
    columns = torch.nan_to_num(qx).round().long().clamp(0, counts.shape[2] - 1)
    picked = net.flatten(1).gather(1, rows * counts.shape[2] + columns)
    return torch.where(torch.isfinite(qy), picked.clamp_min(1.0), torch.nan)


def fit_weights(method: Method, peaks: Peaks, counts: Tensor, radius: float, edge: float) -> dict[str, Any]:
    """What :func:`strain_errors` takes: `sigma`, `weighting`, `from_scan`, and of networks `dilation_std`.

    Beside what `fit_lattice` offers, ``noise:T`` stands for the Cramer-Rao error of an evenly filled disk
    with the electrons found there, and T px for its texture, added in quadrature.
    """
    if method.kind == "network" and method.weighting == "sigma":
        shared = peaks.dilation_std.numpy()
        return {
            "sigma": peaks.sigma.numpy(),
            "weighting": "sigma",
            "from_scan": True,
            "dilation_std": shared,
        }
    if not method.weighting.startswith("noise"):
        stated = method.weighting == "sigma"
        return {"sigma": peaks.sigma.numpy(), "weighting": method.weighting, "from_scan": stated}
    floor = float(method.weighting.partition(":")[2])
    electrons = disk_electrons(counts, peaks.qy, peaks.qx, radius)
    return {"sigma": (radius * edge / (0.9032 * electrons) + floor**2).sqrt().numpy(), "weighting": "sigma"}


def tuned_methods(dose: float) -> list[Method]:
    """The non-learned detectors with the settings tuned for the nearest dose."""
    if not TUNED_FILE.exists():
        raise FileNotFoundError(f"{TUNED_FILE} is missing; make it with: python -m benchmarks.tune")
    tuned = json.loads(TUNED_FILE.read_text())["methods"]
    out = []
    for name, variant in VARIANTS.items():
        doses = tuned[name]
        nearest = min(doses, key=lambda d: abs(np.log(min(dose, 1e7) / float(d))))
        chosen = dict(doses[nearest]["options"])
        weighting = chosen.pop("weighting")
        out.append(Method(name, "correlation", chosen | {"variant": variant}, weighting))
    return out


def with_weighting(method: Method, weighting: str) -> Method:
    """The same detections, fitted with other weights."""
    return replace(method, weighting=weighting)
