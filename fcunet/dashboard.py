"""The page ``/fcunet`` on the Dask dashboard's own port: a map of the scan filling in, speed, failures.

The driver of a run pushes its state to the scheduler about once per second; the page asks the scheduler for
``/fcunet.json``. No other port, no other server, and nothing that is not needed on a page behind an ssh
tunnel.
"""

import json
import math
from importlib.resources import files
from typing import Any

import numpy as np
from distributed import Client, Scheduler, SchedulerPlugin
from tornado.web import RequestHandler

PLUGIN, TOPIC = "fcunet-page", "fcunet-run"


class RunPage(SchedulerPlugin):
    """Serves the state of the run; lives in the scheduler."""

    name = PLUGIN
    idempotent = True  # the next run on the same scheduler finds it there

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.tiles: dict[str, list[list[float]]] = {}

    async def start(self, scheduler: Scheduler) -> None:  # type: ignore[override]
        """Add the two routes to the dashboard, once per scheduler."""
        if not getattr(scheduler, "_fcunet_routes", False):
            scheduler._fcunet_routes = True  # type: ignore[attr-defined]
            page = {"scheduler": scheduler}
            scheduler.http_application.add_handlers(
                r".*", [(r"/fcunet", _PageHandler, page), (r"/fcunet\.json", _StateHandler, page)]
            )

    def log_event(self, topic: str, msg: Any) -> None:
        """Replace the state, and add thumbnails of finished blocks, when the driver has sent some."""
        if topic != TOPIC:
            return
        state, tiles = msg["state"], msg["tiles"]
        if state.get("run") != self.state.get("run"):
            self.tiles.clear()
        self.state = state
        self.tiles.update(tiles)


class _PageHandler(RequestHandler):
    def initialize(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def get(self) -> None:
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.write(files("fcunet").joinpath("dashboard.html").read_text())


class _StateHandler(_PageHandler):
    def get(self) -> None:
        page = self.scheduler.plugins.get(PLUGIN)
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(page.state | {"tiles": page.tiles} if isinstance(page, RunPage) else {}))


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
        self._new: dict[str, list[list[float]]] = {}
        self._reasons: dict[str, str] = {}
        client.register_plugin(RunPage())

    def done(self, iy: int, ix: int, status: int, thumbnail: Any = None, reason: str = "") -> None:
        """Block (iy, ix) has ended with `status`."""
        self.status[iy, ix] = status
        if thumbnail is not None:
            self._new[f"{iy},{ix}"] = thumbnail
        if reason:
            self._reasons[f"{iy},{ix}"] = reason

    def send(self, *, rate: float, remaining_s: float | None, workers: int, note: str = "") -> None:
        """Push what is new to the scheduler."""
        new, self._new = self._new, {}
        state = {
            "run": self._run,
            "title": self._title,
            "shape": self.status.shape,
            "status": "".join(map(str, self.status.ravel().tolist())),
            "rate": rate,
            "remaining_s": None if remaining_s is None or not math.isfinite(remaining_s) else remaining_s,
            "workers": workers,
            "failed": self._reasons,
            "note": note,
        }
        self.client.log_event(TOPIC, {"state": state, "tiles": new})
