"""The numbers measured from a scan that a disk detector needs; to and from JSON, and as lines to print."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernels.descan import surface_map
from .kernels.probe import synthetic_probe

_MAY_BE_UNKNOWN = (
    "probe_radius_std_px",
    "nearest_spacing_px",
    "origin_std_px",
    "q_pixel_expected",
    "beam_energy_keV",
    "aperture_radius",
)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Numbers measured from a scan, as a disk detector needs them. Vectors (y, x), lengths detector px.

    Attributes
    ----------
    centre : tuple of float
        Centre of the direct beam at the middle of the scan.
    probe_radius_px, probe_radius_std_px : float
        Radius of the disks where the intensity is half, and its standard error (NaN: not measured).
    edge_sigma_px : float
        Standard deviation of the blur of their edge.
    probe : ndarray, shape (qy, qx), float32
        Template, not necessarily centred; `probe_source` is "stored", "vacuum", "synthetic" or "given".
    bad_pixels : ndarray of bool, shape (qy, qx)
        True = do not use: hot, dead, or masked in the store.
    min_peak_spacing : float
        Smallest distance of two peaks.
    edge_boundary : int
        Margin of the detector in which no peak is trusted.
    nearest_spacing_px : float
        Typical distance of a disk to its nearest neighbour; NaN if only one disk was seen.
    scan_shape : tuple of int
    origin_plane : ndarray, shape (2, 3)
        Row and column of the beam centre as ``a + b scan_y + c scan_x``, scan positions counted from 0.
    origin_std_px : float
        Scatter of the measured centres about the plane (robust); NaN with fewer than three.
    origin_stored : ndarray, shape (scan_y, scan_x, 2), or None
        The centres stored with the scan, which win over the plane.
    templates : ndarray, shape (k, qy, qx), float32, or None
        Probe templates of regions of the scan, which win over `probe`.
    template_index : ndarray of int, shape (scan_y, scan_x), or None
        Which of them to use where.
    beam_energy_keV, aperture_radius : float
        Beam energy, and radius of the aperture (convergence semiangle over wavelength) in 1/angstrom; NaN
        where the store does not say. They set the scale of |V_g|.
    """

    centre: tuple[float, float]
    probe_radius_px: float
    edge_sigma_px: float
    probe: NDArray[np.float32]
    probe_source: str
    bad_pixels: NDArray[np.bool_]
    min_peak_spacing: float
    edge_boundary: int
    scan_shape: tuple[int, int]
    origin_plane: NDArray[np.float64]
    probe_radius_std_px: float = math.nan
    nearest_spacing_px: float = math.nan
    origin_std_px: float = math.nan
    origin_stored: NDArray[np.float64] | None = None
    templates: NDArray[np.float32] | None = None
    template_index: NDArray[np.integer] | None = None
    n_patterns: int = 0
    n_disks: int = 0
    n_hot: int = 0
    n_dead: int = 0
    n_masked: int = 0
    saturated_fraction: float = 0.0
    q_pixel_expected: float = math.nan
    beam_energy_keV: float = math.nan
    aperture_radius: float = math.nan
    warnings: tuple[str, ...] = ()

    @property
    def origin(self) -> NDArray[np.float64]:
        """Beam centre at every position, (scan_y, scan_x, 2) in px: as stored, else the fitted plane."""
        if self.origin_stored is not None:
            return self.origin_stored
        return surface_map(self.origin_plane, self.scan_shape)

    @property
    def descan_px(self) -> float:
        """How far the beam centre moves over the scan, from corner to corner at most."""
        if self.origin_stored is not None:
            span = np.nanmax(self.origin_stored, axis=(0, 1)) - np.nanmin(self.origin_stored, axis=(0, 1))
            return float(np.hypot(*span))
        ny, nx = self.scan_shape
        move = np.abs(self.origin_plane[:, 1]) * (ny - 1) + np.abs(self.origin_plane[:, 2]) * (nx - 1)
        return float(np.hypot(*move))

    def to_dict(self) -> dict[str, Any]:
        """All but probe, templates and a stored origin, for JSON; bad pixels as flat indices."""
        return {
            "centre": [float(v) for v in self.centre],
            "probe_radius_px": self.probe_radius_px,
            "probe_radius_std_px": _number(self.probe_radius_std_px),
            "edge_sigma_px": self.edge_sigma_px,
            "probe_source": self.probe_source,
            "min_peak_spacing": self.min_peak_spacing,
            "edge_boundary": self.edge_boundary,
            "nearest_spacing_px": _number(self.nearest_spacing_px),
            "scan_shape": list(self.scan_shape),
            "detector_shape": list(self.bad_pixels.shape),
            "origin_plane": self.origin_plane.tolist(),
            "origin_std_px": _number(self.origin_std_px),
            "descan_px": self.descan_px,
            "n_patterns": self.n_patterns,
            "n_disks": self.n_disks,
            "n_hot": self.n_hot,
            "n_dead": self.n_dead,
            "n_masked": self.n_masked,
            "saturated_fraction": self.saturated_fraction,
            "q_pixel_expected": _number(self.q_pixel_expected),
            "beam_energy_keV": _number(self.beam_energy_keV),
            "aperture_radius": _number(self.aperture_radius),
            "bad_pixels": np.flatnonzero(self.bad_pixels).tolist(),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        probe: NDArray | None = None,
        origin: NDArray | None = None,
        templates: NDArray | None = None,
        template_index: NDArray | None = None,
    ) -> "Calibration":
        """The inverse of :meth:`to_dict`; without `probe` the synthetic one is drawn again."""
        v = dict(values)
        shape = tuple(v.pop("detector_shape"))
        v.pop("descan_px", None)
        bad = np.zeros(shape, dtype=bool)
        bad.flat[v.pop("bad_pixels")] = True
        for name in _MAY_BE_UNKNOWN:
            v[name] = math.nan if v.get(name) is None else v[name]
        template = (
            synthetic_probe(shape, v["probe_radius_px"], v["edge_sigma_px"]) if probe is None else probe
        )
        v["centre"] = tuple(v["centre"])
        v["scan_shape"] = tuple(v["scan_shape"])
        v["warnings"] = tuple(v["warnings"])
        v["origin_plane"] = np.asarray(v["origin_plane"], dtype=float)
        return cls(
            probe=np.asarray(template, dtype=np.float32),
            bad_pixels=bad,
            origin_stored=origin,
            templates=templates,
            template_index=template_index,
            **v,
        )

    def describe(self) -> list[str]:
        """The measured numbers in lines of text, to print."""
        std = "" if math.isnan(self.probe_radius_std_px) else f" +- {self.probe_radius_std_px:.2f}"
        lines = [
            f"centre ({self.centre[0]:.1f}, {self.centre[1]:.1f}) px | "
            f"disk radius {self.probe_radius_px:.1f}{std} px | edge {self.edge_sigma_px:.2f} px | "
            f"probe {self.probe_source}"
        ]
        nearest = self.nearest_spacing_px
        spacing = "" if math.isnan(nearest) else f"nearest disk at {nearest:.1f} px | "
        lines.append(
            f"{spacing}min_peak_spacing {self.min_peak_spacing:.1f} px | "
            f"edge_boundary {self.edge_boundary} px"
        )
        scatter = "" if math.isnan(self.origin_std_px) else f", scatter {self.origin_std_px:.2f} px"
        lines.append(
            f"descan {self.descan_px:.2f} px over the scan{scatter}, from {self.n_patterns} patterns"
        )
        if self.templates is not None:
            lines.append(f"{len(self.templates)} probe templates for regions of the scan")
        lines.append(f"{self.n_hot} hot, {self.n_dead} dead, {self.n_masked} masked pixels")
        return lines


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
