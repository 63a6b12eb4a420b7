"""What comes before the first block of a run: what can be checked, the calibration, the empty peaks store."""

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dask
import xarray as xr

from . import schema
from .calibrate import calibrate
from .calibration import Calibration
from .cepstral import REAL_SPACE
from .config import Config
from .layout import BlockGrid
from .nn.range import TrainingRange
from .nn.weights import least_shared_dilation, resolve_weights, training_facts
from .pipeline import INTENSITY_ATTRS
from .provenance import input_fingerprint, provenance
from .remote import Place, Remote, scan_of
from .results import public_settings
from .shards import DamagedBlockError
from .store import create_peaks, open_region, open_truth, read_status
from .tiles import load_calibration, save_calibration
from .zarrfolder import root_attrs

PEAKS = "peaks.zarr"
_IDENTITY = ("science_sha256", "weights_sha256", "input_fingerprint")
_IDENTITY_WORDS = {
    "science_sha256": "the region or the detection settings",
    "weights_sha256": "the weights",
    "input_fingerprint": "the scan",
}


@dataclass
class PlannedRun:
    """What is known about a run before its first block."""

    config: Config
    store: Place
    out: Path
    datacube: xr.Dataset  # the region to process, lazy
    grid: BlockGrid
    identity: dict[str, str]
    weights: Path | None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def peaks(self) -> Path:
        return self.out / PEAKS

    @property
    def command(self) -> str:
        """What to type to go on."""
        return f"fcunet run {self.store} --out {self.out}"

    @property
    def origin(self) -> tuple[int, int]:
        return self.config.region[::2] if self.config.region else (0, 0)  # type: ignore[return-value]


def plan_run(config: Config) -> PlannedRun:
    """Everything that can be checked before anything is written."""
    store = scan_of(config)
    if config.second.second_opinion == config.detection.method:
        raise ValueError(
            f"the second opinion is {config.detection.method}, as the first method; ask another one: "
            "--second-opinion correlation, cepstral or fcunet"
        )
    datacube, grid = open_region(store, config.region)
    weights, sha256 = resolve_weights(config.detection.weights) if uses_network(config) else (None, "")
    out = Path(config.out) if config.out is not None else Path("runs") / store.name.removesuffix(".zarr")
    if not isinstance(store, Remote) and out.resolve() == store.resolve():
        raise ValueError(
            f"the run directory is the datacube itself; give another one: --out runs/{store.stem}"
        )
    identity = {
        "science_sha256": config.science_hash(),
        "weights_sha256": sha256,
        "input_fingerprint": input_fingerprint(store),
    }
    return PlannedRun(config, store, out, datacube, grid, identity, weights)


def describe_run(plan: PlannedRun) -> list[str]:
    ny, nx = plan.grid.scan_shape
    intensity = plan.datacube["intensity"]
    by, bx = plan.grid.block_shape
    region = (
        f" (region {':'.join(map(str, plan.config.region[:2]))},{':'.join(map(str, plan.config.region[2:]))})"
        if plan.config.region
        else ""
    )
    detection = plan.config.detection
    model = (
        f"{detection.weights} (sha256 {plan.identity['weights_sha256'][:8]}...)"
        if plan.weights
        else f"correlation, {detection.subpixel} positions"
    )
    return [
        f"  data      {plan.store.name}: {ny} x {nx} scan{region}, {intensity.shape[2]} x "
        f"{intensity.shape[3]} detector, {intensity.dtype}, {_bytes(intensity.nbytes)} "
        f"-> {len(plan.grid)} blocks of {by} x {bx}",
        f"  model     {model}",
    ]


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def prepare(plan: PlannedRun, known: Calibration | None = None) -> Calibration:
    """The peaks store of this run, made or checked, with the calibration in it: `known`, else measured."""
    if plan.peaks.exists():
        _check_identity(plan)
        remove_partial(plan.peaks)
    else:
        started = time.perf_counter()
        calibration = known or _measure(plan)
        plan.seconds["calibrate"] = time.perf_counter() - started
        network = uses_network(plan.config)
        facts = {
            "config_json": json.dumps(public_settings(plan.config)),
            "input_title": plan.datacube.attrs.get("title", plan.store.stem),
            "weights_name": plan.weights.name if plan.weights else None,
            "intensity_meaning": INTENSITY_ATTRS[plan.config.detection.method]["meaning"],
            "intensity_units": "V" if network else None,
            "method": plan.config.detection.method,
            "training_range": asdict(TrainingRange.of_weights(training_facts(plan.weights)))
            if plan.weights
            else None,
            "shared_dilation_floor": least_shared_dilation(plan.weights) if plan.weights else None,
            "space": REAL_SPACE if plan.config.detection.method == "cepstral" else None,
            "run_id": run_id_of(plan),
            "input_samples": _sample_digests(plan.datacube),
            "region": list(plan.config.region) if plan.config.region else None,
            "datacube": {k: v for k, v in plan.datacube.attrs.items() if not k.startswith("fcunet_format")},
            "qy": _axis(plan.datacube, "qy"),
            "qx": _axis(plan.datacube, "qx"),
            **plan.identity,
        }
        # the calibration goes in first, under a name of its own: the store appears with all it needs, or not
        # at all
        create_peaks(
            plan.peaks,
            scan_shape=plan.grid.scan_shape,
            block_shape=plan.grid.block_shape,
            max_num_peaks=plan.config.detection.max_num_peaks,
            detector_shape=(plan.datacube.sizes["qy"], plan.datacube.sizes["qx"]),
            coords={dim: plan.datacube[dim] for dim in schema.SCAN_DIMS},
            attrs=provenance(**facts),
        )
        save_calibration(plan.peaks, calibration)
    if not (plan.peaks / "calibration").exists():  # killed between the two
        save_calibration(plan.peaks, known or _measure(plan))
    if not (plan.peaks / "truth").exists() and (truth := open_truth(plan.store)) is not None:
        _save_truth(plan, truth)
    return load_calibration(plan.peaks)


def remove_partial(peaks: Path) -> None:
    """Remove what is left of chunks that were being written when a process was killed or a node lost."""
    for left in peaks.glob("*/c/**/*.partial"):
        left.unlink(missing_ok=True)


def _measure(plan: PlannedRun) -> Calibration:
    with dask.config.set(scheduler="threads"):  # a few patterns: not worth a cluster
        return calibrate(plan.datacube, **plan.config.calibration.model_dump())


def _check_identity(plan: PlannedRun) -> None:
    found = root_attrs(plan.peaks)
    schema.check_format(found, "peaks", str(plan.peaks))
    other = [k for k in _IDENTITY if found.get(k, "") != plan.identity[k]]
    if not other and any(
        a and b and a != b
        for a, b in zip(found.get("input_samples", []), _sample_digests(plan.datacube), strict=False)
    ):
        other = ["input_fingerprint"]
    if other:
        what = " and ".join(_IDENTITY_WORDS[k] for k in other)
        raise ValueError(
            f"{plan.out} holds a run that differs in {what}, and peaks of two kinds must not mix; start anew "
            f"with --restart, or keep both with another run directory: --out {plan.out}-2"
        )
    lacking = [name for name in schema.PEAKS if not (plan.peaks / name).is_dir()]
    if lacking and (read_status(plan.peaks) == schema.STATUS_TODO).any():
        raise ValueError(
            f"{plan.out} holds a run begun by an older fcunet, whose peaks lack {', '.join(lacking)}, so it "
            "cannot be continued; start anew with --restart, or finish it with the version that began it"
        )


def _sample_digests(datacube: xr.Dataset) -> list[str]:
    """Digests of the four corner patterns and the middle one; empty where one cannot be read."""
    ny, nx = datacube["intensity"].shape[:2]
    digests = []
    for y, x in ((0, 0), (0, nx - 1), (ny - 1, 0), (ny - 1, nx - 1), (ny // 2, nx // 2)):
        try:
            pattern = datacube["intensity"][y, x].data.compute(scheduler="synchronous")
            digests.append(hashlib.sha256(pattern.tobytes()).hexdigest()[:12])
        except DamagedBlockError:
            digests.append("")
    return digests


def _save_truth(plan: PlannedRun, truth: xr.Dataset) -> None:
    """Keep the truth of a simulated scan with the peaks, cut to the region; later steps need no datacube."""
    if plan.config.region is not None:
        y0, y1, x0, x1 = plan.config.region
        truth = truth.isel(scan_y=slice(y0, y1), scan_x=slice(x0, x1))
    final = plan.peaks / "truth"
    draft = final.with_name(f"truth.partial.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    truth.load().drop_encoding().to_zarr(draft, zarr_format=3, consolidated=False)
    draft.rename(final)


def run_id_of(plan: PlannedRun) -> str:
    """The same for every run that writes the same peaks."""
    return hashlib.sha256(json.dumps(plan.identity, sort_keys=True).encode()).hexdigest()[:16]


def uses_network(config: Config) -> bool:
    return config.detection.method == "fcunet"


def _axis(datacube: xr.Dataset, dim: str) -> dict[str, Any]:
    """A detector coordinate as first value, step and unit."""
    values = datacube[dim].values
    step = float(values[-1] - values[0]) / (len(values) - 1) if len(values) > 1 else 1.0
    return {
        "first": float(values[0]),
        "step": step,
        "units": datacube[dim].attrs.get("units", schema.UNIT_PIXEL),
    }
