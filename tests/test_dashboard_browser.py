"""The live page in a headless Chromium during a run on a local cluster, through a proxy under a prefix."""

import asyncio
import threading

import pytest
import tornado.httpclient
import tornado.ioloop
import tornado.web
from browser import other_hosts, screenshot, wait_for
from flat_scan import draw_datacube

from fcunet import runner
from fcunet.cluster import connect
from fcunet.config import Config
from fcunet.dashboard import LivePage, page_link
from fcunet.store import Layout, write_datacube

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def client():
    with connect(workers=1, device="cpu", dashboard_address="127.0.0.1:0") as client:
        yield client


class _Proxy(tornado.web.RequestHandler):
    """Hands /user/me/proxy/* on, as a notebook server does."""

    def initialize(self, target):
        self.target = target

    async def get(self, path):
        client = tornado.httpclient.AsyncHTTPClient()
        query = f"?{self.request.query}" if self.request.query else ""
        answer = await client.fetch(f"{self.target}/{path}{query}", raise_error=False)
        self.set_status(answer.code)
        self.set_header("Content-Type", answer.headers.get("Content-Type", "text/html"))
        self.write(answer.body or b"")


@pytest.fixture
def proxied(client):
    """The address of the live page behind the proxy."""
    target = client.dashboard_link.removesuffix("/status")
    ready, found = threading.Event(), {}

    def serve():
        async def main():
            application = tornado.web.Application([(r"/user/me/proxy/(.*)", _Proxy, {"target": target})])
            server = application.listen(0, "127.0.0.1")
            found["port"] = next(iter(server._sockets.values())).getsockname()[1]
            found["stop"], found["loop"] = asyncio.Event(), asyncio.get_running_loop()
            ready.set()
            await found["stop"].wait()
            server.stop()

        asyncio.run(main())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield f"http://127.0.0.1:{found['port']}/user/me/proxy/fcunet"
    found["loop"].call_soon_threadsafe(found["stop"].set)
    thread.join(10)


def text(browser, name):
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", name)


def colours(browser):
    """Different colours on the map, of which a grey scan without results has few."""
    return browser.execute_script(
        "const c = document.getElementById('map');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "const s = new Set();"
        "for (let i = 0; i < d.length; i += 4) s.add((d[i] * 256 + d[i + 1]) * 256 + d[i + 2]);"
        "return s.size"
    )


def test_live_page__fills_in_during_a_run_and_keeps_what_came_out(browser, client, proxied, tmp_path):
    store = write_datacube(tmp_path / "scan.zarr", draw_datacube((32, 48)), layout=Layout((4, 4), (2, 2)))
    config = Config.load(store=store, out=tmp_path / "run", method="correlation", device="cpu")
    LivePage(client)  # the page is there before the run
    browser.get(proxied)
    wait_for(lambda: "waiting for a run" in text(browser, "title"), what="the empty page")
    thread = threading.Thread(target=lambda: runner.run(config, client=client, progress=False))
    thread.start()
    wait_for(lambda: text(browser, "title") == "flat disks", 60, "the title of the scan")
    wait_for(lambda: text(browser, "choose").startswith("strain e_xx"), 90, "provisional strain")
    during = text(browser, "done")
    screenshot(browser, tmp_path, "live-page-during")
    thread.join(200)
    wait_for(lambda: text(browser, "done") == "96 of 96", what="the end of the run")
    assert during != "96 of 96"
    assert colours(browser) > 20
    assert text(browser, "patterns") == "1,536 of 1,536"
    assert "strain e_yy" in text(browser, "choose")
    assert "bright field" in text(browser, "choose")
    assert "GiB" in text(browser, "machines")
    screenshot(browser, tmp_path, "live-page-end")
    assert other_hosts(browser) == []


def test_live_page__shows_the_task_stream_in_the_same_tab(browser, client, tmp_path):
    browser.get(page_link(client))
    browser.execute_script("document.getElementById('tasks').open = true")
    ready = (
        "const f = document.querySelector('#tasks iframe');"
        "return !!(f && f.contentWindow.Bokeh && f.contentWindow.Bokeh.documents.length)"
    )
    wait_for(lambda: browser.execute_script(ready), 60, "the task stream")
    screenshot(browser, tmp_path, "live-page-tasks")
    assert other_hosts(browser) == []
