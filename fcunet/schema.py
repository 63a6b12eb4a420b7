"""Every dimension, variable and unit of the three stores, spelt once.

The stores are described in prose in ``docs/concepts.md``. This module holds the names, and checks that refuse
a dataset which does not follow them. It imports nothing of ours and no array library: the checks only look at
``dims``, ``dtype`` and ``attrs``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 1
FORMATS = ("datacube", "peaks", "results")

SCAN_DIMS = ("scan_y", "scan_x")
PATTERN_DIMS = ("qy", "qx")
DATACUBE_DIMS = SCAN_DIMS + PATTERN_DIMS
PEAK_DIMS = (*SCAN_DIMS, "peak")
BLOCK_DIMS = ("block_y", "block_x")

UNIT_SCAN = "nm"
UNIT_Q = "1/angstrom"
UNIT_PIXEL = "px"

MAX_PEAKS = 128

# values of `status` in the peaks store, one per block
STATUS_TODO, STATUS_DONE, STATUS_FAILED = 0, 1, 2


@dataclass(frozen=True)
class Variable:
    """Name, dimensions, dtype kind(s) as in ``numpy.dtype.kind``, unit and meaning of one stored variable."""

    name: str
    dims: tuple[str, ...]
    kinds: str
    units: str | None
    long_name: str

    @property
    def attrs(self) -> dict[str, str]:
        """Attributes to write with the variable."""
        return {"long_name": self.long_name} | ({"units": self.units} if self.units else {})


def _table(*variables: Variable) -> dict[str, Variable]:
    return {v.name: v for v in variables}


# `intensity` keeps the detector's own integer or float type; `units` of coordinates are nm, 1/angstrom or px.
DATACUBE = _table(
    Variable("intensity", DATACUBE_DIMS, "uif", "counts", "diffracted intensity"),
    Variable("probe", PATTERN_DIMS, "f", None, "vacuum probe"),
    Variable("detector_mask", PATTERN_DIMS, "b", None, "detector pixels to use"),
    Variable("origin_qy", SCAN_DIMS, "f", UNIT_PIXEL, "row of the beam centre"),
    Variable("origin_qx", SCAN_DIMS, "f", UNIT_PIXEL, "column of the beam centre"),
    Variable("templates", ("template", *PATTERN_DIMS), "f", None, "vacuum probes of regions of the scan"),
    Variable("template_index", SCAN_DIMS, "iu", None, "which of the templates to use"),
)

# root attributes of a datacube, each left out where it is not known
DATACUBE_ATTRS = (
    "title",
    "source_file",
    "source_format",
    "source_fingerprint",
    "reader",
    "handedness",
    "beam_energy_keV",
    "convergence_semiangle_mrad",
    "camera_length_mm",
    "scan_rotation_degree",
    "scan_transposed",
    "ellipse_ratio",
    "ellipse_angle_degree",
    "dwell_time_us",
    "detector",
    "simulated",
)

# those that say how the detector lies against the scan; vectors on it are taken apart in the order ellipse,
# exchange of rows and columns, rotation
GEOMETRY_ATTRS = ("scan_rotation_degree", "scan_transposed", "ellipse_ratio", "ellipse_angle_degree")

# scan-shaped by-products of the pass that finds the peaks
VIRTUAL = _table(
    Variable("bf", SCAN_DIMS, "f", "counts", "bright field: sum inside the central disk"),
    Variable("adf", SCAN_DIMS, "f", "counts", "annular dark field: sum outside the central disk"),
    Variable("total", SCAN_DIMS, "f", "counts", "sum over the detector"),
    Variable("com_qy", SCAN_DIMS, "f", UNIT_PIXEL, "row of the centre of mass"),
    Variable("com_qx", SCAN_DIMS, "f", UNIT_PIXEL, "column of the centre of mass"),
)

PEAK_VARIABLES = _table(
    Variable("peak_qy", PEAK_DIMS, "f", UNIT_PIXEL, "row of the Bragg peak, raw detector pixels"),
    Variable("peak_qx", PEAK_DIMS, "f", UNIT_PIXEL, "column of the Bragg peak, raw detector pixels"),
    Variable("peak_intensity", PEAK_DIMS, "f", None, "strength of the Bragg peak"),
    Variable("peak_sigma", PEAK_DIMS, "f", UNIT_PIXEL, "standard deviation of the peak position, per axis"),
)

SHARED_DILATION = _table(
    Variable(
        "shared_dilation_std",
        SCAN_DIMS,
        "f",
        "1",
        "standard deviation of a dilation that all peaks of the pattern share beside their own errors",
    ),
    Variable(
        "shared_dilation",
        SCAN_DIMS,
        "f",
        "1",
        "the part of shared_dilation_std with a known sign, negative where peaks are expected too far in",
    ),
)

PEAKS = (
    PEAK_VARIABLES
    | _table(
        Variable("n_peaks", SCAN_DIMS, "iu", "1", "number of Bragg peaks kept"),
        Variable("truncated", SCAN_DIMS, "b", None, "more peaks were found than the store holds"),
    )
    | SHARED_DILATION
    | VIRTUAL
    | _table(Variable("status", BLOCK_DIMS, "iu", None, "0 to do, 1 done, 2 failed"))
)

STRAIN_COMPONENTS = ("e_xx", "e_yy", "e_xy", "theta")
_STRAIN_NAMES = {
    "e_xx": "normal strain along x",
    "e_yy": "normal strain along y",
    "e_xy": "shear strain (tensor shear, half the engineering shear)",
    "theta": "lattice rotation, positive from +x towards +y",
}

STRAIN = _table(
    *(
        Variable(c, SCAN_DIMS, "f", "rad" if c == "theta" else "1", _STRAIN_NAMES[c])
        for c in STRAIN_COMPONENTS
    ),
    *(
        Variable(f"{c}_std", SCAN_DIMS, "f", "rad" if c == "theta" else "1", f"standard deviation of {c}")
        for c in STRAIN_COMPONENTS
    ),
    Variable("valid", SCAN_DIMS, "b", None, "a lattice was found here"),
    Variable("grain", SCAN_DIMS, "iu", None, "grain label, 0 where there is no lattice"),
    Variable("e_1", SCAN_DIMS, "f", "1", "larger principal strain"),
    Variable("e_2", SCAN_DIMS, "f", "1", "smaller principal strain"),
    Variable("principal_angle", SCAN_DIMS, "f", "rad", "direction of e_1, from +x towards +y"),
    Variable("dilation", SCAN_DIMS, "f", "1", "e_xx + e_yy"),
    Variable("max_shear", SCAN_DIMS, "f", "1", "(e_1 - e_2) / 2"),
)

# `covariance` is that of (origin_qy, origin_qx, g1_qy, g1_qx, g2_qy, g2_qx), in px^2.
LATTICE_PARAMETERS = ("origin_qy", "origin_qx", "g1_qy", "g1_qx", "g2_qy", "g2_qx")
LATTICE = _table(
    *(
        Variable(
            p, SCAN_DIMS, "f", UNIT_PIXEL, f"{'row' if p.endswith('y') else 'column'} of {p.split('_')[0]}"
        )
        for p in LATTICE_PARAMETERS
    ),
    Variable(
        "covariance", (*SCAN_DIMS, "parameter", "parameter2"), "f", "px^2", "covariance of the lattice fit"
    ),
    Variable("fit_error", SCAN_DIMS, "f", UNIT_PIXEL, "rms distance of the indexed peaks from the lattice"),
    Variable("n_indexed", SCAN_DIMS, "iu", "1", "number of peaks in the lattice fit"),
    Variable("score", SCAN_DIMS, "f", None, "gain in log-likelihood of the lattice over unrelated peaks"),
    Variable("lattice_id", SCAN_DIMS, "iu", None, "which of the lattices of the scan, from 1; 0 for none"),
    *SHARED_DILATION.values(),
    Variable("F", (*SCAN_DIMS, "row", "column"), "f", "1", "real-space deformation gradient, axes (y, x)"),
)

DIFFRACTION = _table(
    Variable("mean", PATTERN_DIMS, "f", "counts", "mean diffraction pattern"),
    Variable("maximum", PATTERN_DIMS, "f", "counts", "maximum over the scan, pixel by pixel"),
    Variable(
        "bragg_vector_map", PATTERN_DIMS, "f", None, "histogram of the Bragg peaks, weighted by intensity"
    ),
)

# what a run knows of the trust in each position, beside the strain
TRUST = _table(
    Variable("residual_ratio", SCAN_DIMS, "f", "1", "residuals less those of the reference, over residuals"),
    Variable(
        "outside_training",
        SCAN_DIMS,
        "iu",
        None,
        "pattern unlike those of the network's training, bit by bit",
    ),
    Variable("source", SCAN_DIMS, "iu", None, "1: the first method; 2: the second opinion; 0: no lattice"),
)

# the same scan by another method, and how far the two are apart
SECOND = {
    name: STRAIN[name] for name in (*STRAIN_COMPONENTS, *(f"{c}_std" for c in STRAIN_COMPONENTS), "valid")
} | _table(
    Variable("disagreement", SCAN_DIMS, "f", "1", "rms difference of e_xx, e_yy, e_xy of two methods"),
    Variable("disagreement_sigma", SCAN_DIMS, "f", "1", "the same in units of the error bars of both"),
)

RESULT_GROUPS: dict[str, dict[str, Variable]] = {
    "strain": STRAIN | TRUST,
    "second": SECOND,
    "lattice": LATTICE,
    # of positions with more than one: the second best, or the second of the known crystals
    **{f"{group}_{n}": table for n in (2, 3) for group, table in (("strain", STRAIN), ("lattice", LATTICE))},
    "virtual": VIRTUAL,
    "diffraction": DIFFRACTION,
}
TRUTH = _table(*(STRAIN[c] for c in STRAIN_COMPONENTS))

_FORMAT_KEY, _VERSION_KEY = "fcunet_format", "fcunet_format_version"


def format_attrs(kind: str) -> dict[str, Any]:
    """Root attributes that mark a store as ours: format name and version."""
    if kind not in FORMATS:
        raise ValueError(f"unknown store kind {kind!r}; known: {', '.join(FORMATS)}")
    return {_FORMAT_KEY: kind, _VERSION_KEY: FORMAT_VERSION}


def check_format(attrs: Mapping[str, Any], kind: str, where: str = "this store") -> None:
    """Raise ValueError unless `attrs` are those of a store of this `kind` that this version can read."""
    found = attrs.get(_FORMAT_KEY)
    if found is None:
        raise ValueError(
            f"{where} is not an fcunet {kind} store (attribute {_FORMAT_KEY!r} is missing); "
            "make one with: fcunet convert INPUT OUTPUT.zarr"
        )
    if found != kind:
        raise ValueError(f"{where} is an fcunet {found} store, but a {kind} store is needed here")
    version = int(attrs.get(_VERSION_KEY, 0))
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {version}, this fcunet reads up to {FORMAT_VERSION}; "
            "upgrade with: pip install --upgrade fcunet"
        )


def check_variables(
    dataset: Any,
    table: Mapping[str, Variable],
    *,
    required: Iterable[str] | None = None,
    where: str = "dataset",
) -> None:
    """Raise ValueError if a variable of `table` is missing from `dataset` or has other dims or dtype.

    `required` names the variables that must be there (default: all of `table`); those of `table` that are
    present are always checked. Variables unknown to `table` are left alone.
    """
    missing = [name for name in (table if required is None else required) if name not in dataset]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}; it has {', '.join(map(str, dataset)) or 'nothing'}"
        )
    for name, variable in table.items():
        if name not in dataset:
            continue
        array = dataset[name]
        if tuple(array.dims) != variable.dims:
            raise ValueError(
                f"{name!r} in {where} has dimensions {tuple(array.dims)}, needed are {variable.dims}"
            )
        if array.dtype.kind not in variable.kinds:
            raise ValueError(
                f"{name!r} in {where} has dtype {array.dtype}, needed is kind {variable.kinds!r}"
            )


def scan_coords(source: Any) -> dict[str, Any]:
    """Those of `scan_y, scan_x` that an array or dataset has as coordinates, units and all."""
    return {dim: source[dim] for dim in SCAN_DIMS if dim in source.coords}


def check_datacube(dataset: Any, where: str = "datacube") -> None:
    """Raise ValueError unless `dataset` has `intensity` with the right dimensions, and sane companions."""
    check_variables(dataset, DATACUBE, required=["intensity"], where=where)


def check_peaks(dataset: Any, where: str = "peaks") -> None:
    """Raise ValueError unless `dataset` holds padded Bragg peaks: positions, intensity and `n_peaks`."""
    check_variables(dataset, PEAKS, required=["peak_qy", "peak_qx", "peak_intensity", "n_peaks"], where=where)


def check_results(tree: Any, where: str = "results") -> None:
    """Raise ValueError unless the DataTree `tree` has `/strain` and `/lattice` as the schema says."""
    for group in ("strain", "lattice"):
        if group not in tree.children:
            raise ValueError(f"{where} lacks the group /{group}; it has {', '.join(tree.children) or 'none'}")
    for group, table in RESULT_GROUPS.items():
        if group in tree.children:
            required = (
                STRAIN_COMPONENTS if group == "strain" else LATTICE_PARAMETERS if group == "lattice" else ()
            )
            check_variables(tree[group].dataset, table, required=required, where=f"{where}/{group}")
