"""Strain from a measured and a reference lattice, with error bars (NumPy, any number of positions at once).

Axes: x runs along columns, y along rows (down on a screen). A lattice `g` has rows g1, g2 and columns (y, x).
A tensor such as F acts on vectors (y, x), so ``F[0, 0]`` is F_yy, ``F[0, 1]`` F_yx, ``F[1, 0]`` F_xy and
``F[1, 1]`` F_xx. Rotations are positive from +x towards +y.

With real-space vectors a_i as the rows of A, A @ G.T = 1, hence A = inv(G).T; from a = F a_ref, that is
A = A_ref @ F.T, it follows that F = inv(G) @ G_ref. Every other quantity here is a function of F.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Measure = Literal["infinitesimal", "biot", "green_lagrange", "hencky"]
Convention = Literal["fcunet", "py4dstem", "pyxem", "quantem"]
MEASURES: tuple[str, ...] = get_args(Measure)
CONVENTIONS: tuple[str, ...] = get_args(Convention)
COMPONENTS = ("e_xx", "e_yy", "e_xy", "theta")

Array = NDArray[np.float64]

_ALIKE_UNSIGNED = 0.8  # of shared dilations without a sign, where the peaks are not at hand
_SHEAR = (0.35, 0.2)  # that goes with a shared dilation without and with a sign
_CHUNK = 16384  # positions whose 4 x 4 covariances are held at once: a few MB


def deformation_gradient(g: ArrayLike, g_ref: ArrayLike) -> Array:
    """Real-space deformation gradient from measured reciprocal lattice vectors.

    Parameters
    ----------
    g : array_like, shape (..., 2, 2)
        Rows g1 and g2, columns (y, x), any reciprocal unit. NaN where no lattice was found.
    g_ref : array_like, shape (..., 2, 2)
        The unstrained lattice, same layout and unit; broadcast against `g`.

    Returns
    -------
    ndarray, shape (..., 2, 2)
        F with ``a = F @ a_ref`` for real-space vectors (y, x); dimensionless. NaN where `g` is NaN
        or singular.

    Raises
    ------
    ValueError
        If `g_ref` is not finite or is singular, i.e. g1 and g2 are parallel, or a shape does not fit.

    Notes
    -----
    Reciprocal vectors transform with the inverse transpose of F, so F is ``inv(g) @ g_ref``. Its inverse
    ``inv(g_ref) @ g`` gives the strain with opposite sign, and only to first order.
    """
    return _inverse(_matrices(g, "g")) @ _reference(g_ref)


def rotate_frame(F: ArrayLike, rotation_degree: float = 0.0, *, transpose: bool = False) -> Array:
    """Components of the tensor `F` along other axes, as a scan that is turned against the detector has.

    Parameters
    ----------
    F : array_like, shape (..., 2, 2)
        Tensor in the detector frame, axes (y, x).
    rotation_degree : float
        By how much the new +x axis is turned from the old one, from +x towards +y, in degrees.
    transpose : bool
        Exchange the detector's x and y first, for a detector read out with rows and columns swapped.

    Returns
    -------
    ndarray, shape (..., 2, 2)
        The same tensor in the turned frame, axes (y, x).
    """
    F = _matrices(F, "F")
    if transpose:
        F = F[..., ::-1, ::-1]
    c, s = np.cos(np.deg2rad(rotation_degree)), np.sin(np.deg2rad(rotation_degree))
    turn = np.array([[c, -s], [s, c]])  # (y, x) components of a vector, old frame -> new frame
    return turn @ F @ turn.T


def strain_from_F(
    F: ArrayLike, measure: Measure = "infinitesimal", convention: Convention = "fcunet"
) -> dict[str, Array]:
    """Strain components and rotation of a deformation gradient.

    Parameters
    ----------
    F : array_like, shape (..., 2, 2)
        Deformation gradient, axes (y, x).
    measure : str
        With F = R U (rotation after stretch): ``"infinitesimal"`` sym(F) - 1, ``"biot"`` U - 1,
        ``"green_lagrange"`` (F^T F - 1) / 2, ``"hencky"`` ln U. All agree to first order.
    convention : str
        ``"fcunet"``, or the formula and signs of a peer (then `measure` must stay ``"infinitesimal"``):

        ``"py4dstem"``
            From the reciprocal map beta = inv(F).T: 1 - beta_ii, -(beta_xy + beta_yx) / 2. Equal to ours to
            first order, smaller by e^2 to second.
        ``"quantem"``
            sym(F) - 1 as ours, rotation of opposite sign (positive from rows towards columns).
        ``"pyxem"``
            beta = V R: 1 / V_ii - 1 and V_xy, so the shear has the opposite sign; rotation of opposite sign.

    Returns
    -------
    dict of ndarray, shape (...)
        ``e_xx`` (along columns), ``e_yy`` (along rows), ``e_xy`` (tensor shear), dimensionless, and ``theta``
        in rad: for ``"infinitesimal"`` (F_yx - F_xy) / 2, for the finite measures the angle of R. Positive
        from +x towards +y. NaN where `F` is NaN. The names of the axes are ours in every convention; py4DSTEM
        calls rows x and columns y.

    References
    ----------
    Measured on the formulae of py4DSTEM 0.14.18, quantem and pyxem; they differ by 5e-4 at 2 % strain.
    """
    F = _matrices(F, "F")
    _check_choice(measure, convention)
    yy, yx, xy, xx = _components(F)
    if convention == "py4dstem":
        yy, yx, xy, xx = _components(_inverse(F))  # of inv(F); beta is its transpose
        return _named(1 - xx, 1 - yy, -(xy + yx) / 2, (xy - yx) / 2)
    if convention == "quantem":
        return _named(xx - 1, yy - 1, (xy + yx) / 2, (xy - yx) / 2)
    if convention == "pyxem":
        beta = np.swapaxes(_inverse(F), -1, -2)
        angle = _rotation_angle(beta)
        yy, yx, xy, xx = _components(beta @ np.swapaxes(_rotation_matrix(angle), -1, -2))  # V of beta = V R
        with np.errstate(divide="ignore", invalid="ignore"):
            return _named(1 / xx - 1, 1 / yy - 1, (xy + yx) / 2, -angle)
    if measure == "infinitesimal":
        return _named(xx - 1, yy - 1, (xy + yx) / 2, (yx - xy) / 2)

    angle = _rotation_angle(F)
    if measure == "green_lagrange":
        return _named((xx**2 + yx**2 - 1) / 2, (yy**2 + xy**2 - 1) / 2, (xx * xy + yy * yx) / 2, angle)
    yy, yx, xy, xx = _components(np.swapaxes(_rotation_matrix(angle), -1, -2) @ F)  # U, symmetric
    if measure == "biot":
        return _named(xx - 1, yy - 1, (xy + yx) / 2, angle)
    mean, half, shear = (xx + yy) / 2, (xx - yy) / 2, (xy + yx) / 2
    radius = np.hypot(half, shear)
    with np.errstate(divide="ignore", invalid="ignore"):
        spherical = (
            np.log((mean - radius) * (mean + radius)) / 2
        )  # half the sum of the logarithms of the stretches
        slope = np.where(radius > 0, np.arctanh(radius / mean) / radius, 1 / mean)
    return _named(spherical + slope * half, spherical - slope * half, slope * shear, angle)


def gradient_covariance(
    g: ArrayLike, g_ref: ArrayLike, covariance: ArrayLike, *, reference_covariance: ArrayLike | None = None
) -> Array:
    """Covariance of F from those of the measured and the reference lattice, to first order.

    Parameters
    ----------
    g : array_like, shape (..., 2, 2)
        Measured lattice, rows g1, g2, columns (y, x).
    g_ref : array_like, shape (2, 2)
        Reference lattice.
    covariance : array_like, shape (..., 4, 4) or (..., 6, 6)
        Of (g1_y, g1_x, g2_y, g2_x), or of the same after (origin_y, origin_x), in the unit of `g` squared.
    reference_covariance : array_like, shape (4, 4) or (6, 6), optional
        That of `g_ref`, taken as independent of `g`. None: the reference is exact.

    Returns
    -------
    ndarray, shape (..., 4, 4)
        Covariance of (F_yy, F_yx, F_xy, F_xx). NaN where an input is NaN.

    Notes
    -----
    dF = inv(g) @ dg_ref - inv(g) @ dg @ F.
    """
    inverse, reference = _inverse(_matrices(g, "g")), _reference(g_ref)
    F = inverse @ reference
    jacobian = -np.einsum("...ik,...lj->...ijkl", inverse, F).reshape(*F.shape[:-2], 4, 4)
    result = jacobian @ _lattice_block(covariance) @ np.swapaxes(jacobian, -1, -2)
    if reference_covariance is not None:
        jacobian = np.einsum("...ik,lj->...ijkl", inverse, np.eye(2)).reshape(*F.shape[:-2], 4, 4)
        result = result + jacobian @ _lattice_block(reference_covariance) @ np.swapaxes(jacobian, -1, -2)
    return result


def strain_std(
    g: ArrayLike,
    g_ref: ArrayLike,
    covariance: ArrayLike,
    *,
    reference_covariance: ArrayLike | None = None,
    measure: Measure = "infinitesimal",
    convention: Convention = "fcunet",
    rotation_degree: float = 0.0,
    transpose: bool = False,
) -> dict[str, Array]:
    """Standard deviations of the strain components, to first order in the errors of the lattice.

    Parameters
    ----------
    g, g_ref, covariance, reference_covariance
        As for :func:`gradient_covariance`.
    measure, convention
        As for :func:`strain_from_F`.
    rotation_degree, transpose
        As for :func:`rotate_frame`; the components are those in the turned frame.

    Returns
    -------
    dict of ndarray, shape (...)
        ``e_xx_std``, ``e_yy_std``, ``e_xy_std`` (dimensionless) and ``theta_std`` (rad). NaN where unknown.
    """
    g = _matrices(g, "g")
    covariance = _lattice_block(covariance)
    lead = g.shape[:-2]
    flat, flat_covariance = g.reshape(-1, 2, 2), np.broadcast_to(covariance, (*lead, 4, 4)).reshape(-1, 4, 4)
    of_reference = np.zeros((4, 4)) if reference_covariance is None else _lattice_block(reference_covariance)
    of_reference = np.broadcast_to(of_reference, (*lead, 4, 4)).reshape(-1, 4, 4)
    out = {f"{name}_std": np.empty(len(flat)) for name in COMPONENTS}
    step = 1e-5  # central differences: truncation 1e-10, rounding 1e-11
    for start in range(0, len(flat), _CHUNK):
        part = slice(start, start + _CHUNK)
        F = deformation_gradient(flat[part], g_ref)
        of_F = gradient_covariance(
            flat[part], g_ref, flat_covariance[part], reference_covariance=of_reference[part]
        )
        gradient = np.empty((len(F), 4, 4))  # component of the strain, component of F
        for j in range(4):
            shift = np.zeros(4)
            shift[j] = step
            sides = [
                strain_from_F(
                    rotate_frame(F + sign * shift.reshape(2, 2), rotation_degree, transpose=transpose),
                    measure,
                    convention,
                )
                for sign in (1, -1)
            ]
            for i, name in enumerate(COMPONENTS):
                gradient[:, i, j] = (sides[0][name] - sides[1][name]) / (2 * step)
        variance = np.einsum("nij,njk,nik->ni", gradient, of_F, gradient)
        for i, name in enumerate(COMPONENTS):
            out[f"{name}_std"][part] = np.sqrt(np.maximum(variance[:, i], 0))
    return {name: values.reshape(lead) for name, values in out.items()}


def with_shared_strain(covariance: ArrayLike, g: ArrayLike, std: ArrayLike, signed: ArrayLike = 0.0) -> Array:
    """Covariance of lattices whose peaks share a strain that the fit cannot see.

    A detector may misjudge the disks of one pattern alike, all outwards or all inwards, and by more along one
    direction. Such an error leaves no residual and does not average out over the peaks.

    Parameters
    ----------
    covariance : array_like, shape (..., 6, 6)
        Of (origin_y, origin_x, g1_y, g1_x, g2_y, g2_x), px^2, from independent errors of the peaks.
    g : array_like, shape (..., 2, 2)
        Lattice vectors, rows g1, g2, px.
    std : array_like, shape (...) or ()
        Standard deviation of the shared dilation, a strain; NaN counts as 0. The shears that go with it:
        :func:`shared_shear`.
    signed : array_like, shape (...) or ()
        The part of it whose direction is known.

    Returns
    -------
    array, shape (..., 6, 6)
        px^2. The origin, which such an error moves little, is as before.
    """
    vectors = np.asarray(g, dtype=np.float64)
    out = np.array(covariance, dtype=np.float64)
    dilation = np.nan_to_num(np.asarray(std, dtype=np.float64))
    shear = dilation * shared_shear(signed)
    for strain, size in ((np.eye(2), dilation), (np.diag([1.0, -1.0]), shear), (np.eye(2)[::-1], shear)):
        moved = (vectors @ strain).reshape(*vectors.shape[:-2], 4)
        out[..., 2:, 2:] += np.square(size)[..., None, None] * moved[..., :, None] * moved[..., None, :]
    return out


def shared_shear(signed: ArrayLike) -> Array:
    """Shear that the disks of a pattern share, in units of the dilation that they share.

    Of each, (e_xx - e_yy) / 2 and e_xy, standard deviations; a rotation they do not share. Measured on
    crystals of the training and held-out ones: 0.35 of a dilation without a sign (the network), 0.2 of one
    with (correlation).
    """
    return np.where(np.nan_to_num(np.asarray(signed, dtype=np.float64)) == 0, *_SHEAR)


def shared_dilation_left(
    std: ArrayLike,
    signed: ArrayLike,
    reference: tuple[float, float] | None,
    ratio: ArrayLike | None = None,
    *,
    floor: float = 0.0,
) -> Array:
    """What a shared dilation leaves of itself in the difference of two lattices.

    Parameters
    ----------
    std : array_like
        Standard deviation of the dilation that the peaks of a pattern share. NaN counts as 0.
    signed : array_like
        The part of it whose direction is known, with its sign.
    reference : (float, float), optional
        Both of the reference, a pattern of the same crystal. None: the reference is exact.
    ratio : array_like, optional
        How unlike the two are: :func:`fcunet.kernels.residuals.residual_ratio`. NaN: not known.
    floor : float
        The part of all of these, in quadrature, that is the same error in every pattern.

    Returns
    -------
    array, shape of `std`
        Standard deviation of the difference.

    Notes
    -----
    Patterns of one crystal err alike, by amounts that their standard deviations tell. Of the signed parts a
    and b, and the rests r and s, ``sqrt((a - b)^2 + (r - s)^2)`` is left. A detector that knows no sign (the
    network) states less of what patterns have in common: there ``ratio^2 sqrt((r^2 + s^2) / 2)`` is left, at
    most ``sqrt(r^2 + s^2)``, as seen on crystals of the training (`benchmarks.neighbours`), and without
    `ratio` the rests are taken as alike to 0.8, ``sqrt(r^2 + s^2 - 1.6 r s)``.
    """
    total, known = (np.nan_to_num(np.asarray(v, dtype=np.float64)) for v in (std, signed))
    if reference is None:
        return np.asarray(total)
    unsigned = (known == 0) & (reference[1] == 0)
    rest, rest_of_reference = (
        np.sqrt(np.maximum(t**2 - k**2 - floor**2, 0)) for t, k in ((total, known), reference)
    )
    alike = np.where(unsigned, _ALIKE_UNSIGNED, 1.0)
    square = (rest - rest_of_reference) ** 2 + 2 * (1 - alike) * rest * rest_of_reference
    left = np.hypot(known - reference[1], np.sqrt(square))
    if ratio is None:
        return np.asarray(left)
    unlike = np.asarray(ratio, dtype=np.float64)
    independent = np.sqrt(rest**2 + rest_of_reference**2)  # no two can differ by more
    measured = np.minimum(unlike**2 / np.sqrt(2), 1.0) * independent
    return np.where(unsigned & np.isfinite(unlike), measured, left)


def principal_strains(e_xx: ArrayLike, e_yy: ArrayLike, e_xy: ArrayLike) -> dict[str, Array]:
    """Principal strains, their direction, dilation and largest shear.

    Parameters
    ----------
    e_xx, e_yy, e_xy : array_like, any one shape
        Components of a symmetric strain tensor.

    Returns
    -------
    dict of ndarray
        ``e_1`` >= ``e_2`` (dimensionless), ``angle`` of the direction of e_1 in rad, from +x towards +y, in
        (-pi/2, pi/2], ``dilation`` e_xx + e_yy (change of area), ``max_shear`` (e_1 - e_2) / 2. NaN where an
        input is NaN.
    """
    xx, yy, xy = (np.asarray(e, dtype=np.float64) for e in (e_xx, e_yy, e_xy))
    mean, radius = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    angle = np.arctan2(2 * xy, xx - yy) / 2
    return {
        "e_1": mean + radius,
        "e_2": mean - radius,
        "angle": angle,
        "dilation": xx + yy,
        "max_shear": radius,
    }


def _named(e_xx: Array, e_yy: Array, e_xy: Array, theta: Array) -> dict[str, Array]:
    """Components under their names."""
    return dict(zip(COMPONENTS, (e_xx, e_yy, e_xy, theta), strict=True))


def _components(tensor: Array) -> tuple[Array, Array, Array, Array]:
    """The yy, yx, xy, xx components of tensors (..., 2, 2)."""
    return tensor[..., 0, 0], tensor[..., 0, 1], tensor[..., 1, 0], tensor[..., 1, 1]


def _rotation_angle(F: Array) -> Array:
    """Angle of R in F = R U (and F = V R), from +x towards +y."""
    yy, yx, xy, xx = _components(F)
    return np.arctan2(yx - xy, xx + yy)


def _rotation_matrix(angle: Array) -> Array:
    """R for vectors (y, x): turns +x towards +y by `angle`."""
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([c, s], -1), np.stack([-s, c], -1)], -2)


def _inverse(m: Array) -> Array:
    """Inverse of (..., 2, 2); NaN where singular."""
    determinant = m[..., 0, 0] * m[..., 1, 1] - m[..., 0, 1] * m[..., 1, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(determinant == 0, np.nan, 1 / determinant)
    rows = [[m[..., 1, 1], -m[..., 0, 1]], [-m[..., 1, 0], m[..., 0, 0]]]
    return np.stack([np.stack(row, -1) for row in rows], -2) * scale[..., None, None]


def _matrices(values: ArrayLike, name: str) -> Array:
    """As float64 (..., 2, 2)."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape[-2:] != (2, 2):
        raise ValueError(
            f"{name} has shape {array.shape}, needed is (..., 2, 2): rows g1, g2 and columns (y, x)"
        )
    return array


def _reference(g_ref: ArrayLike) -> Array:
    """Checked reference lattice."""
    reference = _matrices(g_ref, "g_ref")
    area = np.abs(np.linalg.det(reference)) if np.isfinite(reference).all() else np.array(0.0)
    if not (area > 1e-9 * np.sum(reference**2, axis=(-1, -2))).all():
        raise ValueError(
            f"the reference lattice {reference.tolist()} has no area: its vectors are parallel, zero or "
            "missing; give two independent vectors (y, x), or a reference region where a lattice was found"
        )
    return reference


def _lattice_block(covariance: ArrayLike) -> Array:
    """The 4 x 4 part of a covariance that belongs to g1 and g2."""
    array = np.asarray(covariance, dtype=np.float64)
    if array.shape[-2:] not in ((4, 4), (6, 6)):
        raise ValueError(f"covariance has shape {array.shape}, needed is (..., 4, 4) or (..., 6, 6)")
    return array[..., -4:, -4:]


def _check_choice(measure: str, convention: str) -> None:
    """Refuse unknown or contradictory choices."""
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r}; choose one of {', '.join(MEASURES)}")
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}; choose one of {', '.join(CONVENTIONS)}")
    if convention != "fcunet" and measure != "infinitesimal":
        raise ValueError(
            f"convention={convention!r} has a formula of its own, so measure={measure!r} cannot be had with "
            "it; leave measure='infinitesimal', or use convention='fcunet'"
        )
