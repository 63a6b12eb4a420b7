"""Figures of results: strain, detection, Bragg vector map, virtual images, truth, error bars.

Every function takes a dataset, or the tree of a run, and returns a matplotlib `Figure` that belongs to no
window: save it with ``figure.savefig("strain.png")``, or let a notebook show it. Colours are safe for
colour-blind readers; what is missing is grey.
"""

from .compare import methods, numbers, truth
from .maps import error_bars, strain, virtual
from .patterns import bragg_vector_map, calibration, detection
from .style import to_png

__all__ = [
    "bragg_vector_map",
    "calibration",
    "detection",
    "error_bars",
    "methods",
    "numbers",
    "strain",
    "to_png",
    "truth",
    "virtual",
]
