"""Figures of a publication's quality, one call each; every function returns a matplotlib Figure.

Strains are drawn in percent on one symmetric scale, rotations in degrees, positions without a lattice in grey. x runs
along columns, y along rows (down). Colour maps are safe for colour-blind readers. Nothing here touches a display or
the global style: save with ``figure.savefig("strain.pdf")``.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from .schema import PATTERN_DIMS, SCAN_DIMS, STRAIN_COMPONENTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "e_xx": r"$\varepsilon_{xx}$",
    "e_yy": r"$\varepsilon_{yy}$",
    "e_xy": r"$\varepsilon_{xy}$",
    "theta": r"$\theta$",
}
_NO_LATTICE = "0.75"
_STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.linewidth": 0.6, "figure.dpi": 110, "savefig.dpi": 200}
_ACCENTS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito, safe for colour-blind readers


def _figure(width: float, height: float) -> "Figure":
    """A figure of its own, tied to no window; size in inches."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
    return figure


def _group(results: xr.DataTree | xr.Dataset, name: str) -> xr.Dataset:
    if isinstance(results, xr.Dataset):
        return results
    if name not in results.children:
        raise ValueError(
            f"these results have no group /{name}; they have {', '.join(results.children) or 'none'}"
        )
    return results[name].to_dataset()


def _shown(component: str, values: np.ndarray) -> np.ndarray:
    """Values in the unit they are drawn in: percent, or degrees."""
    return np.rad2deg(values) if component == "theta" else 100 * values


def _unit(component: str) -> str:
    return "°" if component == "theta" else "%"


def _limit(*maps: np.ndarray, step: float) -> float:
    """Symmetric colour limit: the 98th percentile of the magnitude, rounded up to a multiple of `step`."""
    sizes = np.concatenate([np.abs(m[np.isfinite(m)]).ravel() for m in maps] or [np.zeros(0)])
    if sizes.size == 0:
        return step
    top = float(np.percentile(sizes, 98))
    while top < step / 2:
        step /= 10
    return float(max(np.ceil(top / step), 1) * step)


def _extent(dataset: xr.Dataset) -> tuple[tuple[float, float, float, float], str]:
    """Image extent (left, right, bottom, top) in the unit of the scan, and that unit."""
    edges, unit = [], "px"
    for dim in SCAN_DIMS:
        n = dataset.sizes[dim]
        values = (
            np.asarray(dataset[dim].values, float) if dim in dataset.coords else np.arange(n, dtype=float)
        )
        unit = dataset[dim].attrs.get("units", "px") if dim in dataset.coords else "px"
        step = values[1] - values[0] if n > 1 else 1.0
        edges.append((values[0] - step / 2, values[-1] + step / 2))
    (y0, y1), (x0, x1) = edges
    return (x0, x1, y1, y0), unit


def _map(ax: "Axes", values: np.ndarray, extent: tuple[float, ...], **kwargs: Any) -> Any:
    ax.set_facecolor(_NO_LATTICE)
    image = ax.imshow(np.ma.masked_invalid(values), extent=extent, interpolation="nearest", **kwargs)
    width, height = abs(extent[1] - extent[0]), abs(extent[3] - extent[2])
    if max(width, height) > 12 * min(width, height):  # a scan of a few rows would be a thread
        ax.set_aspect("auto")
    ax.set_xticks([])
    ax.set_yticks([])
    return image


def _scale_bar(ax: "Axes", extent: tuple[float, ...], unit: str) -> None:
    """A bar of a round length, about a quarter of the width, below the map."""
    width = abs(extent[1] - extent[0])
    decade = 10.0 ** np.floor(np.log10(width / 4))
    length = max(f * decade for f in (1, 2, 5) if f * decade <= width / 4 * 1.001)
    text = f"{length:g} {unit}"
    ax.plot(
        [0.02, 0.02 + length / width],
        [-0.04, -0.04],
        transform=ax.transAxes,
        color="k",
        lw=2.5,
        clip_on=False,
        solid_capstyle="butt",
    )
    ax.text(0.02 + length / width / 2, -0.07, text, transform=ax.transAxes, ha="center", va="top", fontsize=8)


def _axes_key(ax: "Axes", lattice: xr.Dataset | None) -> None:
    """Directions of x, y and of the mean g vectors, drawn below the right end of a map."""
    key = ax.inset_axes((0.80, -0.34, 0.2, 0.28))
    key.set_axis_off()
    key.set_aspect("equal")
    key.set_xlim(-0.4, 1.5)
    key.set_ylim(1.5, -0.4)
    arrows = [((0.0, 1.0), "x", "k"), ((1.0, 0.0), "y", "k")]
    if lattice is not None:
        for name, colour in (("g1", _ACCENTS[0]), ("g2", _ACCENTS[1])):
            g = np.array([float(np.nanmedian(lattice[f"{name}_q{axis}"])) for axis in "yx"])
            if np.isfinite(g).all() and (norm := np.hypot(*g)) > 0:
                arrows.append((tuple(g / norm), name, colour))
    for (dy, dx), text, colour in arrows:
        key.annotate("", (dx, dy), (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "lw": 1})
        key.text(1.25 * dx, 1.25 * dy, text, color=colour, ha="center", va="center", fontsize=7)
    key.set_xlim(-1.5, 1.5)
    key.set_ylim(1.5, -1.5)


def strain(
    results: xr.DataTree | xr.Dataset, *, limit_percent: float | None = None, title: str | None = None
) -> "Figure":
    """The four components: three strains on one scale in percent, the rotation in degrees.

    Parameters
    ----------
    results : DataTree or Dataset
        Results of a run, or the strain dataset of :func:`fcunet.compute_strain`.
    limit_percent : float, optional
        End of the strain scale; default: 98th percentile of the magnitude, rounded up.
    title : str, optional

    Raises
    ------
    ValueError
        If a component is missing.
    """
    dataset = _group(results, "strain")
    missing = [c for c in STRAIN_COMPONENTS if c not in dataset]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing from {list(dataset)}; compute them: fcunet.compute_strain(lattice)"
        )
    has_lattice = isinstance(results, xr.DataTree) and "lattice" in results.children
    lattice = results["lattice"].to_dataset() if has_lattice else None
    maps = {c: _shown(c, dataset[c].values) for c in STRAIN_COMPONENTS}
    limit = limit_percent or _limit(*(maps[c] for c in STRAIN_COMPONENTS[:3]), step=0.5)
    turn = _limit(maps["theta"], step=0.1)
    extent, unit = _extent(dataset)
    aspect = min(max(abs((extent[3] - extent[2]) / (extent[1] - extent[0])), 0.15), 3.0)
    figure = _figure(7.2, 2 * (3.1 * aspect + 0.75) + 0.3)
    axes = figure.subplots(2, 2)
    for ax, component in zip(axes.flat, STRAIN_COMPONENTS, strict=True):
        end, colours = (turn, "PRGn") if component == "theta" else (limit, "RdBu_r")
        image = _map(ax, maps[component], extent, cmap=colours, vmin=-end, vmax=end)
        ax.set_title(f"{LABELS[component]}  ({_unit(component)})")
        figure.colorbar(image, ax=ax, shrink=0.9, pad=0.02, ticks=[-end, -end / 2, 0, end / 2, end])
    _scale_bar(axes[1, 0], extent, unit)
    _axes_key(axes[1, 1], lattice)
    frame, reference = dataset.attrs.get("frame", "detector"), dataset.attrs.get("reference", "")
    figure.suptitle(
        title or f"strain in the {frame} frame" + (f", reference: {reference}" if reference else ""),
        fontsize=10,
    )
    return figure


def error_bars(results: xr.DataTree | xr.Dataset) -> "Figure":
    """Maps of one standard deviation of each component, strains in percent, rotation in degrees."""
    dataset = _group(results, "strain")
    maps = {c: _shown(c, dataset[f"{c}_std"].values) for c in STRAIN_COMPONENTS}
    extent, unit = _extent(dataset)
    aspect = min(max(abs((extent[3] - extent[2]) / (extent[1] - extent[0])), 0.15), 3.0)
    figure = _figure(7.2, 2 * (3.1 * aspect + 0.75) + 0.3)
    axes = figure.subplots(2, 2)
    for ax, component in zip(axes.flat, STRAIN_COMPONENTS, strict=True):
        finite = maps[component][np.isfinite(maps[component])]
        top = float(np.percentile(finite, 98)) if finite.size else 1.0
        image = _map(ax, maps[component], extent, cmap="viridis", vmin=0, vmax=top or 1.0)
        ax.set_title(f"σ({LABELS[component]})  ({_unit(component)})")
        figure.colorbar(image, ax=ax, shrink=0.9, pad=0.02)
    _scale_bar(axes[1, 0], extent, unit)
    figure.suptitle("one standard deviation", fontsize=10)
    return figure


def methods(strains: Mapping[str, xr.Dataset], truth: xr.Dataset, component: str = "e_xx") -> "Figure":
    """Truth beside what each method measured, and the profile along x averaged over rows.

    Parameters
    ----------
    strains : mapping of Dataset
        Label -> strain dataset, all on one scan.
    truth : Dataset
        The same components, exact.
    component : str
        Which one to draw.
    """
    maps = {"truth": _shown(component, truth[component].values)}
    maps |= {label: _shown(component, dataset[component].values) for label, dataset in strains.items()}
    extent, unit = _extent(truth)
    limit = _limit(maps["truth"], step=0.5)
    aspect = min(max(abs((extent[3] - extent[2]) / (extent[1] - extent[0])), 0.15), 2.0)
    figure = _figure(2.9 * len(maps) + 0.6, 2.7 * aspect + 3.0)
    axes = figure.subplot_mosaic(
        [list(maps), ["profile"] * len(maps)], height_ratios=[2.7 * aspect + 0.4, 2.4]
    )
    for label, values in maps.items():
        image = _map(axes[label], values, extent, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes[label].set_title(label)
    _scale_bar(axes["truth"], extent, unit)
    figure.colorbar(
        image,
        ax=[axes[label] for label in maps],
        shrink=0.85,
        pad=0.01,
        label=f"{LABELS[component]} ({_unit(component)})",
    )
    _profiles(axes["profile"], {k: v for k, v in maps.items() if k != "truth"}, maps["truth"], extent, unit)
    axes["profile"].set_ylabel(f"{LABELS[component]} ({_unit(component)})")
    return figure


def _profiles(
    ax: "Axes", maps: Mapping[str, np.ndarray], true: np.ndarray, extent: tuple[float, ...], unit: str
) -> None:
    """Mean over rows against x; bands are one standard deviation of the rows."""
    n = true.shape[1]
    x = extent[0] + (np.arange(n) + 0.5) * (extent[1] - extent[0]) / n
    ax.plot(x, _column_mean(true), color="k", lw=1.8, label="truth", zorder=3)
    for (label, values), colour in zip(maps.items(), _ACCENTS, strict=False):
        mean, spread = _column_mean(values), _column_mean((values - _column_mean(values)) ** 2) ** 0.5
        ax.plot(x, mean, color=colour, lw=1.2, label=label)
        ax.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
    ax.set_xlabel(f"x ({unit})")
    ax.margins(x=0)
    ax.legend(frameon=False, ncols=3, fontsize=8)


def _column_mean(values: np.ndarray) -> np.ndarray:
    count = np.isfinite(values).sum(axis=0)
    return np.where(count > 0, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)


def truth(results: xr.DataTree | xr.Dataset, true: xr.Dataset | None = None) -> "Figure":
    """Truth, measurement and their difference for every component of simulated data.

    `true` defaults to the group ``/truth`` of the results.
    """
    measured = _group(results, "strain")
    if true is None:
        if isinstance(results, xr.Dataset):
            raise ValueError("the true strain is missing; give it as the second argument")
        true = _group(results, "truth")
    extent, unit = _extent(measured)
    aspect = min(max(abs((extent[3] - extent[2]) / (extent[1] - extent[0])), 0.15), 2.0)
    figure = _figure(7.2, 4 * (2.2 * aspect + 0.45) + 0.4)
    axes = figure.subplots(4, 3)
    for row, component in zip(axes, STRAIN_COMPONENTS, strict=True):
        exact, found = (_shown(component, d[component].values) for d in (true, measured))
        step = 0.1 if component == "theta" else 0.5
        end, small = _limit(exact, found, step=step), _limit(found - exact, step=step / 10)
        colours = "PRGn" if component == "theta" else "RdBu_r"
        for ax, values, limit, name in zip(
            row,
            (exact, found, found - exact),
            (end, end, small),
            ("true", "measured", "measured - true"),
            strict=True,
        ):
            image = _map(ax, values, extent, cmap=colours, vmin=-limit, vmax=limit)
            ax.set_title(f"{LABELS[component]} {name} ({_unit(component)})", fontsize=8)
            figure.colorbar(image, ax=ax, shrink=0.9, pad=0.02, ticks=[-limit, 0, limit])
    _scale_bar(axes[-1, 0], extent, unit)
    return figure


def virtual(results: xr.DataTree | xr.Dataset, peaks: xr.Dataset | None = None) -> "Figure":
    """Bright field, dark field, direction of the centre of mass, and number of peaks where `peaks` is given."""
    dataset = _group(results, "virtual")
    extent, unit = _extent(dataset)
    panels: list[tuple[str, np.ndarray, str]] = [
        ("bright field", dataset["bf"].values, "gray"),
        ("annular dark field", dataset["adf"].values, "gray"),
        ("centre of mass, row (px)", _centred(dataset["com_qy"].values), "RdBu_r"),
        ("centre of mass, column (px)", _centred(dataset["com_qx"].values), "RdBu_r"),
    ]
    if peaks is not None:
        panels.append(("Bragg peaks", peaks["n_peaks"].values.astype(float), "viridis"))
    if isinstance(results, xr.DataTree) and "lattice" in results.children:
        panels.append(("lattice fit error (px)", results["lattice"]["fit_error"].values, "viridis"))
    rows = -(-len(panels) // 2)
    aspect = min(max(abs((extent[3] - extent[2]) / (extent[1] - extent[0])), 0.15), 3.0)
    figure = _figure(7.2, rows * (3.1 * aspect + 0.5) + 0.3)
    axes = figure.subplots(rows, 2, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (name, values, colours) in zip(axes.flat, panels, strict=False):
        end = _limit(values, step=0.1) if colours == "RdBu_r" else None
        image = _map(ax, values, extent, cmap=colours, vmin=-end if end else None, vmax=end)
        ax.set_title(name)
        figure.colorbar(image, ax=ax, shrink=0.9, pad=0.02)
    _scale_bar(axes[-1, 0], extent, unit)
    return figure


def _centred(values: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    return values - np.median(values[finite]) if finite.any() else values


def bragg_vector_map(image: xr.DataArray, basis: Any = None, *, power: float = 0.25) -> "Figure":
    """The Bragg vector map, with the basis drawn from its origin.

    Parameters
    ----------
    image : DataArray, dims (qy, qx)
        From :func:`fcunet.bragg_vector_map`.
    basis : object with `origin` (y, x) and `g` (2, 2), optional
        In px of the detector.
    power : float
        Grey values are intensity to this power, so that weak peaks show.
    """
    figure = _figure(4.2, 4.4)
    ax = figure.subplots()
    ax.imshow(np.asarray(image.transpose(*PATTERN_DIMS)) ** power, cmap="gray_r", interpolation="nearest")
    if basis is not None:
        y, x = (float(v) for v in basis.origin)
        for name, (gy, gx), colour in zip(("g1", "g2"), np.asarray(basis.g, float), _ACCENTS, strict=False):
            ax.annotate(
                "", (x + gx, y + gy), (x, y), arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.6}
            )
            ax.text(x + 1.2 * gx, y + 1.2 * gy, name, color=colour, ha="center", va="center")
    ax.set_title("Bragg vector map")
    ax.set_xlabel("qx (px)")
    ax.set_ylabel("qy (px)")
    return figure


def detection(
    patterns: np.ndarray,
    peaks: xr.Dataset | Sequence[xr.Dataset],
    *,
    radius_px: float,
    lattice: xr.Dataset | None = None,
    titles: Sequence[str] = (),
    power: float = 0.5,
) -> "Figure":
    """Patterns with a circle of the disk's size on every detected peak, and crosses on the fitted lattice.

    Parameters
    ----------
    patterns : ndarray, shape (n, qy, qx)
    peaks : Dataset with `peak_qy`, `peak_qx` of shape (n, peak)
        In any dimension names; NaN where there is no peak.
    radius_px : float
        Disk radius.
    lattice : Dataset with `origin_*`, `g1_*`, `g2_*` of shape (n,), optional
    titles : sequence of str
        One per pattern.
    power : float
        Grey values are counts to this power.
    """
    from matplotlib.patches import Circle

    patterns = np.asarray(patterns)
    n = len(patterns)
    columns = min(3, n)
    rows = -(-n // columns)
    figure = _figure(2.9 * columns + 0.2, 3.1 * rows + 0.2)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[n:]:
        ax.set_axis_off()
    qy, qx = (np.asarray(peaks[name]).reshape(n, -1) for name in ("peak_qy", "peak_qx"))
    for i, ax in enumerate(axes.flat[:n]):
        shown = np.clip(np.nan_to_num(patterns[i].astype(float)), 0, None) ** power
        ax.imshow(shown, cmap="gray_r", vmax=np.percentile(shown, 99.7) or 1, interpolation="nearest")
        for y, x in zip(qy[i], qx[i], strict=True):
            if np.isfinite(y):
                ax.add_patch(Circle((x, y), radius_px, fill=False, lw=0.9, color=_ACCENTS[1]))
        if lattice is not None:
            sites = _sites(lattice, i, patterns.shape[1:])
            ax.plot(sites[:, 1], sites[:, 0], "+", color=_ACCENTS[0], ms=5, mew=0.8)
        ax.set_xlim(-0.5, patterns.shape[2] - 0.5)
        ax.set_ylim(patterns.shape[1] - 0.5, -0.5)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(titles[i] if i < len(titles) else f"{int(np.isfinite(qy[i]).sum())} peaks", fontsize=8)
    return figure


def _sites(lattice: xr.Dataset, i: int, shape: tuple[int, int]) -> np.ndarray:
    """Lattice sites (y, x) of position `i` inside a frame of `shape`."""
    values = {
        name: np.asarray(lattice[name]).ravel()[i]
        for name in ("origin_qy", "origin_qx", "g1_qy", "g1_qx", "g2_qy", "g2_qx")
    }
    if not all(np.isfinite(v) for v in values.values()):
        return np.zeros((0, 2))
    g = np.array([[values["g1_qy"], values["g1_qx"]], [values["g2_qy"], values["g2_qx"]]])
    reach = int(np.ceil(np.hypot(*shape) / max(np.linalg.svd(g, compute_uv=False)[-1], 1.0)))
    h, k = np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1))
    sites = (
        np.array([values["origin_qy"], values["origin_qx"]])
        + h.reshape(-1, 1) * g[0]
        + k.reshape(-1, 1) * g[1]
    )
    inside = ((sites >= 0) & (sites <= np.array(shape) - 1)).all(axis=1)
    return sites[inside]
