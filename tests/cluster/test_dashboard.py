"""What a person sees of a run on SLURM: pages, numbers, through a proxy, in a browser; who may connect."""

import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import slow_tile
from browser import other_hosts, screenshot, start_browser
from conftest import free_ports
from distributed import Client
from lab import PATIENCE, SETTINGS, blocks_done, processes, until

from fcunet import runner, tiles
from fcunet.config import Config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600 * PATIENCE)]


@pytest.fixture(scope="module")
def running(site, store, tmp_path_factory):
    """A client whose run goes on until the last test of this module; knows the run's folder."""
    out = tmp_path_factory.mktemp("running") / "run"
    patch = pytest.MonkeyPatch()
    patch.setattr(tiles, "submitted", slow_tile.waiting_tile)
    flag = out.parent / "go"
    patch.setenv("FCUNET_TEST_GO", str(flag))
    site.wait_for_workers(3, timeout=120 * PATIENCE)
    site.run(slow_tile.set_go, str(flag))
    thread = threading.Thread(
        target=runner.run,
        args=(Config.load(store=store, out=out, **SETTINGS),),
        kwargs={"client": site, "progress": False},
    )
    thread.start()
    until(lambda: blocks_done(out) >= 12, "twelve blocks")
    yield site
    flag.touch()
    thread.join(timeout=200 * PATIENCE)
    patch.undo()
    assert not thread.is_alive()


def page(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return answer.read().decode()


def base(client) -> str:
    return client.dashboard_link.removesuffix("/status")


@pytest.mark.parametrize(
    ("path", "words"),
    [("status", "Dask Diagnostic UI"), ("workers", "Dask Diagnostic UI"),
     ("info/main/workers.html", "SLURMCluster-"), ("health", "ok"), ("fcunet", "fcunet.json")],
)  # fmt: skip
def test_dashboard__has_the_page(path, words, running):
    assert words in page(f"{base(running)}/{path}")


def test_dashboard__gives_its_numbers_to_prometheus(running):
    text = page(f"{base(running)}/metrics")
    assert 'dask_scheduler_workers{state="' in text
    assert "dask_scheduler_tasks_compute_seconds_total" in text


def test_dashboard__is_open_to_this_machine_only(running):
    for info in running.scheduler_info(n_workers=-1)["workers"].values():
        assert info["host"] == "127.0.0.1"  # the interface of the profile
    pids = {str(pid) for pid in processes(SLURM_JOB_NAME="dask-worker")}
    listening = subprocess.run(["ss", "-ltnpH"], check=True, capture_output=True, text=True).stdout
    ours = [line.split()[3] for line in listening.splitlines() if any(f"pid={p}," in line for p in pids)]
    assert len(ours) >= 6
    assert [where for where in ours if not where.startswith("127.0.0.1:")] == []


def test_scheduler__lets_nobody_in_without_the_certificate_of_the_run(running):
    address = running.scheduler.address
    assert address.startswith("tls://")
    with pytest.raises((OSError, TypeError, ValueError)):
        Client(address, timeout="3s")
    with pytest.raises(OSError):
        Client(address.replace("tls", "tcp"), timeout="3s")


@contextmanager
def browser(width=1600, height=1000):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        text = "no browser here: apt-get install chromium chromium-driver"
        pytest.fail(text) if os.environ.get("CI") else pytest.skip(text)
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install 'fcunet[browser]'")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as driver:
        yield driver


def colours(png: bytes) -> int:
    """How many colours a screenshot has; the menu bar alone has a few."""
    import io

    from matplotlib.image import imread

    return len(np.unique((imread(io.BytesIO(png))[..., :3] * 255).astype(np.uint8).reshape(-1, 3), axis=0))


def look(driver, address) -> bytes:
    """A screenshot with the plots in it, which come by web socket after the page."""
    driver.get(address)
    drawn = "return document.querySelectorAll('.bk-Figure, .bk-Canvas').length + " \
        "(window.Bokeh ? Object.keys(Bokeh.index).length : 0)"  # fmt: skip
    until(lambda: driver.execute_script(drawn) > 0, "the plots")
    until(lambda: colours(driver.get_screenshot_as_png()) > 60, "their contents")
    return driver.get_screenshot_as_png()


def test_dashboard__draws_the_run_in_a_browser(running, tmp_path):
    with browser() as driver:
        (tmp_path / "status.png").write_bytes(look(driver, running.dashboard_link))


def live_page(address, folder, name):
    """Names, texts and colours of the live page of the run that waits after its first rows; a picture too."""
    driver = start_browser(1300, 950)
    try:
        driver.get(address)
        text = "return document.getElementById(arguments[0]).innerText"
        until(lambda: driver.execute_script(text, "choose"), "maps on the live page")
        until(lambda: int(driver.execute_script(text, "done").split()[0]) >= 12, "twelve blocks on the page")
        map_png = driver.find_element("id", "map").screenshot_as_png
        screenshot(driver, folder, name)
        names = ("title", "done", "patterns", "workers", "choose", "machines")
        return {n: driver.execute_script(text, n) for n in names}, colours(map_png), other_hosts(driver)
    finally:
        driver.quit()


def test_live_page__shows_strain_filling_in(running, tmp_path):
    texts, found, elsewhere = live_page(f"{base(running)}/fcunet", tmp_path, "live-page-slurm")
    assert texts["title"] == "flat disks"
    assert texts["done"].endswith("of 60")
    assert texts["patterns"].endswith("of 960")
    assert texts["workers"] == "3"
    assert "strain e_xx" in texts["choose"]
    assert texts["machines"].count("SLURMCluster-") == 3
    assert found > 20
    assert elsewhere == []


@pytest.fixture
def jupyter(tmp_path):
    """The address of a Jupyter server with jupyter-server-proxy below a prefix, as a hub gives it."""
    pytest.importorskip("jupyter_server_proxy", reason="pip install 'fcunet[notebooks]'")
    port = free_ports(1)
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
         "--ServerApp.port_retries=0", "--ServerApp.base_url=/user/me/", "--IdentityProvider.token=",
         f"--ServerApp.root_dir={tmp_path}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}/user/me/"

    def answers():
        try:
            return page(f"{address}api")
        except urllib.error.URLError:
            return ""

    until(answers, "the server", process=server)
    yield address
    server.terminate()
    server.wait(timeout=30 * PATIENCE)


def test_dashboard__works_through_the_proxy_of_jupyter(running, jupyter, tmp_path):
    port = running.dashboard_link.rpartition(":")[2].removesuffix("/status")
    through = f"{jupyter}proxy/{port}"
    assert "fcunet.json" in page(f"{through}/fcunet")
    assert '"status"' in page(f"{through}/fcunet.json")
    with browser() as driver:
        (tmp_path / "proxied.png").write_bytes(look(driver, f"{through}/status"))
    texts, found, _ = live_page(f"{through}/fcunet", tmp_path, "live-page-jupyter")
    assert texts["title"] == "flat disks"
    assert found > 20
