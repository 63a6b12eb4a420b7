"""``fcunet demo``: the whole path on a simulated multilayer whose strain is known."""

from pathlib import Path
from typing import Any

import typer

from . import __version__
from .config import Config
from .lock import make_run_folder
from .schema import STRAIN_COMPONENTS

_FIELD = 3.17  # 1/angstrom across the detector: about ninety disks
METHODS = {"fcunet": "FCU-Net", "correlation": "correlation"}


def run_demo(
    out: Path,
    *,
    scan: tuple[int, int] = (24, 48),
    detector: int = 256,
    dose: float = 1e5,
    workers: int | None = None,
    seed: int = 0,
    restart: bool = False,
) -> dict[str, dict[str, dict[str, float]]]:
    """Simulate a scan, map its strain with both detectors, print their errors, draw both beside the truth.

    Everything is written below `out`: ``scan.zarr``, one run directory per detector with its report, and
    ``demo.png``. A demo that was interrupted, or is called again, continues with what is there, unless
    `restart`.

    Returns
    -------
    dict
        ``{method: {component: {"rms", "bias", "slope"}}}``, errors against the truth.
    """
    from .pipeline import compare_with_truth
    from .plot import methods as plot_methods
    from .runner import run
    from .simulation.scan import simulate
    from .store import open_truth, write_datacube

    make_run_folder(out)
    store = out / "scan.zarr"
    settings = f"scan {scan[0]} x {scan[1]}, detector {detector}, dose {dose:g}, seed {seed}"
    marker = out / "simulation.txt"
    typer.echo(f"fcunet {__version__} | demo")
    if not store.exists() or not marker.exists() or marker.read_text() != settings:
        if store.exists() and marker.exists():
            raise ValueError(
                f"{out} holds a demo of {marker.read_text()}, asked for was {settings}; "
                f"choose another folder with --out, or delete it: rm -r {out}"
            )
        typer.echo(f"simulate  SiGe multilayer, {settings} electrons per pattern")
        datacube, truth = simulate(
            scan=scan,
            detector=detector,
            sample="sige",
            dose=dose,
            seed=seed,
            semiangle_mrad=2.0,
            q_pixel=_FIELD / detector,
        )
        marker.write_text(settings)
        write_datacube(store, datacube, truth=truth)
    known = open_truth(store)
    if known is None:
        raise ValueError(f"{store} carries no truth, so it is not a simulated scan; delete it: rm -r {store}")
    reference = known.attrs["reference_region"]
    results: dict[str, Any] = {}
    for method, label in METHODS.items():
        typer.echo(f"\n{label}")
        config = Config.load(
            store=store, out=out / method, method=method, reference=reference, workers=workers
        )
        results[method] = run(config, restart=restart)
    errors = {m: compare_with_truth(tree["strain"].to_dataset(), known) for m, tree in results.items()}
    for title, (one, two) in {
        "strain error against the truth, rms x 1e-3 (bias)": ("rms", "bias"),
        "share of true values within one error bar (two)": ("within_1", "within_2"),
    }.items():
        typer.echo(f"\n{title}\n" + " " * 13 + "".join(f"{c:>16}" for c in STRAIN_COMPONENTS))
        scale, form = (1e3, "+.2f") if one == "rms" else (1, ".2f")
        for method, label in METHODS.items():
            found = [errors[method][c] for c in STRAIN_COMPONENTS]
            cells = (f"{e[one] * scale:7.2f} ({e[two] * scale:{form}})" for e in found)
            typer.echo(f"{label:13}" + "".join(f"{cell:>16}" for cell in cells))
    figure = plot_methods({METHODS[m]: tree["strain"].to_dataset() for m, tree in results.items()}, known)
    figure.savefig(out / "demo.png", dpi=150)
    typer.echo(f"\nwrote     {out / 'demo.png'}   {out / 'fcunet' / 'report.html'}")
    return errors
