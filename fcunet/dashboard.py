"""The page ``/fcunet`` on the Dask dashboard's own port: maps filling in, speed, workers, failures.

The driver of a run pushes what is new to the scheduler about once per second, out of the same account that
its progress bar draws; the page asks the scheduler for ``fcunet.json``. Which blocks are at work or tried
again, and what the workers use, the scheduler knows by itself. No other port, no other server, no other host:
every address on the page is relative, so that it works through a tunnel or a proxy under any prefix.
"""

import html
import json
import math
from collections import Counter
from importlib.resources import files
from typing import Any

import numpy as np
from distributed import Client, Scheduler, SchedulerPlugin
from tornado.web import RequestHandler

from .progress import Progress

PLUGIN, TOPIC = "fcunet-page", "fcunet-run"
_KEY = "fcunet-tile-"


class RunPage(SchedulerPlugin):
    """Serves the state of the run; lives in the scheduler."""

    name = PLUGIN
    idempotent = True  # the next run on the same scheduler finds it there

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.maps: dict[str, tuple[int, str]] = {}  # block -> number of the event, pictures as JSON text
        self.count = 0
        self.active: dict[str, str] = {}  # task -> block
        self.retried: Counter[str] = Counter()

    async def start(self, scheduler: Scheduler) -> None:  # type: ignore[override]
        """Add the routes to the dashboard, once per scheduler."""
        self.scheduler = scheduler
        if not getattr(scheduler, "_fcunet_routes", False):
            scheduler._fcunet_routes = True  # type: ignore[attr-defined]
            page = {"scheduler": scheduler}
            scheduler.http_application.add_handlers(
                r".*",
                [
                    (r"/fcunet", _PageHandler, page),
                    (r"/fcunet/", _SlashHandler, page),
                    (r"/fcunet\.json", _StateHandler, page),
                ],
            )

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Follow the blocks: at work, done, or tried again."""
        if not isinstance(key, str) or not key.startswith(_KEY):
            return
        block = ",".join(key.removeprefix(_KEY).split("-")[:2])
        if finish == "processing":
            self.active[key] = block
        elif start == "processing":
            self.active.pop(key, None)
            # a failed attempt, or a lost worker, sends a task back to wait; "forgotten" ends it
            if finish == "waiting" or (finish == "released" and "stimulus_id" in kwargs and _failed(kwargs)):
                self.retried[block] += 1

    def log_event(self, topic: str, msg: Any) -> None:
        """Replace the state, and add pictures of finished blocks, when the driver has sent some."""
        if topic != TOPIC:
            return
        state = msg["state"]
        if state.get("run") != self.state.get("run"):
            self.maps.clear()
            self.retried.clear()
            self.count = 0
        self.state = state
        for block, pictures in msg["maps"].items():
            self.count += 1
            self.maps[block] = (self.count, pictures)

    def answer(self, since: int) -> str:
        """What a page that knows the first `since` events lacks, as JSON."""
        if not self.state:
            return "{}"
        state = self.state | {
            "count": self.count,
            "active": sorted(set(self.active.values())),
            "retried": dict(self.retried),
            "machines": [_machine(ws) for ws in self.scheduler.workers.values()],
        }
        new = ",".join(f'"{block}":{maps}' for block, (number, maps) in self.maps.items() if number > since)
        return f'{{"maps":{{{new}}},{json.dumps(state)[1:]}'


def _failed(kwargs: dict[str, Any]) -> bool:
    """A released task that did not end well: its attempt raised, or its worker is gone."""
    return kwargs["stimulus_id"].startswith(("task-erred", "handle-worker-cleanup", "remove-worker"))


def _machine(worker: Any) -> dict[str, Any]:
    """Memory and use of a worker, and of its GPU where NVML (nvidia-ml-py) tells them."""
    metrics, gpu = worker.metrics, worker.metrics.get("gpu") or {}
    facts = (getattr(worker, "extra", None) or {}).get("gpu") or {}
    return {
        "name": str(worker.name),
        "memory": metrics.get("memory"),
        "limit": worker.memory_limit or None,
        "cpu": metrics.get("cpu"),
        "gpu": facts.get("name"),
        "gpu_memory": gpu.get("memory-used"),
        "gpu_total": facts.get("memory-total"),
        "gpu_use": gpu.get("utilization"),
    }


class _PageHandler(RequestHandler):
    def initialize(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.write(files("fcunet").joinpath("dashboard.html").read_text(encoding="utf-8"))


class _SlashHandler(_PageHandler):
    def get(self) -> None:
        self.redirect("../fcunet")  # relative addresses count from there


class _StateHandler(_PageHandler):
    def get(self) -> None:
        page = self.scheduler.plugins.get(PLUGIN)
        since = self.get_query_argument("since", "0")
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        known = int(since) if since.isdecimal() else 0
        self.write(page.answer(known) if isinstance(page, RunPage) else "{}")


class RunPageFeed:
    """The driver's end: collects finished blocks and sends them on.

    Parameters
    ----------
    client : distributed.Client
    run : str
        Identifies the run; another one clears the page.
    title : str
        Shown as the heading.
    status : ndarray of uint8, shape (ny, nx)
        ``schema.STATUS_*`` per block at the start.
    """

    def __init__(self, client: Client, *, run: str, title: str, status: np.ndarray) -> None:
        self.client, self.status = client, np.array(status)
        self._run, self._title = run, title
        self._new: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        client.register_plugin(RunPage())

    def done(
        self, iy: int, ix: int, status: int, maps: dict[str, Any] | None = None, reason: str = ""
    ) -> None:
        """Block (iy, ix) has ended with `status`; `maps` are its `fcunet.thumbnails`."""
        self.status[iy, ix] = status
        if maps is not None:  # text: nested lists take the scheduler four times the memory
            self._new[f"{iy},{ix}"] = json.dumps(maps, separators=(",", ":"))
        if reason:
            self._reasons[f"{iy},{ix}"] = reason

    def send(self, progress: Progress, *, workers: int, note: str = "", ended: bool = False) -> None:
        """Push what is new to the scheduler: the account of `progress`, and pictures of finished blocks."""
        new, self._new = self._new, {}
        remaining = 0.0 if ended else progress.remaining_s
        state = {
            "run": self._run,
            "title": self._title,
            "shape": self.status.shape,
            "status": "".join(map(str, self.status.ravel().tolist())),
            "patterns": [progress.before + progress.now + progress.failed, progress.total],
            "rate": progress.rate,
            "history": progress.history,
            "remaining_s": None if remaining is None or not math.isfinite(remaining) else remaining,
            "workers": workers,
            "failed": self._reasons,
            "note": note,
        }
        self.client.log_event(TOPIC, {"state": state, "maps": new})


def page_link(client: Client) -> str:
    """Address of the live page of a client's scheduler.

    It follows Dask's setting ``distributed.dashboard.link``, such as ``/proxy/{port}/status`` in a notebook
    behind jupyter-server-proxy.
    """
    return client.dashboard_link.removesuffix("/status") + "/fcunet"


class LivePage:
    """The live page inside a notebook, with its address above it.

    Parameters
    ----------
    client : distributed.Client
    height : int
        Of the frame, px.
    """

    def __init__(self, client: Client, *, height: int = 640) -> None:
        self.address, self.height = page_link(client), height
        client.register_plugin(RunPage())  # the page is there before the run

    def __repr__(self) -> str:
        return f"live page: {self.address}"

    def _repr_html_(self) -> str:
        link = html.escape(self.address, quote=True)
        return (
            f'<a href="{link}" target="_blank">{link}</a><iframe src="{link}" width="100%" '
            f'height="{self.height}" style="border:1px solid #8884"></iframe>'
        )
