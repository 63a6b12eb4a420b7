"""What all figures share: colours, sizes, ranges, and how to make one without a window."""

import inspect
import io
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure as _MatplotlibFigure
from numpy.typing import ArrayLike, NDArray

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
    "axes.titlesize": "medium",
    "axes.labelsize": "medium",
    "xtick.labelsize": "small",
    "ytick.labelsize": "small",
    "legend.fontsize": "small",
    "figure.titlesize": "large",
    "axes.linewidth": 0.6,
    "image.interpolation": "nearest",
    "savefig.dpi": 150,
    "figure.dpi": 110,
    "mathtext.default": "regular",
    "svg.fonttype": "none",  # letters stay letters, to be edited in a drawing program
    "svg.hashsalt": "fcunet",  # the same figure is the same file
    "pdf.fonttype": 42,
}
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Theme:
    """Colours that depend on the ground: diverging maps are palest, or darkest, at zero."""

    strain: str
    rotation: str
    missing: str
    ink: str
    faint: str
    ground: str
    line: str

    @property
    def settings(self) -> dict[Any, Any]:
        """For matplotlib."""
        inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        grounds = ("figure.facecolor", "axes.facecolor")
        return dict.fromkeys(inks, self.ink) | dict.fromkeys(grounds, self.ground)


# the dark diverging maps are by F. Crameri, https://doi.org/10.5281/zenodo.1243862
THEMES = {
    "light": Theme("RdBu_r", "PRGn", "0.75", "black", "0.6", "white", "#0072B2"),
    "dark": Theme("berlin", "vanimo", "0.42", "0.92", "0.55", "#14161a", "#56B4E9"),
}
# width and height not to be exceeded (inches), and the size of letters (points)
SIZES = {"column": (3.35, 9.0, 6.5), "page": (7.1, 9.0, 8.0), "slide": (12.3, 6.7, 15.0)}
_THEME: ContextVar[str] = ContextVar("theme", default="light")
_SIZE: ContextVar[str | None] = ContextVar("size", default=None)


def theme() -> Theme:
    """Colours of the figure that is being drawn."""
    return THEMES[_THEME.get()]


class Figure(_MatplotlibFigure):
    """A figure outside pyplot that notebooks show by themselves, and that is saved with nothing cut off."""

    exact = False  # a figure made for a column keeps its width

    def savefig(self, fname: Any, **options: Any) -> None:
        """As in matplotlib, PNG, SVG or PDF by the name; ``bbox_inches="tight"`` unless told otherwise."""
        whole: dict[str, Any] = {} if self.exact else {"bbox_inches": "tight", "pad_inches": 0.06}
        if self.exact:
            whole["dpi"] = 300
        with mpl.rc_context(STYLE):
            super().savefig(fname, **(whole | options))

    def _repr_png_(self) -> bytes:
        return to_png(self)


def to_png(figure: _MatplotlibFigure, dpi: float = 130) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def scale_of(width: float, height: float = 1.0) -> float:
    """By how much a figure of so many inches is enlarged to the size asked for."""
    size = _SIZE.get()
    return 1.0 if size is None else min(SIZES[size][0] / width, SIZES[size][1] / height)


def letter_points(factor: float) -> float:
    """Size of the letters in a figure that is enlarged by `factor`."""
    size = _SIZE.get()
    if size is None:
        return float(STYLE["font.size"])
    return SIZES[size][2] if size != "slide" else min(SIZES[size][2], max(10.0, 1.15 * 9 * factor))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, or of the size asked for in about the same proportion."""
    size = _SIZE.get()
    if size == "column" and width > 9:
        raise ValueError(
            f"this figure needs {2.54 * width:.0f} cm and cannot be read in a column of 85 mm; "
            'use size="page", or fewer components'
        )
    factor = scale_of(width, height)
    points = letter_points(factor)
    larger = max(0.0, points / 9 / factor - 1)  # letters shrink less than maps, and need room
    mpl.rcParams["font.size"] = points  # inside the context of `styled`
    figure = Figure(figsize=(width * factor, height * factor * (1 + 0.3 * larger)), layout="constrained")
    figure.exact = size is not None
    return figure


def in_column() -> bool:
    """A journal column is drawn for: panels go below each other."""
    return _SIZE.get() == "column"


_MORE = """
    theme : {"light", "dark"}
        Colours for paper or for a dark slide.
    size : {"column", "page", "slide"}, optional
        Width of a journal column (85 mm) or page (180 mm), or fit for a slide, with letters to match; saved
        exactly so wide. Default: as large as it needs.
"""


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with the settings of the house; adds the options `theme` and `size`."""

    @wraps(function)
    def wrapper(*args: Any, theme: str = "light", size: str | None = None, **kwargs: Any) -> Figure:
        if theme not in THEMES:
            raise ValueError(f"theme is {theme!r}; choose {' or '.join(THEMES)}")
        if size is not None and size not in SIZES:
            raise ValueError(f"size is {size!r}; choose {', '.join(SIZES)}, or None")
        tokens = _THEME.set(theme), _SIZE.set(size)
        try:
            with mpl.rc_context(STYLE | THEMES[theme].settings):
                return function(*args, **kwargs)
        finally:
            _THEME.reset(tokens[0])
            _SIZE.reset(tokens[1])

    signature = inspect.signature(function)
    options = [
        inspect.Parameter("theme", inspect.Parameter.KEYWORD_ONLY, default="light", annotation=str),
        inspect.Parameter("size", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None),
    ]
    wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *options]
    )
    before, mark, after = (function.__doc__ or "").partition("\n\n    Returns")
    if not mark:
        before, mark, after = before.partition("\n\n    Raises")
    wrapper.__doc__ = before.rstrip() + _MORE.rstrip() + mark + after
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
