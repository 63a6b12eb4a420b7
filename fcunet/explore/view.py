"""What is looked at, and how: the state of an explorer without its window, and the numbers it shows."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .. import plot, schema
from ..kernels.lattice import fit_lattice
from ..kernels.residuals import residual_ratio
from ..kernels.strain import rotate_frame, strain_from_F, strain_std
from ..pipeline import compute_strain, virtual_image
from ..pipeline_reference import (
    Reference,
    corrected_sigma,
    find_references,
    lattice_numbers,
    peak_arrays,
    residuals_tell,
)
from ..plot.lines import Position, along_line
from ..schema import STRAIN_COMPONENTS
from .sources import Sources

Array = NDArray[np.float64]
Region = tuple[int, int, int, int]

DETECTOR = "virtual detector"


@dataclass(frozen=True)
class Detector:
    """A ring on the detector: centre (y, x), and radii in px, ``inner <= r < outer``."""

    centre: tuple[float, float]
    inner: float
    outer: float

    def mask(self, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """True inside, of the shape of a pattern."""
        r = np.hypot(np.arange(shape[0])[:, None] - self.centre[0], np.arange(shape[1]) - self.centre[1])
        return (self.inner <= r) & (r < self.outer)


@dataclass(frozen=True)
class View:
    """Everything that decides what an explorer shows.

    Attributes
    ----------
    shown : str
        Name of the map.
    position : (int, int)
        The scan position (y, x) whose pattern is shown.
    limits : (float, float) or None
        Colour range in the unit of the map (%, degrees, px, counts); None: from the values.
    reference : (y0, y1, x0, x1) or None
        Reference region of the strain; None: as in the run.
    rotation_degree : float or None
        Scan frame against detector frame; None: as in the run.
    min_indexed, max_fit_error, max_std
        Positions with fewer peaks in the fit, a larger residual (px), or a larger error bar of a strain
        component are grey.
    min_intensity : float
        Peaks weaker than this share of the strongest one of the pattern, the direct beam left out, are not
        drawn, and the lattice of the pattern shown is fitted without them.
    line : "row", "column", or two positions
        Where the profile runs: through the position, or along a drawn line.
    width : int
        Positions averaged across the profile.
    detector : Detector or None
        The virtual detector.
    """

    shown: str = "e_xx"
    position: tuple[int, int] = (0, 0)
    limits: tuple[float, float] | None = None
    reference: Region | None = None
    rotation_degree: float | None = None
    min_indexed: int = 0
    max_fit_error: float | None = None
    max_std: float | None = None
    min_intensity: float = 0.0
    line: str | tuple[Position, Position] = "row"
    width: int = 1
    detector: Detector | None = None

    @property
    def as_in_run(self) -> bool:
        """The strain is that of the stored results."""
        return self.reference is None and self.rotation_degree is None

    def changed(self, **values: Any) -> "View":
        """The same view with other `values`."""
        return replace(self, **values)


@dataclass(frozen=True)
class MapKind:
    """How a map is shown: heading, unit, factor from the stored value, palette, and whether it has a sign."""

    title: str
    unit: str
    factor: float = 1.0
    palette: str = "viridis"
    symmetric: bool = False


_DEGREES = 180 / np.pi
KINDS = {
    "e_xx": MapKind("strain e_xx", "%", 100, "strain", True),
    "e_yy": MapKind("strain e_yy", "%", 100, "strain", True),
    "e_xy": MapKind("strain e_xy", "%", 100, "strain", True),
    "theta": MapKind("rotation theta", "degrees", _DEGREES, "rotation", True),
    "e_1": MapKind("larger principal strain", "%", 100, "strain", True),
    "e_2": MapKind("smaller principal strain", "%", 100, "strain", True),
    "dilation": MapKind("change of area e_xx + e_yy", "%", 100, "strain", True),
    "max_shear": MapKind("largest shear", "%", 100, "viridis"),
    "e_xx_std": MapKind("error bar of e_xx", "1e-3", 1e3),
    "e_yy_std": MapKind("error bar of e_yy", "1e-3", 1e3),
    "e_xy_std": MapKind("error bar of e_xy", "1e-3", 1e3),
    "theta_std": MapKind("error bar of theta", "mrad", 1e3),
    "grain": MapKind("grain", "", 1, "category"),
    "fit_error": MapKind("residual of the lattice fit", "px"),
    "residual_ratio": MapKind("residuals against the reference's", ""),
    "n_indexed": MapKind("peaks in the lattice fit", ""),
    "n_peaks": MapKind("peaks found", ""),
    "bf": MapKind("bright field", "counts", 1, "gray"),
    "adf": MapKind("annular dark field", "counts", 1, "gray"),
    "total": MapKind("all electrons", "counts", 1, "gray"),
    "com_qy": MapKind("centre of mass, row", "px"),
    "com_qx": MapKind("centre of mass, column", "px"),
    DETECTOR: MapKind(DETECTOR, "counts", 1, "gray"),
}
DERIVED = ("e_1", "e_2", "dilation", "max_shear")
GROUPS = ("strain", "lattice", "virtual")


def kind_of(name: str) -> MapKind:
    """How the map `name` is shown, also one that this version does not know."""
    return KINDS.get(name) or MapKind(name.replace("_", " "), "")


def turn_and_measure(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `rotate_frame`, and the rest, those of `strain_from_F`."""
    turn = {k: v for k, v in options.items() if k in ("rotation_degree", "transpose")}
    return turn, {k: v for k, v in options.items() if k not in turn}


@dataclass
class Maps:
    """The maps of a result under a view; what was computed last is kept."""

    sources: Sources
    virtual: xr.DataArray | None = None
    _strain: dict[Any, xr.Dataset] = field(default_factory=dict)
    _reference: dict[Region, dict[int, Reference]] = field(default_factory=dict)

    @cached_property
    def names(self) -> list[str]:
        """Maps that can be shown, in the order of `KINDS`, unknown ones last."""
        found = []
        for group in GROUPS:
            if group in self.sources.tree.children:
                dataset = self.sources.tree[group].dataset
                found += [str(n) for n, v in dataset.data_vars.items() if v.dims == schema.SCAN_DIMS]
        if {"e_xx", "e_yy", "e_xy"} <= set(found):
            found += [n for n in DERIVED if n not in found]
        hidden = {"valid", "truncated", *schema.LATTICE_PARAMETERS}
        known = [n for n in KINDS if n in found]
        return known + sorted(set(found) - set(known) - hidden)

    def has(self, name: str) -> bool:
        """A map of this name is stored."""
        groups = (self.sources.tree[g].dataset for g in GROUPS if g in self.sources.tree.children)
        return any(name in dataset for dataset in groups)

    def stored(self, name: str) -> xr.DataArray:
        """A stored map, in memory after the first time."""
        for group in GROUPS:
            if group in self.sources.tree.children and name in self.sources.tree[group].dataset:
                return self.sources.tree[group].dataset[name].load()
        raise KeyError(name)

    @cached_property
    def lattice(self) -> xr.Dataset:
        """The lattice of every position, and which it is, in memory, without its covariance."""
        lattice = self.sources.tree["lattice"].dataset
        names = (*schema.LATTICE_PARAMETERS, *schema.SHARED_DILATION, "lattice_id")
        return lattice[[n for n in names if n in lattice]].load()

    def strain(self, view: View) -> xr.Dataset:
        """`e_xx, e_yy, e_xy, theta` under the reference and the frame of `view`."""
        run = self.sources.tree["strain"].dataset.attrs
        if view.as_in_run:
            names = [n for n in STRAIN_COMPONENTS if n in self.sources.tree["strain"].dataset]
            return xr.Dataset({n: self.stored(n) for n in names}, attrs=run)
        key = (view.reference, view.rotation_degree)
        if key not in self._strain:
            self._strain.clear()
            options = self.strain_options(view)
            if view.reference is None:
                self._strain[key] = self._turned(options)
            else:
                self._strain[key] = compute_strain(self.lattice, **options)
        return self._strain[key]

    def _turned(self, options: dict[str, Any]) -> xr.Dataset:
        """The strain of the run along other axes, from its F: every lattice keeps the reference it had."""
        stored, (turn, how) = self.sources.tree["strain"].dataset, turn_and_measure(options)
        F = rotate_frame(self.stored("F").values, **turn)
        values = {c: stored[c].copy(data=v) for c, v in strain_from_F(F, **how).items()}
        return xr.Dataset(values, attrs=stored.attrs | {"frame": "scan"} | turn)

    def strain_options(self, view: View) -> dict[str, Any]:
        """How strain is computed for this view, what it does not ask for as in the run.

        Arguments of `fcunet.compute_strain`, or, without a reference, of `rotate_frame` and `strain_from_F`.
        """
        attrs = self.sources.tree["strain"].attrs
        options: dict[str, Any] = {}
        if view.reference is not None:
            options["reference"] = view.reference
        for name in ("measure", "convention"):
            if name in attrs:
                options[name] = attrs[name]
        if attrs.get("transposed"):
            options["transpose"] = True
        if view.rotation_degree is not None:
            options["rotation_degree"] = float(view.rotation_degree)
        elif attrs.get("frame") == "scan":
            options["rotation_degree"] = float(attrs.get("rotation_degree", 0.0))
        return options

    def raw(self, view: View, name: str) -> xr.DataArray:
        """The map `name` in its stored unit, not masked."""
        if name == DETECTOR:
            if self.virtual is None:
                raise KeyError(name)
            return self.virtual
        if name in STRAIN_COMPONENTS:
            return self.strain(view)[name]
        if name in DERIVED and (not view.as_in_run or name not in self.sources.tree["strain"].dataset):
            from ..kernels.strain import principal_strains

            strain = self.strain(view)
            values = principal_strains(*(strain[c].values for c in ("e_xx", "e_yy", "e_xy")))[name]
            return strain["e_xx"].copy(data=values).rename(name)
        return self.stored(name)

    def keep(self, view: View) -> NDArray[np.bool_] | None:
        """Positions that pass the thresholds (scan_y, scan_x); None without any threshold."""
        passed: NDArray[np.bool_] | None = None
        for wanted, name, test in (
            (view.min_indexed or None, "n_indexed", np.greater_equal),
            (view.max_fit_error, "fit_error", np.less_equal),
        ):
            if wanted is not None:
                good = test(self.stored(name).values, wanted)
                passed = good if passed is None else passed & good
        if view.max_std is not None:
            for name in ("e_xx_std", "e_yy_std", "e_xy_std"):
                if name in self.sources.tree["strain"].dataset:
                    good = self.stored(name).values <= view.max_std
                    passed = good if passed is None else passed & good
        return passed

    def shown(self, view: View, name: str | None = None) -> xr.DataArray:
        """The map of `view` in its shown unit; NaN where there is none, or a threshold is not met."""
        name = name or view.shown
        raw = self.raw(view, name)
        values = raw.values * kind_of(name).factor
        if name == "grain":
            values = np.where(raw.values > 0, raw.values, np.nan)
        keep = self.keep(view)
        if keep is not None and name not in ("bf", "adf", "total", DETECTOR):
            values = np.where(keep, values, np.nan)
        return raw.copy(data=values.astype(np.float32))

    def limits(self, view: View, values: Array) -> tuple[float, float]:
        """Colour range: given, else symmetric for what has a sign, else most of the values."""
        if view.limits is not None:
            return view.limits
        from ..plot.style import range_of, symmetric_limit

        sample = thinned(values)
        if kind_of(view.shown).symmetric:
            top = symmetric_limit([sample], None)
            return -top, top
        return range_of(sample)

    # ------------------------------------------------------------------------------------- one position

    def lattice_shown(self, view: View) -> tuple[Array, Array, Array]:
        """Origin, g and covariance at the position; fitted anew where weak peaks are left out."""
        origin, g, covariance = self.sources.lattice_at(*view.position)
        if view.min_intensity <= 0 or self.sources.peaks is None or not np.isfinite(g).all():
            return origin, g, covariance
        peaks, strong = self.peaks_shown(view)
        attrs = self.lattice.attrs
        sigma = corrected_sigma(peaks["peak_sigma"], attrs)
        weighting: Literal["sigma", "uniform"] = "sigma" if np.isfinite(sigma).all() else "uniform"
        as_fitted = weighting == attrs.get("weighting", "sigma") and "scatter_prior" in attrs
        fit = fit_lattice(
            peaks["peak_qy"][strong],
            peaks["peak_qx"][strong],
            g=g,
            origin=origin,
            sigma=sigma[strong] if weighting == "sigma" else None,
            weighting=weighting,
            min_num_peaks=3,
            scatter_prior=tuple(attrs["scatter_prior"]) if as_fitted else None,
        )
        return fit.origin, fit.g, fit.covariance

    def peaks_shown(self, view: View) -> tuple[dict[str, Array], NDArray[np.bool_]]:
        """Peaks at the position, and which of them are strong enough."""
        peaks = self.sources.peaks_at(*view.position)
        height = peaks["peak_intensity"]
        order = np.sort(height)[::-1]
        strongest = order[1] if len(order) > 1 else order[0] if len(order) else 1.0
        return peaks, height >= view.min_intensity * strongest

    def strain_at(self, view: View) -> dict[str, tuple[float, float]]:
        """Value and error bar of each strain component at the position, of the lattice that is shown."""
        _, g, covariance = self.lattice_shown(view)
        if view.as_in_run and view.min_intensity <= 0:
            strain = self.sources.tree["strain"].dataset
            y, x = view.position
            return {
                c: (
                    float(self.stored(c)[y, x]),
                    float(self.stored(f"{c}_std")[y, x]) if f"{c}_std" in strain else np.nan,
                )
                for c in STRAIN_COMPONENTS
            }
        if not np.isfinite(g).all():
            return dict.fromkeys(STRAIN_COMPONENTS, (np.nan, np.nan))
        values, errors = self._of_lattice(view, g[None], covariance[None])
        return {c: (float(values[c][0]), float(errors[f"{c}_std"][0])) for c in STRAIN_COMPONENTS}

    def residual_ratio_at(self, view: View) -> float:
        """How unlike the reference of `view` the pattern at the position is; NaN where that is not known."""
        y, x = view.position
        if view.reference is None:
            return float(self.stored("residual_ratio")[y, x]) if self.has("residual_ratio") else np.nan
        reference = self._reference_at(view)
        if reference is None or reference.residuals is None:
            return np.nan
        origin, g, _ = self.sources.lattice_at(y, x)
        assert self.sources.peaks is not None
        names = [name for name in schema.PEAK_VARIABLES if name in self.sources.peaks]
        peaks = self.sources.peaks[names].isel(scan_y=[y], scan_x=x).compute(scheduler="synchronous")
        qy, qx, *sigma = (a.values for a in peak_arrays(peaks, self.lattice.attrs))  # (1, P)
        ratio = residual_ratio(
            qy,
            qx,
            reference.residuals,
            g=g[None],
            origin=origin[None],
            sigma=sigma[0] if sigma else None,
            fit_origin=bool(self.lattice.attrs.get("fit_origin", True)),
        )
        return float(ratio[0])

    def _reference_at(self, view: View) -> Reference | None:
        """Measured reference of the lattice at the position, with the residuals of its peaks if at hand."""
        region, numbers = view.reference, lattice_numbers(self.lattice)
        if region is None:
            return None
        if region not in self._reference:
            peaks = self.sources.peaks
            known = peaks is not None and residuals_tell(peaks, self.lattice.attrs)
            self._reference = {
                region: find_references(self.lattice, region, numbers, peaks if known else None)
            }
        return self._reference[region].get(int(numbers[view.position]))

    def _of_lattice(self, view: View, g: Array, covariance: Array) -> tuple[dict, dict]:
        """Strain and its error bars of some lattices (n, 2, 2), against the reference of `view`."""
        from ..kernels.ellipse import Ellipse, undistort_lattice
        from ..kernels.strain import deformation_gradient, shared_dilation_left, with_shared_strain

        attrs = self.strain(view).attrs
        ellipse = Ellipse(attrs.get("ellipse_ratio", 1.0), attrs.get("ellipse_angle_degree", 0.0))
        reference = self._reference_at(view)
        if reference is None:  # that of the run: what its F takes to the lattice it found here
            _, as_found, _ = self.sources.lattice_at(*view.position)
            as_found, _ = undistort_lattice(as_found, None, ellipse)
            g_ref = as_found @ self.stored("F").values[view.position]
            of_ref = attrs.get("shared_dilation_ref")
        else:
            g_ref, _ = undistort_lattice(reference.g, None, ellipse)
            of_ref = reference.dilation
        ratio = self.residual_ratio_at(view)
        std, signed = self.sources.shared_dilation_at(*view.position)
        floor = float(self.lattice.attrs.get("shared_dilation_floor", 0.0))
        left = shared_dilation_left(std, signed, of_ref, ratio, floor=floor)
        covariance = covariance * (ratio**2 if np.isfinite(ratio) else 1.0)
        covariance = with_shared_strain(covariance, g, left, signed)
        g, undistorted = undistort_lattice(g, covariance, ellipse)
        covariance = covariance if undistorted is None else undistorted
        turn: dict[str, Any] = {
            "rotation_degree": float(attrs.get("rotation_degree", 0.0)),
            "transpose": bool(attrs.get("transposed", 0)),
        }
        how: dict[str, Any] = {k: attrs[k] for k in ("measure", "convention") if k in attrs}
        F = rotate_frame(deformation_gradient(g, g_ref), **turn)
        return strain_from_F(F, **how), strain_std(g, g_ref, covariance, **turn, **how)

    # ---------------------------------------------------------------------------------------- a profile

    def ends(self, view: View) -> tuple[Position, Position]:
        """Ends of the profile, in scan positions."""
        ny, nx = self.sources.shape
        y, x = view.position
        if view.line == "row":
            return (y, 0), (y, nx - 1)
        if view.line == "column":
            return (0, x), (ny - 1, x)
        return view.line  # type: ignore[return-value]

    def profile(self, view: View) -> xr.Dataset:
        """The map shown along the line, in its shown unit, with `_std` where there are error bars."""
        name, factor = view.shown, kind_of(view.shown).factor
        data = {name: self.shown(view)}
        if name in STRAIN_COMPONENTS and f"{name}_std" in self.sources.tree["strain"].dataset:
            # to first order another reference does not change it; another frame mixes the components, which
            # changes little where they are alike
            data[f"{name}_std"] = self.stored(f"{name}_std") * factor
        return along_line(xr.Dataset(data), [name], *self.ends(view), width=view.width)

    # ------------------------------------------------------------------------------- virtual detector

    @cached_property
    def shift(self) -> Array | None:
        """How far the beam is from its place on the mean pattern (scan_y, scan_x, 2), px; None if unknown."""
        calibration = self.sources.calibration
        if calibration is None or calibration.origin.shape[:2] != self.sources.shape:
            return None
        shift = calibration.origin - np.asarray(calibration.centre)
        return shift if np.rint(np.nan_to_num(shift)).any() else None

    def virtual_lazy(self, view: View) -> xr.DataArray:
        """The image of the virtual detector, which follows the descan; lazy."""
        if view.detector is None or self.sources.datacube is None:
            raise ValueError(
                self.sources.missing.get("patterns", "draw the virtual detector on the mean pattern first")
            )
        frame = self.sources.datacube["intensity"].shape[2:]
        return virtual_image(self.sources.datacube, view.detector.mask(frame), shift=self.shift)

    # -------------------------------------------------------------------------------------- out of here

    def figure(self, view: View, *, theme: str = "light", size: str | None = None) -> Any:
        """The map as a figure for print, as the code of `recipe.code` draws it."""
        kind = kind_of(view.shown)
        array = self.raw(view, view.shown)
        keep = self.keep(view)
        if view.shown == "grain" and keep is None:
            return plot.grains(self.sources.tree, theme=theme, size=size)
        if keep is not None and view.shown not in ("bf", "adf", "total", DETECTOR):
            array = array.where(keep)
        return plot.scan_map(
            array,
            factor=kind.factor,
            unit=kind.unit,
            title=kind.title,
            limits=view.limits,
            symmetric=kind.symmetric,
            theme=theme,
            size=size,
        )


def thinned(values: Array, most: int = 200_000) -> Array:
    """About so many of the values, evenly."""
    flat = np.asarray(values).ravel()
    return flat[:: max(1, len(flat) // most)]
