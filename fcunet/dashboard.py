"""The page ``/fcunet`` on the Dask dashboard's own port: a map of the scan filling in, speed, failures.

The driver of a run pushes its state to the scheduler about once per second; the page asks the scheduler for
``/fcunet.json``. No other port, no other server, and nothing that is not needed on a page behind an ssh
tunnel.
"""

import json
import math
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
        self.write(_PAGE)


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


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fcunet</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#222;background:#fff;max-width:72rem}
h1{font-size:1.3rem;margin:0 0 .5rem} #facts span{margin-right:2rem} b{font-size:1.2rem}
canvas{image-rendering:pixelated;border:1px solid #999;background:#e8e8ee;margin-top:1rem;max-width:100%}
#bar{height:8px;background:#e8e8ee;margin:.7rem 0} #bar div{height:8px;background:#2a6f97;width:0}
#failed{color:#a11;white-space:pre-line} a{color:#2a6f97} .key{color:#666;font-size:.85rem}
</style></head><body>
<h1 id="title">fcunet</h1>
<div id="facts"><span><b id="done">-</b> blocks</span><span><b id="rate">-</b> patterns/s</span>
<span><b id="left">-</b> left</span><span><b id="workers">-</b> workers</span><span id="note"></span></div>
<div id="bar"><div id="fill"></div></div>
<canvas id="map" role="img" aria-label="Map of the scan: finished blocks show the bright field"></canvas>
<div class="key">Finished blocks show the virtual bright field (dark to light: least to most counts); grey: to
do; red: failed.</div> <div id="failed"></div><p class="key"><a href="status">Dask dashboard</a></p> <script>
const $=id=>document.getElementById(id), T=8; const time=s=>s==null?'-':s<90?Math.round(s)+'
s':s<5400?Math.round(s/60)+' min':
  Math.floor(s/3600)+' h '+String(Math.round(s%3600/60)).padStart(2,'0')+' min';
function draw(d){
  const [ny,nx]=d.shape, c=$('map'); c.width=nx*T; c.height=ny*T;
  const zoom=Math.max(1,Math.min(16,Math.floor(1000/c.width),Math.floor(560/c.height)));
  c.style.width=c.width*zoom+'px';
  const g=c.getContext('2d'), all=Object.values(d.tiles).flat(2).sort((a,b)=>a-b);
  const lo=all[Math.floor(.01*(all.length-1))], hi=all[Math.ceil(.99*(all.length-1))];
  for(let i=0;i<ny;i++)for(let j=0;j<nx;j++){
    const s=d.status[i*nx+j], t=d.tiles[i+','+j];
    g.fillStyle=s=='2'?'#c1272d':s=='1'?'#7f8fa6':'#e8e8ee'; g.fillRect(j*T,i*T,T,T);
    if(t&&s=='1')for(let y=0;y<t.length;y++)for(let x=0;x<t[y].length;x++){
      const v=hi>lo?Math.max(0,Math.min(1,(t[y][x]-lo)/(hi-lo))):.5, k=Math.round(255*v);
      g.fillStyle=`rgb(${k},${k},${k})`;
      const x0=Math.round(x*T/t[y].length),x1=Math.round((x+1)*T/t[y].length);
      const y0=Math.round(y*T/t.length),y1=Math.round((y+1)*T/t.length);
      g.fillRect(j*T+x0,i*T+y0,x1-x0,y1-y0);}
  }
}
async function tick(){
  try{
    const d=await(await fetch('fcunet.json',{cache:'no-store'})).json();
    if(d.shape){
      const ended=[...d.status].filter(s=>s!='0').length;
      $('title').textContent=d.title; document.title=Math.floor(100*ended/d.status.length)+' % '+d.title;
      $('done').textContent=ended+' of '+d.status.length;
      $('rate').textContent=Math.round(d.rate).toLocaleString('en');
      $('left').textContent=time(d.remaining_s); $('workers').textContent=d.workers;
      $('note').textContent=d.note; $('fill').style.width=100*ended/d.status.length+'%';
      $('failed').textContent=Object.entries(d.failed).map(([b,r])=>'block ('+b+'): '+r).join('\\n'); draw(d);
    }else $('title').textContent='fcunet: waiting for a run';
  }catch(e){$('note').textContent='no answer from the scheduler: the run has ended, or the tunnel is down';}
  setTimeout(tick,1500);
}
tick();
</script></body></html>
"""
