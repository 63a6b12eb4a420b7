"""What each part of the packaged network contributes: parts switched off, nothing trained again.

    python -m benchmarks.ablation

Strain on the multislice scans of `benchmarks.accuracy` and |V_g| on held-out prototypes, once with everything
and once without each part; and how far the second stage believes the first. A network trained without a part
would make better use of the rest, so these are upper limits of what the part is worth. Writes
``benchmarks/results/ablation.md``.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fcunet.kernels.peaks import Peaks
from fcunet.nn.decode import decode
from fcunet.nn.detect import detect
from fcunet.nn.model import FCUNet
from fcunet.nn.weights import load_model
from fcunet.training.evaluate import surviving_dilation

from .accuracy import INF, scans_of
from .accuracy_data import prototype_batches
from .accuracy_methods import RESULTS
from .accuracy_report import ABTEM
from .accuracy_scores import COMPONENTS, Strain, peak_figures, slope, strain_errors

Detector = Callable[[FCUNet, Tensor, Tensor, Tensor], Peaks]


def complete(model: FCUNet, patterns: Tensor, probes: Tensor, optics: Tensor) -> Peaks:
    """As shipped."""
    return detect(model, patterns, probes, optics=optics, max_num_peaks=200)


def without_optics(model: FCUNet, patterns: Tensor, probes: Tensor, optics: Tensor) -> Peaks:
    """Beam energy and aperture unknown."""
    return detect(model, patterns, probes, max_num_peaks=200)


def first_stage(model: FCUNet, patterns: Tensor, probes: Tensor, optics: Tensor) -> Peaks:
    """The maps alone."""
    return decode(model(patterns, probes), threshold=model.config.threshold, max_num_peaks=200)


def without_offsets(model: FCUNet, patterns: Tensor, probes: Tensor, optics: Tensor) -> Peaks:
    """The maps alone, positions from the maxima of the Bragg map as one would read any image."""
    maps = model(patterns, probes)
    log_map = maps.bragg_map.clamp_min(1e-6).log()
    offset = torch.zeros_like(maps.offset)
    for axis, dim in ((0, 1), (1, 2)):  # a parabola through the logarithm is exact for a Gaussian spot
        before, after = torch.roll(log_map, 1, dim), torch.roll(log_map, -1, dim)
        bend = (2 * log_map - before - after).clamp_min(1e-3)
        offset[:, axis] = ((after - before) / (2 * bend)).clamp(-0.5, 0.5) * maps.stride
    return decode(maps._replace(offset=offset), threshold=model.config.threshold, max_num_peaks=200)


def disks_alone(model: FCUNet, patterns: Tensor, probes: Tensor, optics: Tensor) -> Peaks:
    """The second stage, every disk read as if it were the only one of its pattern."""
    found = first_stage(model, patterns, probes, optics)
    y, x, sigma, intensity = (t.clone() for t in (found.qy, found.qx, found.sigma, found.intensity))
    probes = probes.expand(len(patterns), -1, -1)
    for i in range(len(patterns)):
        there = torch.isfinite(found.qy[i])
        n = int(there.sum())
        one = patterns[i : i + 1].expand(n, -1, -1)
        reading = model.read_disks(
            one, probes[i : i + 1].expand(n, -1, -1), found.qy[i, there][:, None], found.qx[i, there][:, None]
        )
        y[i, there] += reading.offset[:, 0, 0]
        x[i, there] += reading.offset[:, 0, 1]
        sigma[i, there] = reading.log_sigma[:, 0].exp()
        intensity[i, there] = 4 * reading.root_amplitude[:, 0].clamp_min(0).square()
    return found._replace(qy=y, qx=x, sigma=sigma, intensity=intensity)


PARTS: dict[str, Detector] = {
    "everything": complete,
    "beam energy and aperture not told": without_optics,
    "each disk read alone": disks_alone,
    "first stage alone": first_stage,
    "first stage, offset head unused": without_offsets,
}
AMPLITUDES = ("everything", "beam energy and aperture not told", "each disk read alone")


def in_batches(find: Detector, model: FCUNet, patterns: Tensor, probes: Tensor, optics: Tensor) -> Peaks:
    """Eight patterns at a time."""
    with torch.inference_mode():
        parts = [find(model, some, probes, optics) for some in patterns.split(8)]
    return Peaks(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def strain_rows(model: FCUNet, doses: tuple[float, ...]) -> list[str]:
    """Lines of Markdown: rms of the four components, by dose, for both crystals together."""
    lines = []
    scans = [s for data in ABTEM for s in scans_of(data)]
    for name, find in PARTS.items():
        cells = [name]
        for dose in doses:
            parts = []
            for scan in scans:
                optics = torch.tensor([[scan.energy_keV, scan.aperture]])
                counts = torch.as_tensor(scan.counts(dose))
                peaks = in_batches(find, model, counts, torch.as_tensor(scan.probe)[None], optics)
                parts.append(strain_errors(scan, peaks, peaks.sigma.numpy(), "sigma", from_scan=True))
            figures = Strain.concatenate(parts).figures()
            cells.append(" / ".join(f"{1e3 * figures[c]['rms']:.2f}" for c in COMPONENTS))
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def amplitude_rows(model: FCUNet, dose: float) -> list[str]:
    """Lines of Markdown: |V_g| of prototypes of the training, for comparison, and of those held out."""
    lines = []
    for name, split in (("everything", "train"), *((name, "test") for name in AMPLITUDES)):
        # one binning per batch: what needs more is left out here
        batches = [b for b in prototype_batches(dose, split=split) if float(b.radius.max()) < 12.5]
        with torch.inference_mode():
            found = [PARTS[name](model, b.pattern, b.probe, b.optics) for b in batches]
        p = peak_figures(found, batches)
        name += ", on prototypes of the training" if split == "train" else ""
        values = (p["R"], p["R_scaled"], p["R_allowed"], p["R_scaled_allowed"], p["forbidden_ratio"])
        lines.append("| " + " | ".join([name, *(f"{v:.2f}" for v in values)]) + " |")
        print(lines[-1], flush=True)
    controls = (p["R_blind"], p["R_blind_allowed"], p["R_sqrt_I"], p["R_sqrt_I_allowed"])
    lines.append(f"| smooth fall-off, best scale per pattern | | {controls[0]:.2f} | | {controls[1]:.2f} | |")
    lines.append(
        f"| sqrt(I), best scale per pattern | | {controls[2]:.2f} | | {controls[3]:.2f} "
        f"| {p['forbidden_ratio_sqrt_I']:.2f} |"
    )
    return lines


def dilation_rows(model: FCUNet, doses: tuple[float, ...]) -> list[str]:
    """Lines of Markdown: what the second stage leaves of a dilation of the positions it is given."""
    cells = []
    for dose in doses:
        batches = [b for b in prototype_batches(dose) if float(b.radius.max()) < 12.5]
        share = torch.cat([surviving_dilation(model, b) for b in batches])
        cells.append(f"{float(share.nanmedian()):.2f}")
    lines = [f"| share that stays, median | {' | '.join(cells)} |"]
    print(lines[0], flush=True)
    return lines


def slope_rows(model: FCUNet, doses: tuple[float, ...], draws: int = 8) -> list[str]:
    """Lines of Markdown: slope over several draws of the electrons, and its standard deviation.

    That is over the choice of patterns (bootstrap): electrons average out, crystals, tilts and thicknesses do
    not.
    """
    lines, rng = [], np.random.default_rng(0)
    for data in ABTEM:
        for dose in doses:
            cells = [data, f"{dose:.0e}".replace("e+0", "e")]
            parts = []
            for scan in scans_of(data):
                optics = torch.tensor([[scan.energy_keV, scan.aperture]])
                for draw in range(1, draws + 1):
                    counts = torch.as_tensor(scan.counts(dose, draw))
                    peaks = in_batches(complete, model, counts, torch.as_tensor(scan.probe)[None], optics)
                    parts.append(strain_errors(scan, peaks, peaks.sigma.numpy(), "sigma", from_scan=True))
            n = len(parts[0].truth)
            error, truth = (
                np.stack([getattr(p, k) for p in parts]).reshape(-1, n, 4) for k in ("error", "truth")
            )
            mean = np.nanmean(error, axis=0)
            picks = rng.integers(n, size=(300, n))
            for c in range(4):
                spread = np.std([slope(truth[0, p, c], mean[p, c]) for p in picks])
                cells.append(f"{slope(truth[0, :, c], mean[:, c]):.3f} ({spread:.3f})")
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default="default")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    try:
        model = load_model(options.weights, device="cpu")
    except (FileNotFoundError, ValueError) as err:
        parser.error(str(err))
    if not isinstance(model, FCUNet) or model.reader is None:
        parser.error(f"weights {options.weights!r} have no second stage: there is nothing to switch off")
    doses = (INF, 1e5, 1e4)
    text = [
        "# Parts switched off",
        "",
        f"`python -m benchmarks.ablation`, weights {model.info.sha256[:12]}. Strain rms in 1e-3, e_xx / e_yy",
        "/ e_xy / theta, Si [110] and SnO2 [001] together (10 to 40 nm, mistilt to 6 mrad); nothing was",
        "trained again.",
        "",
        "| | no noise | 1e5 electrons | 1e4 electrons |",
        "|---|---|---|---|",
        *strain_rows(model, doses),
        "",
        "|V_g| of held-out prototypes, 1e6 electrons: R factor in volts and with the best scale per pattern.",
        "",
        "| | R | R, scaled | R, allowed sites | R, allowed, scaled | forbidden / allowed |",
        "|---|---|---|---|---|---|",
        *amplitude_rows(model, 1e6),
        "",
        "True positions of held-out prototypes, all moved outwards or inwards by 3e-3 of their distance from",
        "the direct beam, and read by the second stage:",
        "",
        "| | 1e7 electrons | 1e6 | 1e5 | 1e4 |",
        "|---|---|---|---|---|",
        *dilation_rows(model, (1e7, 1e6, 1e5, 1e4)),
        "",
        "Slope of found against true strain over eight draws of the electrons, so that they matter less than",
        "in one, and its standard deviation over the choice of patterns:",
        "",
        "| | electrons | e_xx | e_yy | e_xy | theta |",
        "|---|---|---|---|---|---|",
        *slope_rows(model, (1e5, 1e4)),
    ]
    options.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
