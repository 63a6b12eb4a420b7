"""The explorer's window: controls left, map and profile in the middle, pattern and numbers right."""

import html
import io
import logging
import sys
import threading
from typing import Any

import numpy as np
import panel as pn
import xarray as xr
from bokeh.events import Pan, PanEnd, PanStart, Tap

from ..schema import STRAIN_COMPONENTS
from .figures import HistogramFigure, MapFigure, PatternFigure, ProfileFigure
from .numbers import NOTE_STYLE, numbers_table
from .recipe import code
from .sources import Sources, find_sources
from .view import DETECTOR, Detector, Maps, View, kind_of, thinned

logger = logging.getLogger(__name__)

LOOK, REFERENCE, LINE = "position", "reference", "profile"
_DRAG_MS = 40  # pointer events are gathered for so long: the last one counts
_ASK_BYTES = 4e9  # a virtual image of a larger scan is computed when asked for, not when drawn


def explore(results: Any, *, scan: Any = None) -> "Explorer":
    """Explore a result: click a map, see the pattern, its disks and lattice, and the numbers.

    Parameters
    ----------
    results : path or DataTree
        Run directory, its ``strain.zarr``, or the tree of `fcunet.open_results`.
    scan : path or Dataset, optional
        The datacube; default is where the run found it, or under its name near the run directory. Without it
        all maps work, and patterns say what is missing.

    Returns
    -------
    Explorer
        Shows itself in a notebook. ``fcunet explore RUN`` opens the same in a browser. Only what is looked
        at is read; the image of a virtual detector is computed on the Dask client at hand, if there is one.

    Raises
    ------
    FileNotFoundError, ValueError
        If there are no results, or `scan` is another scan.
    """
    return Explorer(find_sources(results, scan))


class Explorer:
    """The window on one result.

    Attributes
    ----------
    view : View
        What is looked at; change it with :meth:`update`.
    maps : Maps
        The numbers.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources, self.maps = sources, Maps(sources)
        ny, nx = sources.shape
        shown = next((n for n in STRAIN_COMPONENTS if n in self.maps.names), self.maps.names[0])
        self.view = View(shown=shown, position=(ny // 2, nx // 2))
        self._pending: dict[str, Any] = {}
        self._waiting, self._quiet = False, False
        self._drag_from: tuple[int, int] | None = None
        self._shape = self._detector_shape()
        self.map = MapFigure(self.maps.shown(self.view))
        self.profile, self.histogram = ProfileFigure(), HistogramFigure()
        self.pattern, self.mean = PatternFigure("pattern", self._shape), PatternFigure("mean", self._shape)
        self.numbers = pn.pane.HTML("", name="numbers", min_width=340)
        self.notes = pn.pane.HTML("", name="notes", width=420)
        self._make_controls()
        self._listen()
        self.mean.show(sources.mean_pattern(), power=0.35, title="mean pattern")
        self._draw(set(View.__dataclass_fields__))

    def _detector_shape(self) -> tuple[int, int]:
        mean = self.sources.mean_pattern()
        if mean is not None:
            return mean.shape  # type: ignore[return-value]
        if self.sources.datacube is not None:
            return self.sources.datacube["intensity"].shape[2:]  # type: ignore[return-value]
        return 128, 128

    # ------------------------------------------------------------------------------------------- controls

    def _make_controls(self) -> None:
        names = {kind_of(n).title: n for n in self.maps.names}
        wide = {"width": 230}
        self.choose = pn.widgets.Select(label="map", options=names, value=self.view.shown, **wide)
        self.mode = pn.widgets.RadioButtonGroup(
            options={"position": LOOK, "reference": REFERENCE, "profile": LINE}, value=LOOK, **wide
        )
        self.low = pn.widgets.FloatInput(label="from", width=105, step=0.1)
        self.high = pn.widgets.FloatInput(label="to", width=105, step=0.1)
        self.auto = pn.widgets.Button(label="range from the values", **wide)
        stored = self.sources.tree["strain"].attrs
        self.rotation = pn.widgets.FloatSlider(
            label="scan frame against detector (degrees)", start=-180, end=180, step=0.5,
            value=float(stored.get("rotation_degree", 0.0)), value_throttled=0.0, **wide,
        )  # fmt: skip
        self.reset = pn.widgets.Button(label="reference and frame as in the run", **wide)
        most = (
            int(np.nanmax(thinned(self.maps.stored("n_indexed").values))) if self.maps.has("n_indexed") else 0
        )
        self.min_indexed = pn.widgets.IntSlider(label="peaks in the fit, at least", end=max(most, 1), **wide)
        worst = _top(self.maps.stored("fit_error").values) if self.maps.has("fit_error") else 1.0
        self.max_error = pn.widgets.FloatSlider(
            label="residual (px), at most", start=0, end=worst, value=worst, step=worst / 200, **wide
        )
        bars = [self.maps.stored(f"{c}_std").values for c in ("e_xx", "e_yy") if self.maps.has(f"{c}_std")]
        bar = 1e3 * max((_top(b) for b in bars), default=1e-3)
        self.max_std = pn.widgets.FloatSlider(
            label="error bar (1e-3), at most", start=0, end=bar, value=bar, step=bar / 200, **wide
        )
        self.min_intensity = pn.widgets.FloatSlider(
            label="weakest peak drawn (share of strongest)", start=0, end=0.5, step=0.005, value=0, **wide
        )
        self.power = pn.widgets.FloatSlider(
            label="brightness: counts to the power", start=0.1, end=1, value=0.4, step=0.05, **wide
        )
        self.direction = pn.widgets.RadioButtonGroup(options=["row", "column"], value="row", width=150)
        self.width = pn.widgets.IntInput(label="width", value=1, start=1, end=999, width=70)
        self.ring_inner = pn.widgets.FloatInput(label="inner (px)", value=0.0, start=0, width=105)
        self.ring_outer = pn.widgets.FloatInput(label="outer (px)", value=0.0, start=0, width=105)
        self.image = pn.widgets.Button(label="image of the virtual detector", color="primary", **wide)
        self.progress = pn.pane.HTML("", name="progress", **wide)
        self.format = pn.widgets.Select(options=["png", "svg", "pdf"], width=70)
        self.size = pn.widgets.Select(options=["screen", "column", "page", "slide"], width=85)
        self.theme = pn.widgets.Select(options=["light", "dark"], width=70)
        self.save = pn.widgets.FileDownload(
            callback=self._figure_file, filename="map.png", label="save the figure", **wide
        )
        self.code = pn.widgets.TextAreaInput(value="", height=230, width=430, label="code")

    def _listen(self) -> None:
        def connect(widget: Any, parameter: str, make: Any) -> None:
            widget.param.watch(lambda event: None if self._quiet else self.soon(**make(event.new)), parameter)

        connect(self.choose, "value", lambda v: {"shown": v, "limits": None})
        connect(self.rotation, "value", lambda v: {"rotation_degree": float(v)})
        connect(self.min_indexed, "value", lambda v: {"min_indexed": int(v)})
        connect(
            self.max_error,
            "value",
            lambda v: {"max_fit_error": None if v >= self.max_error.end else float(v)},
        )
        connect(
            self.max_std, "value", lambda v: {"max_std": None if v >= self.max_std.end else 1e-3 * float(v)}
        )
        connect(self.min_intensity, "value", lambda v: {"min_intensity": float(v)})
        connect(self.direction, "value", lambda v: {"line": v})
        connect(self.width, "value", lambda v: {"width": max(1, int(v or 1))})
        for end in (self.low, self.high):
            connect(end, "value", lambda v: self._typed_limits())
        for radius in (self.ring_inner, self.ring_outer):
            connect(radius, "value", lambda v: {"detector": self._ring()})
        self.auto.on_click(lambda event: self.soon(limits=None))
        self.reset.on_click(lambda event: self.soon(reference=None, rotation_degree=None))
        self.power.param.watch(lambda event: self._draw({"pattern"}), "value")
        self.image.param.watch(lambda event: self.compute_image(), "clicks")
        self.format.param.watch(lambda event: self.save.param.update(filename=f"map.{event.new}"), "value")
        for event in (Tap, PanStart, Pan, PanEnd):
            self.map.fig.on_event(event, self._on_map)
            self.mean.fig.on_event(event, self._on_mean)

    def _typed_limits(self) -> dict[str, Any]:
        low, high = self.low.value, self.high.value
        if low is None or high is None or not low < high:
            return {}
        return {"limits": (float(low), float(high))}

    def _ring(self) -> Detector | None:
        inner, outer = float(self.ring_inner.value or 0), float(self.ring_outer.value or 0)
        if outer <= inner:
            return None
        return Detector(self.view.detector.centre if self.view.detector else self._centre(), inner, outer)

    def _centre(self) -> tuple[float, float]:
        if self.sources.calibration is not None:
            y, x = self.sources.calibration.centre
            return float(y), float(x)
        return (self._shape[0] - 1) / 2, (self._shape[1] - 1) / 2

    # ------------------------------------------------------------------------------------------- pointer

    def _on_map(self, event: Any) -> None:
        at = self.map.index(event.x, event.y)
        if at is None:
            return
        if isinstance(event, Tap) or self.mode.value == LOOK:
            self.soon(delay=not isinstance(event, Tap), position=at)
            return
        if isinstance(event, PanStart):
            self._drag_from = at
            return
        if self._drag_from is None:
            return
        (y0, x0), (y1, x1) = self._drag_from, at
        if self.mode.value == LINE and (y0, x0) != (y1, x1):
            self.soon(delay=True, line=((y0, x0), (y1, x1)))
        elif self.mode.value == REFERENCE:
            region = min(y0, y1), max(y0, y1) + 1, min(x0, x1), max(x0, x1) + 1
            self.map.mark_box(region)
            if isinstance(event, PanEnd):
                self.soon(reference=region)
        if isinstance(event, PanEnd):
            self._drag_from = None

    def _on_mean(self, event: Any) -> None:
        if event.x is None or event.y is None:
            return
        if isinstance(event, PanStart):
            self._ring_from = (float(event.y), float(event.x))
        elif isinstance(event, Pan | PanEnd) and hasattr(self, "_ring_from"):
            y, x = self._ring_from
            outer = round(float(np.hypot(event.y - y, event.x - x)), 1)
            inner = float(self.ring_inner.value or 0)
            if outer > inner:
                last = isinstance(event, PanEnd)
                self.soon(delay=not last, detector=Detector((round(y, 1), round(x, 1)), inner, outer))
                if last and self._bytes() <= _ASK_BYTES:
                    self.compute_image()

    # -------------------------------------------------------------------------------------------- change

    def soon(self, *, delay: bool = False, **changes: Any) -> None:
        """Change the view; while the pointer is dragged only the last of many changes is drawn."""
        self._pending.update(changes)
        document = pn.state.curdoc
        if delay and document is not None and document.session_context is not None:
            if not self._waiting:
                self._waiting = True
                document.add_timeout_callback(self._apply, _DRAG_MS)
        else:
            self._apply()

    def _apply(self) -> None:
        self._waiting = False
        changes, self._pending = self._pending, {}
        if changes:
            self.update(**changes)

    def update(self, **changes: Any) -> None:
        """Change what is looked at (names of `View`), and draw what depends on it.

        Raises
        ------
        ValueError
            For a reference region without a lattice; the view stays as it was.
        """
        before, self.view = self.view, self.view.changed(**changes)
        moved = {n for n in changes if getattr(before, n) != getattr(self.view, n)}
        try:
            self._draw(moved)
            self._say("")
        except ValueError as err:  # a reference without a lattice, for one
            self.view = before
            self._draw(moved)
            self._say(str(err))

    def _draw(self, changed: set[str]) -> None:
        view = self.view
        strain = {"reference", "rotation_degree"}
        of_map = {"shown", "min_indexed", "max_fit_error", "max_std", "virtual"} | strain
        if changed & (of_map | {"limits"}):
            self._draw_map(fresh=bool(changed & of_map))
        if changed & (of_map | {"position", "line", "width", "limits"}):
            self.map.mark(view.position)
            self.map.mark_line(*self.maps.ends(view))
            kind = kind_of(view.shown)
            self.profile.show(self.maps.profile(view), view.shown, _label(kind.title, kind.unit))
            here = float(self._values[view.position])
            self.histogram.mark(self.maps.limits(view, self._values), here)
        if changed & {"reference"}:
            self.map.mark_box(view.reference)
        if changed & {"position", "min_intensity", "pattern"}:
            self._draw_pattern()
        if changed & ({"position", "min_intensity"} | of_map):
            self.numbers.object = numbers_table(self.maps, self.view)
        if changed & {"detector"}:
            ring = view.detector
            self.mean.mark_ring(*((ring.centre, ring.inner, ring.outer) if ring else (None,)))
            if ring:
                self._silently(ring_inner=ring.inner, ring_outer=ring.outer)
        self._silently(choose=view.shown, rotation=self._rotation())
        if isinstance(view.line, str):
            self._silently(direction=view.line)
        self.code.value = code(self.maps, view)
        self._push()

    def _draw_map(self, *, fresh: bool) -> None:
        view, kind = self.view, kind_of(self.view.shown)
        if fresh:
            self._values = self.maps.shown(view).values
            self.map.show(self._values, title=kind.title, unit=kind.unit, colours=kind.palette)
            self.histogram.show(thinned(self._values), _label(kind.title, kind.unit))
        low, high = self.maps.limits(view, self._values)
        self.map.mapper.update(low=float(low), high=float(high))
        self._silently(low=round(float(low), 6), high=round(float(high), 6))

    def _draw_pattern(self) -> None:
        view = self.view
        y, x = view.position
        pattern = self.sources.pattern(y, x)
        peaks, strong = self.maps.peaks_shown(view)
        origin, g, _ = self.maps.lattice_shown(view)
        on = f"{len(peaks['peak_qy'])} peaks" if self.sources.peaks is not None else "no peaks at hand"
        self.pattern.show(pattern, power=float(self.power.value or 0.4), title=f"scan {y}, {x}: {on}")
        reach = self.sources.tree["lattice"].attrs.get("max_peak_spacing_px")
        self.pattern.mark(peaks, strong, origin, g, radius=self.sources.radius_px, reach=reach)

    def _rotation(self) -> float:
        chosen = self.view.rotation_degree
        stored = self.sources.tree["strain"].attrs.get("rotation_degree", 0.0)
        return float(stored if chosen is None else chosen)

    def _silently(self, **values: Any) -> None:
        """Set widgets without listening to them."""
        self._quiet = True
        try:
            for name, value in values.items():
                widget = getattr(self, name)
                if widget.value != value and (name != "choose" or value in widget.options.values()):
                    widget.value = value
        finally:
            self._quiet = False

    def _say(self, text: str) -> None:
        notes = [t for t in (text, *self.sources.missing.values()) if t]
        self.notes.object = NOTE_STYLE + "".join(
            f'<div class="fcu-note">{html.escape(note)}</div>' for note in notes
        )

    def _push(self) -> None:
        """In a notebook, what changed in the figures is sent by hand; a server does it itself."""
        document = pn.state.curdoc
        served = document is not None and document.session_context is not None
        if not served and getattr(self, "_panes", None):
            for pane in self._panes:
                if pane._models:
                    pn.io.push_notebook(pane)

    # -------------------------------------------------------------------------------- virtual detector

    def _bytes(self) -> float:
        return 0.0 if self.sources.datacube is None else float(self.sources.datacube["intensity"].nbytes)

    def compute_image(self) -> threading.Thread | None:
        """Compute the image of the virtual detector, on the Dask client at hand or on this machine."""
        try:
            lazy = self.maps.virtual_lazy(self.view)
        except ValueError as err:
            self.progress.object = html.escape(str(err))
            return None
        client = _client()
        document = pn.state.curdoc
        where = f"on {len(client.nthreads())} workers" if client else "on this machine"
        self.progress.object = f"reading {self._bytes() / 1e9:.3g} GB {where} ..."

        def work() -> None:
            try:
                image = client.compute(lazy).result() if client else lazy.compute(scheduler="threads")
                error = ""
            except Exception as err:  # shown to the user, whatever it is
                logger.warning("virtual image: %s", err)
                image, error = None, f"{type(err).__name__}: {err}"
            if document is not None and document.session_context is not None:
                document.add_next_tick_callback(lambda: self._image_done(image, error))
            else:
                self._image_done(image, error)

        thread = threading.Thread(target=work, name="fcunet-virtual-image", daemon=True)
        thread.start()
        return thread

    def _image_done(self, image: xr.DataArray | None, error: str) -> None:
        self.progress.object = html.escape(error) or "done"
        if image is None:
            return
        self.maps.virtual = image
        self._quiet = True
        self.choose.options = {**self.choose.options, DETECTOR: DETECTOR}
        self._quiet = False
        self.view = self.view.changed(shown=DETECTOR, limits=None)
        self._draw({"shown", "virtual"})

    # ------------------------------------------------------------------------------------------- export

    def figure(self) -> Any:
        """The map shown as a figure for print, in the size and theme chosen."""
        size = None if self.size.value == "screen" else self.size.value
        return self.maps.figure(self.view, theme=self.theme.value, size=size)

    def _figure_file(self) -> io.BytesIO:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format=self.format.value)
        buffer.seek(0)
        return buffer

    # ------------------------------------------------------------------------------------------- window

    def panel(self) -> Any:
        """The window as a Panel layout."""
        self._say("")
        heading = pn.pane.HTML(
            f'<div style="font:600 17px Helvetica,Arial,sans-serif">{html.escape(self.sources.title)}</div>'
        )
        head = {"styles": {"font": "600 13px Helvetica,Arial,sans-serif", "margin-top": "8px"}}

        def title(text: str) -> Any:
            return pn.pane.HTML(text, **head)

        controls = pn.Column(
            self.choose, pn.Row(self.low, self.high), self.auto,
            title("drag on the map to move or draw the"), self.mode, self.rotation, self.reset,
            title("grey where"), self.min_indexed, self.max_error, self.max_std,
            title("profile"), pn.Row(self.direction, self.width),
            title("pattern"), self.min_intensity, self.power,
            title("virtual detector (drag on the mean pattern)"), pn.Row(self.ring_inner, self.ring_outer),
            self.image, self.progress,
            title("figure for print"), pn.Row(self.format, self.size, self.theme), self.save,
            width=260,
        )  # fmt: skip
        figures = [f.fig for f in (self.map, self.profile, self.histogram, self.pattern, self.mean)]
        self._panes = [pn.pane.Bokeh(fig) for fig in figures]
        middle = pn.Column(*self._panes[:3])
        code_tab = pn.Column(pn.pane.HTML("This code computes and draws what you see."), self.code)
        right = pn.Column(
            pn.Tabs(
                ("pattern", self._panes[3]),
                ("mean pattern, virtual detector", self._panes[4]),
                ("code", code_tab),
            ),
            self.notes,
            self.numbers,
        )
        # a light sheet, also in a dark notebook; what finds no room beside the others goes below them
        sheet = {"background": "#ffffff", "color": "#222222", "color-scheme": "light", "padding": "6px"}
        parts = pn.FlexBox(controls, middle, right, gap="14px", align_items="flex-start")
        return pn.Column(heading, parts, styles=sheet, sizing_mode="stretch_width")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        pn.extension(
            inline=True, notifications=False
        )  # everything from the package, nothing from the network
        return self.panel()._repr_mimebundle_(include, exclude)

    def __repr__(self) -> str:
        ny, nx = self.sources.shape
        patterns = "patterns at hand" if self.sources.datacube is not None else "no patterns"
        maps = f"{len(self.maps.names)} maps"
        return f"Explorer of {self.sources.title}: {ny} x {nx} positions, {maps}, {patterns}"


def _label(title: str, unit: str) -> str:
    return f"{title} ({unit})" if unit else title


def _top(values: Any) -> float:
    """A round number above all but the worst values; 1 if there are none."""
    sample = thinned(np.asarray(values, dtype=float))
    finite = sample[np.isfinite(sample)]
    top = float(np.percentile(finite, 99.9)) if finite.size else 1.0
    return top if top > 0 else 1.0


def _client() -> Any:
    """The Dask client at hand, without importing distributed for it."""
    if "distributed" not in sys.modules:
        return None
    from distributed import default_client

    try:
        return default_client()
    except ValueError:
        return None
