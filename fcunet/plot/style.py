"""What all figures share: colours, sizes, ranges, and how to make one without a window."""

import io
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure as _MatplotlibFigure
from numpy.typing import ArrayLike, NDArray

STRAIN_MAP, ROTATION_MAP, MISSING = "RdBu_r", "PRGn", "0.75"
LABELS = {
    "e_xx": r"$\varepsilon_{xx}$",
    "e_yy": r"$\varepsilon_{yy}$",
    "e_xy": r"$\varepsilon_{xy}$",
    "theta": r"$\theta$",
}
# Okabe and Ito, https://jfly.uni-koeln.de/color/: told apart by all
ORANGE, BLUE, GREEN, PINK, SKY, RED = "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
FRAME_COLOURS = (ORANGE, SKY, GREEN, PINK, BLUE, RED)

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 11,
    "axes.linewidth": 0.6,
    "image.interpolation": "nearest",
    "savefig.dpi": 150,
    "figure.dpi": 110,
    "mathtext.default": "regular",
}
Array = NDArray[np.float64]


class Figure(_MatplotlibFigure):
    """A figure outside pyplot that notebooks show by themselves, and that is saved with nothing cut off."""

    def savefig(self, fname: Any, **options: Any) -> None:
        """As in matplotlib, with ``bbox_inches="tight"`` unless told otherwise."""
        whole: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.06}
        super().savefig(fname, **(whole | options))

    def _repr_png_(self) -> bytes:
        return to_png(self)


def to_png(figure: _MatplotlibFigure, dpi: float = 130) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    return wrapper


def group_of(results: xr.DataTree | xr.Dataset, name: str) -> xr.Dataset:
    """Group `name` of a tree, or the dataset itself."""
    if isinstance(results, xr.DataTree):
        if name not in results.children:
            raise ValueError(f"these results have no group /{name}; they have {', '.join(results.children)}")
        return results[name].dataset
    return results


def need(dataset: xr.Dataset, names: Sequence[str], function: str) -> None:
    missing = [n for n in names if n not in dataset]
    if missing:
        raise ValueError(
            f"plot.{function} needs {', '.join(missing)}, but the dataset has "
            f"{', '.join(map(str, dataset))}; give it the tree of fcunet.open_results(RUN)"
        )


def round_down(value: float) -> float:
    """The largest of 1, 2, 5 times a power of ten not above `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(m for m in (1, 2, 5) if m * power <= value * 1.0001) * power


def round_up(value: float) -> float:
    """A round colour limit not below `value`: halves of a unit from there on, finer below."""
    if value > 0.5:
        return math.ceil(value / 0.5 - 1e-9) * 0.5
    steps = [m * 10.0**p for p in range(-6, 0) for m in (1, 2, 5)]
    return next((s for s in steps if s >= value * 0.999999), 0.5)


def symmetric_limit(arrays: Sequence[ArrayLike], limit: float | None) -> float:
    """Given limit, else the 98th percentile of all magnitudes rounded up; 1 if nothing is finite."""
    if limit is not None:
        if not limit > 0:
            raise ValueError(f"limit is {limit}, but a colour range needs a positive one")
        return float(limit)
    values = np.concatenate([np.abs(np.asarray(a, dtype=float)).ravel() for a in arrays])
    values = values[np.isfinite(values)]
    top = float(np.percentile(values, 98)) if values.size else 0.0
    return round_up(top) if top > 0 else 1.0


def range_of(values: Array, low: float = 1.0, high: float = 99.0) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    a, b = (float(v) for v in np.percentile(finite, [low, high]))
    return (a, b) if b > a else (a - 0.5, a + 0.5)


def say_missing(ax: Axes) -> None:
    ax.text(0.5, 0.5, "no value at any position", transform=ax.transAxes, ha="center", va="center")


def arrow(ax: Axes, start: ArrayLike, tip: ArrayLike, colour: str, width: float) -> None:
    """An arrow between two points (y, x)."""
    (y0, x0), (y1, x1) = (np.asarray(p, dtype=float).tolist() for p in (start, tip))
    look = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (x1, y1), (x0, y0), arrowprops=look)
