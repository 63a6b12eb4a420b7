"""Look at a result like a microscopist: click a map, see the pattern, its disks, its lattice and its numbers.

Built on Panel with plain Bokeh figures. Panel shows the same page in a notebook and from a server,
and belongs to the family of hvplot and holoviews, which draw whole elements anew on every change; figures
with sources of their own send what a click has changed and nothing else, which keeps a scan of a million
positions fluent, also through a tunnel. Bokeh is installed with Dask's dashboard anyway.

`sources` knows where the numbers lie, `view` what is looked at (no window, and the code that repeats it),
`figures` draws, `app` listens, `serve` opens a browser.
"""

from .app import Explorer, explore
from .sources import Sources, find_sources
from .view import Detector, Maps, View

__all__ = ["Detector", "Explorer", "Maps", "Sources", "View", "explore", "find_sources"]
