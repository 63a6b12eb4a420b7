"""What another method makes of the same scan, and what is unlike the training of the network."""

from collections.abc import Iterable

import numpy as np

from .. import plot
from ..nn.range import MEANINGS
from .page import paragraph, picture
from .source import Run

_UNLIKE = 1.2  # twice the spread that chance gives `residual_ratio` of some 30 disks


def second_opinion(run: Run) -> Iterable[str]:
    """Numbers and a map of the disagreement; nothing for a run without a second opinion."""
    if "second" not in run.tree.children:
        return
    attrs = run.tree["second"].attrs
    method, positions = attrs.get("method", "another method"), attrs.get("positions", 0)
    if not positions:
        yield paragraph(f"Second opinion: {method} finds no lattice where this method does.", "note")
        return
    words = (
        f"Second opinion: strain from {method}, found independently, is "
        f"{1e3 * attrs['disagreement_rms']:.2f} x 1e-3 (rms) from this one over {positions:,} positions"
    )
    share = attrs.get("disagreement_share")
    if share is not None:
        words += (
            f", median {attrs['disagreement_sigma_median']:.1f} error bars of both; {100 * share:.1f} % of "
            "the positions are more than 3 apart. Where both are right, that is about 1, and below 1 %"
        )
    means = attrs.get("difference_mean", {})
    words += ". Mean difference: " + ", ".join(f"{c} {1e3 * v:+.2f} x 1e-3" for c, v in means.items()) + "."
    yield paragraph(words, "note" if share is not None and share > 0.1 else "")
    yield picture(
        "Where the two methods disagree",
        lambda **how: plot.disagreement(run.tree, **how),
        keep=run.folder / "disagreement.png",
    )


def residuals(run: Run) -> Iterable[str]:
    """What the residuals of the scan say of the errors of its peaks."""
    words = []
    factors = np.atleast_1d(run.lattice.attrs.get("sigma_factor", []))
    if factors.size:
        words.append(
            f"The peaks scatter by {factors[0]:.2f} (the surest) to {factors[-1]:.2f} (the least sure) times "
            "what the detector states; weights and error bars are corrected by that."
        )
    ratio = run.strain["residual_ratio"].values if "residual_ratio" in run.strain else np.empty(0)
    ratio = ratio[np.isfinite(ratio)]
    if ratio.size:
        words.append(
            f"About the disks of the reference they scatter {np.median(ratio):.2f} times as much as about "
            "their own lattice (median of residual_ratio); what is alike in both is not in the error bars. "
            f"{100 * (ratio > _UNLIKE).mean():.0f} % of the positions are unlike the reference "
            f"(above {_UNLIKE:g})."
        )
    if words:
        yield paragraph(" ".join(words), "small")


def systematic(run: Run) -> Iterable[str]:
    """The part of the error that all positions share, as far as calibration tells."""
    names = {"ellipse": "distortion", "descan": "beam centre", "pixel": "pixel size"}
    found = {words: run.strain.attrs.get(f"systematic_{name}") for name, words in names.items()}
    parts = [f"{words} {1e3 * value:.2g} x 1e-3" for words, value in found.items() if value is not None]
    if parts:
        yield paragraph(
            "Systematic part of the strain, not in the error bars: " + ", ".join(parts) + ".", "small"
        )


def doubts_of_method(run: Run) -> Iterable[str]:
    """Patterns unlike those of training, and positions taken from the second method."""
    if "outside_training" in run.strain:
        outside = run.strain["outside_training"].values
        for bit, meaning in MEANINGS.items():
            if (some := float((outside & bit > 0).mean())) > 0.01:
                yield (
                    f"{100 * some:.0f} % of the patterns are unlike those the network was trained on "
                    f"({meaning.replace('_', ' ')}): ask another method, --second-opinion correlation, and "
                    "take its answer there with --fall-back."
                )
    if "source" in run.strain and (some := float((run.strain["source"].values == 2).mean())) > 0:
        yield f"{100 * some:.1f} % of the positions are those of the second method (variable 'source')."
