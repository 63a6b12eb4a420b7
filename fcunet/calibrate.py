"""What can be measured from the patterns themselves: beam centre, disk radius, probe, bad pixels, descan.

A bounded sample of the scan is read, in small patches of neighbouring positions, so that few shards are
opened. Every number can be overridden; those that are uncertain say so in `Calibration.warnings`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import ndimage as ndi

from . import schema
from .calibration import Calibration
from .kernels.beam import aligned_mean, fill, find_bad_pixels
from .kernels.descan import find_centres, fit_surface, surface_at
from .kernels.ellipse import Ellipse
from .kernels.probe import (
    DiskFit,
    disk_profiles,
    disk_sum,
    find_disks_by_edge,
    find_disks_of_any_size,
    fit_disk,
    fit_profile,
    synthetic_probe,
    vote_radius,
    weighted_quantile,
)
from .sample import N_PATTERNS, Sample, read_sample
from .units import wavelength

__all__ = [
    "Calibration",
    "Sample",
    "calibrate",
    "find_bad_pixels",
    "read_sample",
    "synthetic_probe",
]

MIN_SIGNIFICANCE = 6.0
SMALL_RADIUS_PX = 8.0


def summed_patches(sample: Sample, patterns: NDArray) -> NDArray[np.float64]:
    """Summed pattern of each patch, (n_patches, qy, qx): one lattice, more electrons."""
    groups = [patterns[sample.patch == p] for p in np.unique(sample.patch)]
    return np.stack([aligned_mean(g, np.zeros((len(g), 2))) * len(g) for g in groups])


def require_counts(patterns: NDArray) -> None:
    if not np.nansum(np.abs(patterns)) > 0:
        raise ValueError(
            f"the {len(patterns)} sampled patterns hold no counts; is the beam blanked, or "
            "the detector shape wrong? See: fcunet info STORE"
        )


def survey_radius(patterns: NDArray, sums: NDArray) -> float:
    """Radius of the disks to about 10 %; ValueError if there are none."""
    chosen = np.linspace(0, len(sums) - 1, min(len(sums), 6)).round().astype(int)
    total = (aligned_mean(patterns, np.zeros((len(patterns), 2))) * len(patterns))[None]
    images = np.concatenate([sums[chosen], total]) if len(sums) > 1 else total
    radius, significance = vote_radius(find_disks_of_any_size(images))
    if math.isnan(radius) or significance < MIN_SIGNIFICANCE:
        raise ValueError(
            f"no diffraction disk stands out in {len(patterns)} sampled patterns (strongest edge "
            f"{significance:.1f} times the noise, {MIN_SIGNIFICANCE:.0f} needed); give the radius: "
            "--probe-radius-px R, or look at the patterns: fcunet info STORE"
        )
    return radius


def _direct_beam(image: NDArray, radius: float) -> tuple[NDArray[np.float64], bool]:
    """Position of the direct beam in a pattern, and whether another disk could be it as well.

    The direct beam is the disk of most electrons, with a preference for the middle of all disks: strong Bragg
    reflections come in pairs on either side of it.
    """
    disks = find_disks_by_edge(image, radius)
    weight = np.clip(np.nan_to_num(disks.intensity), 0, None)
    if not len(weight) or weight.sum() <= 0:
        return np.full(2, np.nan), False
    middle = (weight[:, None] * disks.position).sum(0) / weight.sum()
    reach = 0.25 * min(image.shape)
    score = weight * np.exp(-0.5 * (np.linalg.norm(disks.position - middle, axis=1) / reach) ** 2)
    order = np.argsort(-score)
    ambiguous = len(order) > 1 and score[order[1]] > 0.6 * score[order[0]]
    return disks.position[order[0]], bool(ambiguous)


def _rough_plane(sample: Sample, sums: NDArray, radius: float) -> NDArray[np.float64]:
    """Beam centre over the scan from the patches; robust against a Bragg disk that wins in some of them."""
    found = np.stack([_direct_beam(fill(image), radius)[0] for image in sums])
    middle = np.stack([sample.position[sample.patch == p].mean(0) for p in np.unique(sample.patch)])
    return fit_surface(middle, found, slack_px=radius)[0]


def _track(
    sample: Sample, patterns: NDArray, plane: NDArray, radius: float, reach: float, width: float | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Beam centre in every pattern, (n, 2), within `reach` of a plane, and the plane through them."""
    centres = find_centres(
        patterns, surface_at(plane, sample.position), radius_px=radius, reach_px=reach, width_px=width
    )
    return centres, fit_surface(sample.position, centres)[0]


def direct_beam_centres(
    sample: Sample, patterns: NDArray, sums: NDArray, radius: float, centre: tuple[float, float] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre of the direct beam in every pattern (n, 2), and their plane (2, 3); NaN if none is found."""
    if centre is not None:
        plane = np.asarray(centre, dtype=float)[:, None] * np.array([1.0, 0, 0])
        return _track(sample, patterns, plane, radius, 1.5 * radius + 3)
    plane = _rough_plane(sample, sums, radius)
    if np.isnan(plane).any():
        return np.full((len(patterns), 2), np.nan), plane
    return _track(sample, patterns, plane, radius, radius + 2)


class RadiusFit(NamedTuple):
    radius: float
    edge: float
    std: float  # NaN: not known
    n_disks: int  # 0: nothing could be fitted
    nearest: float  # distance of neighbouring disks, NaN: one disk


def refine_radius(
    images: NDArray, radius: float, clipped: NDArray[np.bool_], max_disks: int = 40
) -> RadiusFit:
    """Radius and edge from the strongest disks of some patterns, but not from a clipped beam.

    Small disks hold too few pixels to tell a dark rim from the outside: their profiles are averaged
    first. Large ones are fitted one by one, interior and all; as a disk that is dark on one side looks
    small, and none looks large, an upper quantile is taken rather than the median.
    """
    spacing, fits, profiles, counts = [], [], [], []
    per_image = max(3, math.ceil(max_disks / len(images)))
    for image in images:
        filled = fill(image)
        disks = find_disks_by_edge(filled, radius)
        if not len(disks.response):
            continue
        strong = disks.position[disks.response > 0.2 * disks.response.max()]
        nearest = math.nan
        if len(strong) > 1:
            distance = np.linalg.norm(strong[:, None] - strong[None], axis=-1)
            np.fill_diagonal(distance, np.inf)
            nearest = float(np.median(distance.min(1)))
            spacing.append(nearest)
        windows = [tuple(slice(max(0, round(c - radius)), round(c + radius) + 1) for c in p) for p in strong]
        strong = strong[[clipped[w].mean() < 0.2 for w in windows]][:per_image]
        if radius < SMALL_RADIUS_PX:
            profile, count = disk_profiles(filled, strong, radius, mask=clipped)
            profiles.append(profile)
            counts.append(count)
        else:
            reach = None if math.isnan(nearest) else max(0.75 * nearest, radius + 2)
            some = [fit_disk(filled, (p[0], p[1]), radius, mask=clipped, reach_px=reach) for p in strong]
            fits += [fit for fit in some if fit is not None]
    nearest = float(np.median(spacing)) if spacing else math.nan
    if profiles and (n := int((np.concatenate(counts).sum(1) > 0).sum())):
        profile, count = np.concatenate(profiles), np.concatenate(counts)
        radii = [
            fit_profile(*_mean_profile(profile[i::parts], count[i::parts]), radius)[0]
            for parts in [min(4, n)]
            for i in range(parts)
        ]
        value, edge = fit_profile(*_mean_profile(profile, count), radius)
        std = float(np.std(radii, ddof=1) / math.sqrt(len(radii))) if len(radii) > 2 else math.nan
        return RadiusFit(value, edge, std, n, nearest)
    if not fits:
        return RadiusFit(radius, max(0.5, 0.1 * radius), math.nan, 0, nearest)
    size = np.array([f.radius_px for f in fits])
    blur = np.array([f.edge_sigma_px for f in fits])
    weight = np.minimum(np.array([f.snr for f in fits]), 50.0) ** 2
    value = weighted_quantile(size, weight, 0.7)
    near = np.abs(size - value) <= 0.2 * value
    spread = 1.4826 * float(np.median(np.abs(size[near] - value)))
    std = 1.3 * spread / math.sqrt(near.sum()) if near.sum() > 2 else math.nan
    return RadiusFit(value, weighted_quantile(blur[near], weight[near], 0.5), std, len(fits), nearest)


def _mean_profile(profile: NDArray, count: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    total = count.sum(0)
    return (profile * count).sum(0) / np.maximum(total, 1), total


def vacuum_probe(
    sample: Sample, patterns: NDArray, centres: NDArray, radius: float, edge: float
) -> tuple[NDArray[np.float32] | None, int]:
    """Mean of the patterns without diffraction, beam moved to the middle; None if too few or too weak.

    Conservative: 98 % of the electrons in the direct disk, the share two standard deviations clear of
    what noise does to it, and no second disk.
    """
    ny, nx = patterns.shape[1:]
    reach = radius + 3 * edge + 1
    shifts, chosen = [], []
    y, x = np.mgrid[:ny, :nx]
    for i, (pattern, c) in enumerate(zip(patterns, centres, strict=True)):
        if np.isnan(c).any() or min(*c, ny - 1 - c[0], nx - 1 - c[1]) < reach:
            continue
        r = np.hypot(y - c[0], x - c[1])
        filled = fill(pattern)
        filled = filled - min(0.0, float(np.percentile(filled, 1)))
        total, inside = filled.sum(), filled[r <= reach].sum()
        if total <= 0 or inside < 0.98 * total:
            continue
        rest = np.where(r > reach + radius, filled, 0.0)
        if ndi.gaussian_filter(rest, radius / 2).max() * 2 * math.pi * (radius / 2) ** 2 > 0.01 * inside:
            continue
        chosen.append(i)
        shifts.append([ny // 2 - c[0], nx // 2 - c[1]])
    if not chosen:
        return None, 0
    total_image = np.zeros((ny, nx))
    for i, shift in zip(chosen, shifts, strict=True):
        total_image += np.clip(ndi.shift(fill(patterns[i]), shift, order=1), 0, None)
    r = np.hypot(y - ny // 2, x - nx // 2)
    taper = np.clip(reach + 1 - r, 0, 1)
    probe = total_image * taper
    if probe.sum() < 2e4:
        return None, len(chosen)
    return (probe / probe.sum()).astype(np.float32), len(chosen)


def check_probe(probe: Any, detector: tuple[int, int]) -> NDArray[np.float32]:
    """The probe as float32, or ValueError if it does not fit the detector or holds nothing."""
    array = np.asarray(probe, dtype=np.float32)
    if array.shape != tuple(detector):
        raise ValueError(
            f"the probe is {array.shape} px, the detector {tuple(detector)}; crop or pad the probe to fit"
        )
    array = np.where(np.isfinite(array), array, np.float32(0))
    if not (array.max() > 0 and array.sum() > 0):
        raise ValueError(
            "the vacuum probe is zero everywhere; store another one (fcunet convert --probe FILE), "
            "or drop it and let one be made from the measured radius: --no-use-stored-probe"
        )
    return array


def _positive(attrs: Mapping[str, Any], name: str) -> float:
    """A positive number among the attributes, NaN without one."""
    try:
        value = float(attrs[name])
    except (KeyError, TypeError, ValueError):
        return math.nan
    return value if value > 0 else math.nan


def _aperture_radius(attrs: Mapping[str, Any]) -> float:
    """Radius of the aperture in 1/angstrom from convergence angle and beam energy; NaN if not known."""
    energy = _positive(attrs, "beam_energy_keV")
    semiangle = _positive(attrs, "convergence_semiangle_mrad")
    return math.nan if math.isnan(energy) else semiangle * 1e-3 / wavelength(energy)


def calibrate(
    datacube: xr.Dataset,
    *,
    n_patterns: int = N_PATTERNS,
    seed: int = 0,
    probe: NDArray | None = None,
    use_stored_probe: bool = True,
    probe_radius_px: float | None = None,
    edge_sigma_px: float | None = None,
    centre: tuple[float, float] | None = None,
    min_peak_spacing: float | None = None,
    edge_boundary: int | None = None,
    sample: Sample | None = None,
) -> Calibration:
    """Measure what a disk detector needs to know, from a sample of the patterns.

    Parameters
    ----------
    datacube : Dataset
        `intensity` (scan_y, scan_x, qy, qx), lazy; optional `probe`, `detector_mask`, `origin_qy`,
        `origin_qx`.
    n_patterns, seed : int
        Size and choice of the sample, see `read_sample`.
    probe : ndarray, shape (qy, qx), optional
        Vacuum probe; default is the stored one, else a vacuum region of the scan, else a synthetic disk.
    use_stored_probe : bool
        False: ignore a probe stored with the scan.
    probe_radius_px, edge_sigma_px, centre, min_peak_spacing, edge_boundary : optional
        Set these by hand instead of measuring them; px, (y, x).
    sample : Sample, optional
        Patterns already read with `read_sample`.

    Returns
    -------
    Calibration

    Raises
    ------
    ValueError
        If there are no counts, no disk and no radius given, an all-zero probe, or a probe of another shape.
    """
    detector = (datacube.sizes["qy"], datacube.sizes["qx"])
    scan_shape = (datacube.sizes["scan_y"], datacube.sizes["scan_x"])
    given = probe
    source = "given"
    if given is None and use_stored_probe and "probe" in datacube:
        given, source = datacube["probe"].values, "stored"
    template = None if given is None else check_probe(given, detector)

    sample = sample or read_sample(datacube, n_patterns=n_patterns, seed=seed)
    masked = (
        ~datacube["detector_mask"].values if "detector_mask" in datacube else np.zeros(detector, dtype=bool)
    )
    hot, dead = find_bad_pixels(sample.patterns)
    dead &= ~masked
    bad = hot | dead | masked
    patterns = np.where(bad, np.nan, sample.patterns).astype(np.float32)
    notes: list[str] = []
    if (hot | dead).mean() > 0.02:
        notes.append(
            f"{100 * (hot | dead).mean():.1f} % of the pixels look hot or dead; check the detector shape"
        )

    clipped = ndi.binary_dilation(sample.saturated > 0.1)
    saturated_fraction = float((sample.saturated > 0.1).mean())
    if saturated_fraction:
        notes.append(
            f"the detector is saturated on {(sample.saturated > 0.1).sum()} px "
            f"(value {np.nanmax(patterns):g}): the direct beam is clipped, its intensity cannot be trusted"
        )

    require_counts(patterns)
    sums = summed_patches(sample, patterns)
    stored_fit = None if template is None else _fit_probe(template)
    known = probe_radius_px or (stored_fit.radius_px if stored_fit else None)
    try:
        coarse = float(probe_radius_px) if probe_radius_px else survey_radius(patterns, sums)
    except ValueError:
        if not known:
            raise
        coarse = float(known)
    beam_radius = max(coarse, _blob_radius(sample.saturated > 0.5)) if saturated_fraction else coarse
    stored_origin = _stored_origin(datacube)
    if stored_origin is None:
        centres, plane = direct_beam_centres(sample, patterns, sums, beam_radius, centre)
    else:
        centres = stored_origin[tuple(sample.position.T)]
        plane = fit_surface(sample.position, centres)[0]
    found = np.asarray(np.isfinite(centres).all(1))
    images = sums
    if len(sums) > 1 and found.any():
        shift = np.rint(centres[found].mean(0)) - centres[found]
        images = np.concatenate([aligned_mean(patterns[found], shift)[None], sums])
    if centre is None and stored_origin is None and _direct_beam(fill(images[0]), beam_radius)[1]:
        notes.append(
            "another disk is nearly as strong as the direct beam: the centre may be that of a Bragg disk "
            "(if so: --centre Y,X)"
        )
    fit = refine_radius(images, coarse, clipped)
    radius, edge, radius_std = fit.radius, fit.edge, fit.std
    if not fit.n_disks and not known:
        notes.append(f"no single disk could be fitted: the radius {coarse:.1f} px is good to about 15 % only")
    if stored_fit is not None:
        if fit.n_disks and abs(radius - stored_fit.radius_px) > 0.15 * stored_fit.radius_px:
            notes.append(
                f"the {source} probe has a radius of {stored_fit.radius_px:.1f} px, the disks have "
                f"{radius:.1f} px: another camera length?"
            )
        radius, edge, radius_std = stored_fit.radius_px, stored_fit.edge_sigma_px, math.nan
    if probe_radius_px is not None:
        radius, radius_std = float(probe_radius_px), math.nan
    if edge_sigma_px is not None:
        edge = float(edge_sigma_px)
    if not math.isnan(radius_std) and radius_std > 0.1 * radius:
        notes.append(f"the disk radius {radius:.1f} px is uncertain by {radius_std:.1f} px")
    nearest = fit.nearest
    if math.isnan(nearest):
        notes.append("only one disk stands out: no spacing could be measured")
    elif nearest < 2 * radius and fit.n_disks > 2:
        notes.append(f"the disks overlap (spacing {nearest:.1f} px, diameter {2 * radius:.1f} px)")

    if np.isnan(plane).any():
        notes.append("no direct beam found; the middle of the detector is taken for its centre")
        plane = np.array([[(detector[0] - 1) / 2, 0, 0], [(detector[1] - 1) / 2, 0, 0]])
    elif stored_origin is None and radius >= SMALL_RADIUS_PX and fit.n_disks and not saturated_fraction:
        # once more, with rings as narrow as the edge: half the scatter
        centres, plane = _track(sample, patterns, plane, radius, 0.5 * radius + 1.5, max(0.7, 1.2 * edge))
        found = np.asarray(np.isfinite(centres).all(1))
    residual = np.linalg.norm((centres - surface_at(plane, sample.position))[found], axis=1)
    origin_std = float(np.median(residual) / 1.1774) if len(residual) > 2 else math.nan  # Rayleigh
    if found.mean() < 0.5:
        notes.append(f"the direct beam was found in only {found.sum()} of {len(found)} sampled patterns")

    if template is None and not saturated_fraction:
        template, n_vacuum = vacuum_probe(sample, patterns, centres, radius, edge)
        source = "vacuum"
        if template is not None and n_vacuum == len(patterns):
            notes.append("no sampled pattern shows diffraction: is this a scan of the vacuum?")
    if template is None:
        distortion = _distortion(datacube.attrs)
        template, source = synthetic_probe(detector, radius, edge, distortion=distortion), "synthetic"
    templates = None
    if probe is None and use_stored_probe and {"templates", "template_index"} <= set(datacube):
        templates = np.stack([check_probe(one, detector) for one in datacube["templates"].values])

    aperture = _aperture_radius(datacube.attrs)
    expected = aperture / radius
    q = datacube["qy"] if "qy" in datacube.coords else None
    if q is not None and q.attrs.get("units") == schema.UNIT_Q and q.size > 1:
        stored_pixel = abs(float(q[1] - q[0]))
        if abs(stored_pixel / expected - 1) > 0.1:
            notes.append(
                f"detector pixel {stored_pixel:.5f} 1/angstrom as stored, {expected:.5f} from convergence "
                "angle and disk radius: one of them is wrong"
            )
        elif math.isnan(aperture):
            aperture = stored_pixel * float(radius)
    if min_peak_spacing is None:
        # a disk must not be found twice, nor noise between the disks, nor a neighbour be hidden
        apart = 0.0 if math.isnan(nearest) else nearest
        min_peak_spacing = max(2.0, 1.8 * (radius + edge), 0.4 * apart)
        min_peak_spacing = min(min_peak_spacing, 0.75 * apart) if apart else min_peak_spacing
    if edge_boundary is None:
        edge_boundary = max(1, min(math.ceil(radius + edge), min(detector) // 8))
    middle = np.array([1.0, (scan_shape[0] - 1) / 2, (scan_shape[1] - 1) / 2])
    return Calibration(
        centre=(float(plane[0] @ middle), float(plane[1] @ middle)),
        probe_radius_px=float(radius),
        edge_sigma_px=float(edge),
        probe=template,
        probe_source=source,
        bad_pixels=bad,
        min_peak_spacing=float(min_peak_spacing),
        edge_boundary=int(edge_boundary),
        scan_shape=scan_shape,
        origin_plane=plane,
        probe_radius_std_px=float(radius_std),
        nearest_spacing_px=float(nearest),
        origin_std_px=origin_std,
        n_patterns=len(patterns),
        n_disks=fit.n_disks,
        n_hot=int((hot & ~masked).sum()),
        n_dead=int(dead.sum()),
        n_masked=int(masked.sum()),
        saturated_fraction=saturated_fraction,
        q_pixel_expected=expected,
        beam_energy_keV=_positive(datacube.attrs, "beam_energy_keV"),
        aperture_radius=aperture,
        warnings=tuple(notes),
        origin_stored=stored_origin,
        templates=templates,
        template_index=None if templates is None else datacube["template_index"].values,
    )


def _distortion(attrs: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """The elliptical distortion kept with the scan, None without one."""
    ratio = _positive(attrs, "ellipse_ratio")
    return None if math.isnan(ratio) else Ellipse(ratio, float(attrs.get("ellipse_angle_degree", 0.0))).matrix


def _stored_origin(datacube: xr.Dataset) -> NDArray[np.float64] | None:
    """Beam centre (scan_y, scan_x, 2) kept with the scan, None without one."""
    if not {"origin_qy", "origin_qx"} <= set(datacube):
        return None
    stored = np.stack([datacube["origin_qy"].values, datacube["origin_qx"].values], axis=-1).astype(float)
    return stored if np.isfinite(stored).all() else None


def _blob_radius(mask: NDArray[np.bool_]) -> float:
    """Radius of the disk with the area of the largest connected region; 0 if there is none."""
    label, n = ndi.label(mask)
    return math.sqrt(float(ndi.sum_labels(mask, label, np.arange(1, n + 1)).max()) / math.pi) if n else 0.0


def _fit_probe(probe: NDArray[np.float32]) -> DiskFit | None:
    """Radius and edge of a recorded probe: area above half height for a start, then the fit."""
    image = probe.astype(float)
    top = float(np.percentile(image[image > 0.1 * image.max()], 80))
    above = image > 0.5 * top
    label, _ = ndi.label(above)
    sizes = ndi.sum_labels(above, label, np.arange(1, label.max() + 1))
    blob = label == 1 + int(np.argmax(sizes))
    y, x = np.nonzero(ndi.binary_fill_holes(blob))
    start = max(1.0, math.sqrt(len(y) / math.pi))
    centre = (float(y.mean()), float(x.mean()))
    fit = fit_disk(image, centre, start)
    if fit is not None:
        return fit
    total = disk_sum(image, centre, start)
    return DiskFit(centre, start, max(0.5, 0.1 * start), total / (math.pi * start**2), 0.0, math.nan)
