"""The ``fcunet`` command.

Options that are settings (`fcunet.config`) are generated from them: names, help and defaults have one source.
Nothing heavy is imported before a command needs it: ``fcunet --help`` answers at once.
"""

import itertools
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .config import Config, is_url, parse_option
from .options import pair, pair_from_zero, quantity, with_settings

app = typer.Typer(
    name="fcunet",
    help="Strain maps with error bars from 4D-STEM scans.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)

StoreArgument = Annotated[str, typer.Argument(help="datacube, NAME.zarr, or its URL: s3://..., https://...")]
StorageOption = Annotated[
    list[str] | None,
    typer.Option(help="NAME=VALUE for a URL, such as anon=true; may be repeated; never credentials"),
]
RunArgument = Annotated[Path, typer.Argument(help="run directory, or the peaks.zarr / strain.zarr in it")]
SettingsOption = Annotated[Path | None, typer.Option("--config", help="YAML file of settings")]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fcunet {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say more; show tracebacks")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")
    ] = False,
) -> None:
    handler = logging.StreamHandler()  # a level of its own: a run keeps the finer lines in its log
    handler.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.basicConfig(level=handler.level, format="%(levelname)s %(name)s: %(message)s", handlers=[handler])
    _state["verbose"] = verbose


_state = {"verbose": False}


def _where(store: str, storage_option: list[str] | None) -> dict[str, Any]:
    """The settings that say where a scan is."""
    if storage_option and not is_url(store):
        raise ValueError(f"--storage-option is for a scan at a URL, and {store} is a path; leave it out")
    return {"store": store} | (
        {"storage_options": dict(parse_option(text) for text in storage_option)} if storage_option else {}
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where the demo writes")] = Path("runs/demo"),
    scan: Annotated[str, typer.Option(help="rows,columns of the simulated scan")] = "24,48",
    detector: Annotated[int, typer.Option(help="side of the simulated detector, px")] = 256,
    dose: Annotated[float, typer.Option(help="electrons per pattern")] = 1e5,
    workers: Annotated[int | None, typer.Option(help="worker processes")] = None,
    seed: Annotated[int, typer.Option(help="seed of the simulation")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="find the peaks again")] = False,
) -> None:
    """Simulate a multilayer, map its strain, compare with the truth."""
    from .demo import run_demo

    run_demo(
        out,
        scan=pair(scan, "scan"),
        detector=detector,
        dose=dose,
        workers=workers,
        seed=seed,
        restart=restart,
    )


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="datacube to write, NAME.zarr")],
    scan: Annotated[str, typer.Option(help="rows,columns")] = "24,48",
    detector: Annotated[int, typer.Option(help="side of the detector, px")] = 128,
    sample: Annotated[str, typer.Option(help="sige, uniform, gradient, flat or none")] = "sige",
    dose: Annotated[float, typer.Option(help="electrons per pattern")] = 1e5,
    thickness_nm: Annotated[float, typer.Option(help="foil thickness, nm")] = 25.0,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Simulate a scan of known strain, dynamical scattering included."""
    from .simulation.scan import simulate as simulate_scan
    from .store import write_datacube

    dataset, truth = simulate_scan(
        scan=pair(scan, "scan"),
        detector=detector,
        sample=sample,
        dose=dose,
        thickness_nm=thickness_nm,
        seed=seed,
    )
    write_datacube(out, dataset, truth=truth)
    typer.echo(f"wrote     {out}   next: fcunet preview {out}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="file or folder from a microscope, or an array on disk")],
    out: Annotated[Path, typer.Argument(help="datacube to write, NAME.zarr")],
    scan_shape: Annotated[str | None, typer.Option(help="rows,columns, where the file does not say")] = None,
    detector_shape: Annotated[str | None, typer.Option(help="rows,columns of a raw binary's frames")] = None,
    dtype: Annotated[str | None, typer.Option(help="dtype of a raw binary, such as uint16 or >u2")] = None,
    offset: Annotated[int, typer.Option(help="bytes before the first frame of a raw binary")] = 0,
    scan_step: Annotated[str | None, typer.Option(help="such as '2.0 nm'")] = None,
    q_pixel: Annotated[str | None, typer.Option(help="such as '0.0123 1/angstrom' or '0.5 mrad'")] = None,
    beam_energy_kev: Annotated[float | None, typer.Option(help="beam energy, keV")] = None,
    convergence_semiangle_mrad: Annotated[
        float | None, typer.Option(help="convergence semi-angle, mrad")
    ] = None,
    scan_rotation_degree: Annotated[
        float | None, typer.Option(help="scan against detector, +x towards +y, degrees")
    ] = None,
    probe: Annotated[Path | None, typer.Option(help="vacuum probe: .npy, or any single pattern")] = None,
    flip: Annotated[str, typer.Option(help="mirror the detector: none, rows, columns, both")] = "none",
    dataset: Annotated[
        str | None, typer.Option(help="which array or signal, where the file holds several")
    ] = None,
    depth: Annotated[int | None, typer.Option(help="which exit depth of a simulated scan")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing store")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be written, and write nothing")
    ] = False,
) -> None:
    """Convert a scan to a Zarr store; continues where it was interrupted."""
    from .convert import convert as convert_scan

    result = convert_scan(
        source,
        out,
        scan_shape=pair(scan_shape, "scan-shape") if scan_shape else None,
        detector_shape=pair(detector_shape, "detector-shape") if detector_shape else None,
        dtype=dtype,
        offset=offset,
        scan_step=quantity(scan_step, "scan-step", ("nm", "angstrom", "um")),
        q_pixel=quantity(q_pixel, "q-pixel", ("1/angstrom", "1/nm", "mrad")),
        beam_energy_keV=beam_energy_kev,
        convergence_semiangle_mrad=convergence_semiangle_mrad,
        scan_rotation_degree=scan_rotation_degree,
        probe=probe,
        flip=flip,  # type: ignore[arg-type]
        dataset=dataset,
        depth=depth,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    if dry_run:
        typer.echo(str(result))
    else:
        typer.echo(f"wrote     {out}   next: fcunet preview {out}")


@app.command()
def info(
    store: Annotated[str, typer.Argument(help="datacube or its URL, peaks store, results or run directory")],
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    storage_option: StorageOption = None,
) -> None:
    """Say what a store holds."""
    from .store import describe

    facts = describe(store, _where(store, storage_option).get("storage_options"))
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
        return
    width = max(len(k) for k in facts)
    for name, value in facts.items():
        typer.echo(f"{name:{width}}  {value}")


@app.command()
@with_settings("calibration")
def calibrate(
    store: StoreArgument,
    settings: dict[str, Any],
    origin: Annotated[
        str, typer.Option(help="beam centre by: disk, brightest, mass, friedel (beam stop), none")
    ] = "disk",
    origin_model: Annotated[
        str, typer.Option(help="through the centres: plane, parabola, constant, none (each by itself)")
    ] = "plane",
    every_position: Annotated[
        bool, typer.Option("--every-position", help="measure the centre in every pattern, not in a sample")
    ] = False,
    ellipse: Annotated[
        str, typer.Option(help="distortion by: ring, crystal, none, or RATIO,ANGLE of the long axis")
    ] = "none",
    ring_px: Annotated[float | None, typer.Option(help="radius of the ring to take, px")] = None,
    crystal: Annotated[
        str | None, typer.Option(help="for the pixel size: Au, Si, 'F 4.0782', 'P a,c', or a .cif file")
    ] = None,
    q_pixel: Annotated[float | None, typer.Option(help="pixel size to start from, 1/angstrom")] = None,
    rotation: Annotated[str, typer.Option(help="measure, none, or degrees")] = "measure",
    transposed: Annotated[
        bool | None, typer.Option("--transposed/--not-transposed", help="detector rows and columns exchanged")
    ] = None,
    regions: Annotated[
        str | None, typer.Option(help="rows,columns of scan regions with a probe template each")
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="apply the calibration of this scan instead")
    ] = None,
    n_patterns: Annotated[int, typer.Option(help="patterns in the sample")] = 256,
    figure: Annotated[Path | None, typer.Option(help="figure to write [NAME_calibration.png]")] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="take the calibration back, as before the first one")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what is found, and keep nothing")] = False,
    config: SettingsOption = None,
) -> None:
    """Measure descan, ellipse, pixel size and rotation of a scan, and keep them with it.

    The patterns are never touched; a run applies what was measured as it goes.
    """
    from .calibration_command import calibrate_store

    loaded = Config.load(config, store=store, **settings)
    options = {
        "origin": origin, "origin_model": origin_model, "every_position": every_position, "ellipse": ellipse,
        "ring_px": ring_px, "q_pixel": q_pixel, "rotation": rotation, "transposed": transposed,
        "regions": None if regions is None else pair(regions, "regions"), "n_patterns": n_patterns,
        "settings": loaded.calibration.model_dump(),
    }  # fmt: skip
    if crystal is not None:
        from .simulation.rings import find_crystal, powder_rings

        options["rings"] = powder_rings(find_crystal(crystal), 2.5)[0]
    for line in calibrate_store(
        store, other=from_, undo=reset, figure=figure, dry_run=dry_run, options=options
    ):
        typer.echo(line)


@app.command()
@with_settings("calibration", "detection", "lattice")
def preview(
    store: StoreArgument,
    settings: dict[str, Any],
    n: Annotated[int, typer.Option("-n", "--number", help="how many positions")] = 6,
    at: Annotated[list[str] | None, typer.Option(help="Y,X; may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="figure to write [NAME_preview.png]")] = None,
    config: SettingsOption = None,
    storage_option: StorageOption = None,
) -> None:
    """Look at a few patterns, with all that was measured, before the big run."""
    from .preview import preview as preview_store
    from .remote import Remote, scan_of

    positions = [pair_from_zero(text) for text in at] if at else None
    loaded = Config.load(config, **_where(store, storage_option), **settings)
    scan = scan_of(loaded)
    beside = Path() if isinstance(scan, Remote) else scan.parent
    figure = out or beside / f"{scan.stem}_preview.png"
    facts = preview_store(scan, positions=positions, n=n, config=loaded, out=figure)
    for line in facts["lines"]:
        typer.echo(line)
    typer.echo(f"wrote     {figure}   next: fcunet run {store}")


@app.command()
@with_settings("calibration", "detection", "lattice", "strain", "second", "cluster")
def run(
    store: StoreArgument,
    settings: dict[str, Any],
    out: Annotated[str | None, typer.Option(help="run directory [runs/NAME]")] = None,
    region: Annotated[str | None, typer.Option(help="Y0:Y1,X0:X1, a part of the scan")] = None,
    config: SettingsOption = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="forget what an earlier run left in --out")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, and do nothing")
    ] = False,
    storage_option: StorageOption = None,
) -> None:
    """Map the strain of a scan; the same command continues a stopped run."""
    from .runner import plan
    from .runner import run as run_pipeline

    given = _where(store, storage_option)
    given |= {k: v for k, v in (("out", out), ("region", region)) if v is not None}
    loaded = Config.load(config, **given, **settings)
    if dry_run:
        for line in plan(loaded):
            typer.echo(line)
        return
    run_pipeline(loaded, restart=restart)


@app.command()
@with_settings("lattice", "strain", "second")
def strain(
    source: Annotated[
        Path, typer.Argument(help="run directory; or peaks found elsewhere: py4DSTEM .h5, CSV, parquet")
    ],
    settings: dict[str, Any],
    out: Annotated[
        Path | None, typer.Option(help="run directory for peaks found elsewhere [runs/NAME]")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="which Bragg vectors, where the file holds several")
    ] = None,
    config: SettingsOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="replace the peaks of another file")] = False,
) -> None:
    """Fit lattices and strain to the peaks of a run, or of another program; seconds, no GPU."""
    if source.is_file() or (source.suffix and not source.exists() and source.suffix != ".zarr"):
        from .adopt import strain_from_file

        strain_from_file(source, out=out, dataset=dataset, restart=restart, config=config, **settings)
        return
    if out is not None or dataset is not None or restart:
        raise ValueError(
            f"{source} is not a file, and --out, --dataset and --restart are for peaks found elsewhere; "
            "a run directory keeps its own"
        )
    from .runner import rerun_strain

    rerun_strain(source, config=config, **settings)


@app.command()
def report(
    run_directory: RunArgument,
    other: Annotated[Path | None, typer.Argument(help="a second run, to compare with the first")] = None,
    out: Annotated[
        Path | None, typer.Option(help="file for a comparison [A_against_B.html in this folder]")
    ] = None,
) -> None:
    """Write the figures and the report of a run again; or one page that compares two runs."""
    if other is not None:
        from .report import write_comparison

        typer.echo(f"wrote     {write_comparison(run_directory, other, out)}")
        return
    if out is not None:
        raise ValueError(
            f"--out is for the comparison of two runs: fcunet report {run_directory} OTHER --out {out}; "
            "the report of one run lies in its folder"
        )
    from .runner import rewrite_report

    typer.echo(f"wrote     {rewrite_report(run_directory)}")


@app.command()
def explore(
    run_directory: RunArgument,
    scan: Annotated[str | None, typer.Option(help="datacube, if it was moved since the run")] = None,
    port: Annotated[int, typer.Option(help="port of the page; 0 is any free one")] = 0,
    address: Annotated[str, typer.Option(help="where to listen")] = "127.0.0.1",
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of a proxy the page comes through; may be repeated")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open a browser")] = True,
) -> None:
    """Explore a result in the browser: click a map, see pattern, disks, lattice and numbers."""
    try:
        from .explore.serve import serve
    except ModuleNotFoundError as err:
        raise ValueError(
            f"the explorer needs {err.name}, which is not installed; type: pip install 'fcunet[notebooks]'"
        ) from err

    serve(run_directory, scan=scan, port=port, address=address, browser=browser, allow_origin=allow_origin)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="run directory, or a datacube")],
    out: Annotated[Path, typer.Argument(help="file to write")],
    to: Annotated[
        str | None, typer.Option(help="csv, parquet, netcdf, py4dstem or zspy; default: as OUT ends")
    ] = None,
    what: Annotated[str, typer.Option(help="strain or peaks, for tables and netcdf")] = "strain",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing file")] = False,
) -> None:
    """Write results or scans for other programs: tables, NetCDF, EMD for py4DSTEM, zspy for HyperSpy."""
    from .export import export as export_results

    typer.echo(f"wrote     {export_results(source, out, to=to, what=what, overwrite=overwrite)}")


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file, see workflows/configs/train.yaml")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for checkpoints, log and weights")] = Path("runs/train"),
    minutes: Annotated[float | None, typer.Option(help="time budget")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N")] = None,
) -> None:
    """Train a network on simulated patterns; the same command continues a stopped training."""
    from .training.loop import TrainConfig
    from .training.loop import train as train_network

    budget_s = None if minutes is None else 60 * minutes
    folder = train_network(TrainConfig.load(config, out=out, budget_s=budget_s, device=device))
    typer.echo(f"weights   {folder}")


@app.command()
def doctor(
    store: Annotated[
        str | None,
        typer.Argument(help="a datacube: also say what a run over it will take", show_default=False),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="also check a profile, with one job, or a scheduler's address")
    ] = None,
    storage_option: StorageOption = None,
) -> None:
    """Check this machine and a cluster, and say what to do about what is missing."""
    from .doctor import examine, examine_scan
    from .doctor_cluster import examine_cluster

    sound = True
    there = examine_cluster(cluster, say=lambda text: typer.echo(f"...  {text}")) if cluster else ()
    where = _where(store, storage_option) if store else {}
    scan = examine_scan(**where, cluster=cluster) if store else ()
    for check in itertools.chain(examine(), there, scan):
        typer.echo(f"{'ok ' if check.ok else 'BAD'}  {check.name:13}  {check.finding}")
        if not check.ok:
            sound = False
            typer.echo(f"                    {check.advice}")
    if not sound:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: expected errors become one sentence on stderr and exit status 1."""
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as err:
        if _state["verbose"]:
            raise
        name = "" if isinstance(err, ValueError | RuntimeError) else f"{type(err).__name__}: "
        typer.echo(f"fcunet: {name}{err}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
