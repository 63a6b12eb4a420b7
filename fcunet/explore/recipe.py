"""The code that repeats a view, to paste into a notebook."""

from pathlib import Path
from typing import Any

from ..schema import STRAIN_COMPONENTS
from .view import DERIVED, DETECTOR, Detector, Maps, View, kind_of, turn_and_measure


def code(maps: Maps, view: View, *, run: str | Path | None = None) -> str:
    """Python that computes and draws what `view` shows, to paste into a notebook.

    Parameters
    ----------
    maps : Maps
    view : View
    run : path, optional
        How to name the run directory; default is where it lies.
    """
    sources, kind, name = maps.sources, kind_of(view.shown), view.shown
    run = run or sources.folder or "RUN"
    lines = ["import fcunet", "", f"results = fcunet.open_results({str(run)!r})"]
    if name == DETECTOR and view.detector is not None:
        lines += _code_of_detector(maps, view.detector, run)
    else:
        lines += _code_of_map(maps, view)
    lines += _code_of_thresholds(view)
    options = f"factor={kind.factor!r}, unit={kind.unit!r}, title={kind.title!r}"
    options += f", limits={view.limits!r}" if view.limits is not None else ""
    options += ", symmetric=True" if kind.symmetric else ""
    lines += [f"fcunet.plot.scan_map(shown, {options})"]
    if sources.datacube is not None and sources.scan is not None and sources.peaks is not None:
        y, x = view.position
        lines += [
            "",
            "from fcunet.store import open_peaks",
            f"datacube = fcunet.open({str(sources.scan)!r})",
            f"peaks = open_peaks({str(Path(run) / 'peaks.zarr')!r})",
        ]
        region = sources.tree.attrs.get("region")
        if region:
            y0, y1, x0, x1 = region
            lines.append(f"datacube = datacube.isel(scan_y=slice({y0}, {y1}), scan_x=slice({x0}, {x1}))")
        lines.append(
            f"fcunet.plot.detection(datacube, peaks, results['lattice'].dataset, at=({y}, {x}), "
            f"radius_px={sources.radius_px:.4g})"
        )
    return "\n".join(lines) + "\n"


def _code_of_detector(maps: Maps, ring: Detector, run: str | Path) -> list[str]:
    sources, follow = maps.sources, maps.shift is not None
    lines = [f"datacube = fcunet.open({str(sources.scan or 'SCAN.zarr')!r})"]
    region = sources.tree.attrs.get("region")
    if region:
        y0, y1, x0, x1 = region
        lines.append(f"datacube = datacube.isel(scan_y=slice({y0}, {y1}), scan_x=slice({x0}, {x1}))")
    if follow:
        lines += [
            "from fcunet.store import load_calibration",
            f"calibration = load_calibration({str(Path(run) / 'peaks.zarr')!r})",
            "shift = calibration.origin - calibration.centre  # the detector follows the descan",
        ]
    return [
        *lines,
        f"shown = fcunet.virtual_image(datacube, inner={ring.inner:.6g}, outer={ring.outer:.6g}, "
        f"centre=({ring.centre[0]:.6g}, {ring.centre[1]:.6g}){', shift=shift' if follow else ''}).compute()",
    ]


def _code_of_map(maps: Maps, view: View) -> list[str]:
    name, options = view.shown, maps.strain_options(view)
    if view.as_in_run or name not in (*STRAIN_COMPONENTS, *DERIVED):
        for group in ("strain", "lattice", "virtual"):
            if group in maps.sources.tree.children and name in maps.sources.tree[group].dataset:
                return [f"shown = results[{group!r}][{name!r}]"]
        lines = ["strain = results['strain'].dataset"]
    elif view.reference is not None:
        lines = [f"strain = fcunet.compute_strain(results['lattice'].dataset{_arguments(options)})"]
    else:
        turn, how = turn_and_measure(options)
        lines = [
            "from fcunet.kernels.strain import rotate_frame, strain_from_F",
            f"F = rotate_frame(results['lattice']['F'].values{_arguments(turn)})",
            "strain = results['strain'].dataset",
            f"turned = strain_from_F(F{_arguments(how)})",
            "strain = strain.assign({name: strain[name].copy(data=turned[name]) for name in turned})",
        ]
    if name in DERIVED:
        return [
            *lines,
            "from fcunet.kernels.strain import principal_strains",
            "principal = principal_strains(strain['e_xx'], strain['e_yy'], strain['e_xy'])",
            f"shown = strain['e_xx'].copy(data=principal[{name!r}])",
        ]
    return [*lines, f"shown = strain[{name!r}]"]


def _arguments(options: dict[str, Any]) -> str:
    """Keyword arguments, after others."""
    return "".join(f", {k}={v!r}" for k, v in options.items())


def _code_of_thresholds(view: View) -> list[str]:
    if view.shown in ("bf", "adf", "total", DETECTOR):
        return []
    lines = []
    if view.min_indexed:
        lines.append(f"shown = shown.where(results['lattice']['n_indexed'] >= {view.min_indexed})")
    if view.max_fit_error is not None:
        lines.append(f"shown = shown.where(results['lattice']['fit_error'] <= {view.max_fit_error!r})")
    if view.max_std is not None:
        lines += [
            f"shown = shown.where(results['strain'][{c + '_std'!r}] <= {view.max_std!r})"
            for c in ("e_xx", "e_yy", "e_xy")
        ]
    return lines
