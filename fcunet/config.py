"""The settings of a run. The same names serve as YAML keys, command-line options and arguments of the API.

Values come, weakest first, from the defaults below, a YAML file, environment variables (``FCUNET_OUT=...``,
``FCUNET_DETECTION__CORR_POWER=0.9``) and explicit arguments. An unknown key is an error that names it.
``None`` means *measure it from the data*; what was measured is printed and kept with the results.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from .schema import MAX_PEAKS

Region = tuple[int, int, int, int]
Vectors = tuple[tuple[float, float], tuple[float, float]]

_SECRET = re.compile("key|secret|token|passw|credential|auth|cookie|sas|signature|connection_string", re.I)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DetectionConfig(_Section):
    """How Bragg peaks are found. The six peak parameters have py4DSTEM's meaning."""

    method: Literal["fcunet", "correlation", "cepstral"] = Field(
        "fcunet", description="network, correlation with the probe, or cepstral: no disks at all"
    )
    weights: str = Field("default", description="name of packaged weights, or the path of a weights folder")
    threshold: float | None = Field(
        None, ge=0, description="network: smallest peak height kept; None = the weights' own"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="network arithmetic; auto = bf16 where the device has it"
    )
    batch: int | None = Field(None, ge=1, description="patterns at once; None = fitted to the device")

    corr_power: float = Field(1.0, ge=0, le=1, description="1 cross, 0 phase, between: hybrid correlation")
    kernel: Literal["flat", "gaussian", "sigmoid"] = Field(
        "flat", description="what surrounds the probe in the kernel"
    )
    kernel_radii: tuple[float, float] | None = Field(
        None, description="inner, outer radius of the kernel's ring, px"
    )
    transform: Literal["none", "sqrt", "log"] = Field(
        "log", description="applied to the counts before correlation"
    )
    sigma_dp: float = Field(0.0, ge=0, description="Gaussian blur of the pattern, px")
    sigma_cc: float = Field(1.0, ge=0, description="Gaussian blur of the correlation, px")
    subpixel: Literal["pixel", "parabola", "upsampled"] = Field(
        "upsampled", description="position refinement"
    )
    upsample_factor: int = Field(16, ge=3, description="DFT upsampling factor")

    min_absolute_intensity: float = Field(0.0, ge=0, description="drop peaks below this height")
    min_relative_intensity: float = Field(
        0.005, ge=0, le=1, description="drop peaks below this share of one peak"
    )
    relative_to_peak: int = Field(0, ge=0, description="rank of that one peak, 0 = brightest")
    min_peak_spacing: float | None = Field(None, ge=0, description="smallest distance of two peaks, px")
    edge_boundary: int | None = Field(None, ge=0, description="margin of the detector without peaks, px")
    max_num_peaks: int = Field(MAX_PEAKS, ge=1, description="peaks kept per pattern, and stored")

    @field_validator("kernel_radii", mode="before")
    @classmethod
    def _parse_radii(cls, value: Any) -> Any:
        return parse_numbers(value, 2, "kernel_radii") if isinstance(value, str) else value


class CalibrationConfig(_Section):
    """What is known of the probe and the beam; the rest is measured from a sample of the patterns."""

    use_stored_probe: bool = Field(True, description="the vacuum probe of the store, if it has one")
    probe_radius_px: float | None = Field(None, gt=0, description="radius of a Bragg disk, px")
    edge_sigma_px: float | None = Field(None, gt=0, description="blur of the edge of a disk, px")
    centre: tuple[float, float] | None = Field(None, description="Y,X of the direct beam, px")

    @field_validator("centre", mode="before")
    @classmethod
    def _parse_centre(cls, value: Any) -> Any:
        return parse_numbers(value, 2, "centre") if isinstance(value, str) else value


class LatticeConfig(_Section):
    """How a lattice is fitted to the peaks of one position."""

    basis: Vectors | tuple[Vectors, ...] | None = Field(
        None,
        description="g1_y,g1_x,g2_y,g2_x in px; 8 or 12 numbers for two or three known crystals, such as "
        "a film and its substrate; None = found from the peaks",
    )
    max_lattices: int = Field(1, ge=1, le=3, description="lattices of one position that are fitted and kept")
    max_peak_spacing: float | None = Field(
        None, gt=0, description="largest distance of a peak from its site, px"
    )
    min_num_peaks: int = Field(5, ge=3, description="fewer indexed peaks: no lattice")
    weighting: Literal["sigma", "uniform", "intensity", "intensity_squared"] = Field(
        "sigma", description="weights of the peaks in the fit"
    )
    sigma_from_scan: bool = Field(
        True, description="errors are learned from how far the peaks of this scan scatter"
    )
    robust: bool = Field(True, description="down-weight outliers (iterated Tukey weights)")
    fit_origin: bool = Field(True, description="fit the origin of each position; no: as measured")
    max_strain: float = Field(0.1, gt=0, description="a lattice strained by more is another one")
    max_rotation_degree: float = Field(10.0, gt=0, description="a lattice turned by more is another one")
    max_orientations: int = Field(12, ge=1, description="different lattices looked for; 1 = one crystal")

    @field_validator("basis", mode="before")
    @classmethod
    def _parse_basis(cls, value: Any) -> Any:
        return parse_crystals(value) if isinstance(value, str) else value


class StrainConfig(_Section):
    """What the strain is relative to, and how it is expressed."""

    reference: Literal["median", "robust_median", "weighted_median", "grain"] | Region | Vectors = Field(
        "median",
        description="median, robust_median, weighted_median (whole scan), grain, "
        "Y0:Y1,X0:X1 (scan region), or g1_y,g1_x,g2_y,g2_x in px",
    )
    crystal: str | None = Field(
        None,
        description="absolute strain against an ideal crystal: 'F 5.4309', 'P a,c', six parameters, or a "
        ".cif file; reference then says onto what it is turned",
        json_schema_extra={"default": "none"},
    )
    zone: tuple[int, int, int] | None = Field(
        None, description="u,v,w of the crystal along the beam", json_schema_extra={"default": "any"}
    )
    miller: tuple[tuple[int, int, int], tuple[int, int, int]] | None = Field(
        None, description="h,k,l of g1 and of g2, six numbers", json_schema_extra={"default": "found"}
    )
    q_pixel: float | None = Field(
        None,
        gt=0,
        description="pixel size for the crystal, 1/angstrom",
        json_schema_extra={"default": "of the data"},
    )
    axis: Literal["g1", "g2"] | tuple[int, int] | tuple[int, int, int] | None = Field(
        None,
        description="x of the strain along g1, g2, M,N (combination of them) or, with a crystal, h,k,l",
        json_schema_extra={"default": "none"},
    )
    measure: Literal["infinitesimal", "biot", "green_lagrange", "hencky"] = "infinitesimal"
    convention: Literal["fcunet", "py4dstem", "pyxem", "quantem"] = "fcunet"
    rotation_degree: float | None = Field(
        None, description="scan against detector, +x towards +y; None = as stored, else detector frame"
    )

    @field_validator("reference", mode="before")
    @classmethod
    def _parse_region(cls, value: Any) -> Any:
        if not isinstance(value, str) or value in ("median", "robust_median", "weighted_median", "grain"):
            return value
        return parse_region(value) if ":" in value else parse_vectors(value)

    @field_validator("zone", "miller", "axis", mode="before")
    @classmethod
    def _parse_indices(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str) or value in ("g1", "g2"):
            return value
        counts = {"zone": (3,), "miller": (6,), "axis": (2, 3)}[str(info.field_name)]
        numbers = parse_integers(value, counts, str(info.field_name))
        return (numbers[:3], numbers[3:]) if info.field_name == "miller" else numbers


class SecondConfig(_Section):
    """Another method beside the first: do they agree?"""

    second_opinion: Literal["none", "correlation", "fcunet", "cepstral"] = Field(
        "none", description="another method to find the strain with, and to compare"
    )
    fall_back: bool = Field(
        False,
        description="take the second opinion where the first method has no lattice, or the pattern is unlike "
        "those of the network's training",
    )

    @model_validator(mode="after")
    def _check_fall_back(self) -> "SecondConfig":
        if self.fall_back and self.second_opinion == "none":
            raise ValueError("there is nothing to fall back on: second_opinion is none, say correlation")
        return self


class ClusterConfig(_Section):
    """Where the blocks are computed."""

    cluster: str = Field(
        "local", description="local, a profile (cluster/profiles/*.yaml), or tcp://scheduler:port"
    )
    workers: int | None = Field(
        None, ge=1, description="worker processes; None = what the machine or profile has"
    )
    dashboard_address: str = Field("127.0.0.1:8787", description="address of the Dask dashboard")


class Config(BaseSettings):
    """One run: which scan, where to, and the settings of each stage."""

    model_config = SettingsConfigDict(
        extra="forbid",
        env_prefix="FCUNET_",
        env_nested_delimiter="__",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    store: Path | str | None = Field(None, description="datacube, NAME.zarr; a path, or a URL as text")
    storage_options: dict[str, Any] = Field(
        {}, description="of a store at a URL, for fsspec: anon, endpoint_url, ...; never credentials"
    )
    out: Path | None = Field(None, description="run directory; None = runs/NAME")
    region: Region | None = Field(None, description="Y0:Y1,X0:X1, the part of the scan to process")
    calibration: CalibrationConfig = CalibrationConfig()
    detection: DetectionConfig = DetectionConfig()
    lattice: LatticeConfig = LatticeConfig()
    strain: StrainConfig = StrainConfig()
    second: SecondConfig = SecondConfig()
    cluster: ClusterConfig = ClusterConfig()

    def second_detection(self) -> DetectionConfig | None:
        """How the second opinion detects; None if none is asked for."""
        if self.second.second_opinion in ("none", self.detection.method):
            return None
        return self.detection.model_copy(update={"method": self.second.second_opinion})

    @field_validator("region", mode="before")
    @classmethod
    def _parse_region(cls, value: Any) -> Any:
        return parse_region(value) if isinstance(value, str) else value

    @field_validator("store", mode="before")
    @classmethod
    def _parse_store(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not is_url(value):
            return Path(value)
        if "@" in urlsplit(value).netloc or "?" in value:
            raise ValueError(
                "a URL with a password or a query (?...) cannot be used: settings are kept with the results; "
                "credentials belong into the environment or the files of the object store's library"
            )
        return value.rstrip("/")

    @field_validator("storage_options")
    @classmethod
    def _check_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        if secret := _secrets(value):
            raise ValueError(
                f"{', '.join(secret)} must not be among the storage options, which are kept with the "
                "results; credentials belong into the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, ...) "
                "or into ~/.config/fsspec, on every machine that reads"
            )
        return value

    @field_validator("out", mode="before")
    @classmethod
    def _check_out(cls, value: Any) -> Any:
        if isinstance(value, str) and is_url(value):
            raise ValueError("results are written to a folder here, not to a URL; copy them there afterwards")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides: Any) -> "Config":
        """Settings from a YAML file (may be None), the environment, and `overrides` (strongest).

        `overrides` may be nested dictionaries, or flat names such as ``corr_power=0.9``: all are unique.

        Raises
        ------
        ValueError
            For an unknown key (the nearest known one is suggested) or a value that does not fit.
        FileNotFoundError
            If `path` does not exist.
        """
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"no such settings file: {path}")
        nested: dict[str, Any] = {}
        for name, value in overrides.items():
            section = SECTION_OF.get(name)
            if name == "cluster" and not isinstance(value, dict):  # the section, or its first key
                section = name
            if section is None:
                nested[name] = value
            else:
                nested.setdefault(section, {})[name] = value

        class _FromFile(cls):  # type: ignore[valid-type, misc]
            model_config = SettingsConfigDict(yaml_file=path)

        try:
            return cls.model_construct(**dict(_FromFile(**nested)))
        except ValidationError as err:
            raise ValueError(_explain(err)) from None

    def to_yaml(self) -> str:
        """The settings as YAML, to be read back with :meth:`load`."""
        return yaml.safe_dump(json.loads(self.model_dump_json()), sort_keys=False)

    def science_hash(self) -> str:
        """SHA-256 of what changes the peaks: region, calibration, and detection but for device and batch."""
        detection = self.detection.model_dump(mode="json", exclude={"device", "batch"})
        given = self.calibration.model_dump(mode="json")
        text = json.dumps(
            {"region": self.region, "calibration": given, "detection": detection}, sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()


SECTIONS: dict[str, type[_Section]] = {
    "calibration": CalibrationConfig,
    "detection": DetectionConfig,
    "lattice": LatticeConfig,
    "strain": StrainConfig,
    "second": SecondConfig,
    "cluster": ClusterConfig,
}
# flat name -> section; `cluster` itself is both a section and the name of its first key
SECTION_OF = {
    name: section
    for section, model in SECTIONS.items()
    for name in model.model_fields
    if name not in SECTIONS
}


def is_url(text: str) -> bool:
    """Whether a store is named by a URL, ``s3://bucket/NAME.zarr``, and not by a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+(::.+)?://", text) is not None


def parse_option(text: str) -> tuple[str, Any]:
    """``"anon=true"`` as a name and a value: JSON where it is that, else text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"{text!r} is no storage option; write NAME=VALUE, such as anon=true")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value


def _secrets(options: Mapping[str, Any], above: str = "") -> list[str]:
    """Names of options, at any depth, that look like credentials."""
    found = []
    for name, value in options.items():
        if _SECRET.search(str(name)) or re.search("://[^/]*@", str(value)):
            found.append(above + str(name))
        elif isinstance(value, Mapping):
            found += _secrets(value, f"{above}{name}.")
    return found


def parse_region(text: str) -> Region:
    """``"Y0:Y1,X0:X1"`` as four integers (y0, y1, x0, x1); ValueError if it is not of that form."""
    try:
        rows, columns = text.split(",")
        y0, y1 = (int(v) for v in rows.split(":"))
        x0, x1 = (int(v) for v in columns.split(":"))
    except ValueError:
        raise ValueError(
            f"{text!r} is not a region of the scan; write it as Y0:Y1,X0:X1, such as 0:16,0:64"
        ) from None
    if not (0 <= y0 < y1 and 0 <= x0 < x1):
        raise ValueError(
            f"region {text!r} is empty or negative; write it as Y0:Y1,X0:X1 with Y0 < Y1 and X0 < X1"
        )
    return y0, y1, x0, x1


def parse_numbers(text: str, count: int, name: str) -> tuple[float, ...]:
    """`count` comma-separated numbers; ValueError if `text` is not that."""
    try:
        numbers = tuple(float(v) for v in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise ValueError(f"{text!r} is not {name}: {count} numbers with commas between them are needed")
    return numbers


def parse_integers(text: str, counts: tuple[int, ...], name: str) -> tuple[int, ...]:
    """So many comma-separated whole numbers as `counts` allows; ValueError if `text` is not that."""
    try:
        numbers = tuple(int(v) for v in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in counts:
        many = " or ".join(map(str, counts))
        raise ValueError(f"{text!r} is not {name}: {many} whole numbers with commas between them are needed")
    return numbers


def parse_vectors(text: str) -> Vectors:
    """``"29.9,0.5,-0.4,50.3"`` as two vectors ((y, x), (y, x)) in px."""
    y1, x1, y2, x2 = parse_numbers(text, 4, "a pair of vectors g1_y,g1_x,g2_y,g2_x")
    return (y1, x1), (y2, x2)


def parse_crystals(text: str) -> Vectors | tuple[Vectors, ...]:
    """One pair of vectors, or several one after the other."""
    count = text.count(",") + 1
    if count not in (8, 12):
        return parse_vectors(text)
    numbers = parse_numbers(text, count, "basis")
    return tuple((numbers[i : i + 2], numbers[i + 2 : i + 4]) for i in range(0, count, 4))  # type: ignore[misc]


def _explain(err: ValidationError) -> str:
    known = [*Config.model_fields, *(f"{s}.{n}" for s, m in SECTIONS.items() for n in m.model_fields)]
    lines = []
    for item in err.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            lines.append(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        elif item["loc"][0] in ("store", "storage_options"):  # may hold a password, not to be repeated
            lines.append(f"setting {key!r}: {item['msg']}")
        else:
            lines.append(f"setting {key!r} is {item['input']!r}: {item['msg']}")
    return "; ".join(dict.fromkeys(lines))
