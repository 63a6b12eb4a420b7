"""Shared fixtures: third-party inputs, and a hypothesis profile that suits slow first calls."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("fcunet", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fcunet")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of third-party inputs, named by FCUNET_TEST_DATA; skips without it."""
    folder = os.environ.get("FCUNET_TEST_DATA")
    if not folder:
        pytest.skip("FCUNET_TEST_DATA is not set: third-party inputs are not at hand")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"FCUNET_TEST_DATA names {path}, which is not a folder")
    return path


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> tuple[Path, Path]:
    """A finished run on a tiny scan: the datacube, and the run directory, which must be left as they are."""
    from distributed import Client
    from flat_scan import draw_datacube

    from fcunet import runner
    from fcunet.config import Config
    from fcunet.store import write_datacube

    folder = tmp_path_factory.mktemp("small")
    store = write_datacube(folder / "scan.zarr", draw_datacube())
    config = Config.load(store=store, out=folder / "run", method="correlation")
    with Client(
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0"
    ) as client:
        runner.run(config, client=client, progress=False)
    return store, folder / "run"


@pytest.fixture
def no_report(monkeypatch):
    """Runs in this process write no report, nor that of Dask: drawing them takes longer than such a run."""
    from contextlib import nullcontext

    from fcunet import runner

    monkeypatch.setattr(runner, "_write_report", lambda out: out / "report.html")
    monkeypatch.setattr(runner, "dask_report", lambda client, path: nullcontext())


@pytest.fixture
def blank_pictures(monkeypatch):
    """Figures are made but not drawn, for tests of what a report says in words."""
    from fcunet import plot

    monkeypatch.setattr(plot, "to_png", lambda figure, dpi=0: b"\x89PNG")


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium that reaches this machine only."""
    from browser import start_browser

    driver = start_browser()
    yield driver
    driver.quit()
