"""Figures of results: strain, detection, Bragg vector map, virtual images, truth, error bars, two runs.

Every function takes a dataset, or the tree of a run, and returns a matplotlib `Figure` that belongs to no
window: save it with ``figure.savefig("strain.png")`` (or ``.svg``, ``.pdf``), or let a notebook show it.
Colours are safe for colour-blind readers; what is missing is grey. All take ``theme="dark"``, and ``size=``
"column" (85 mm), "page" (180 mm) or "slide".
"""

from .compare import disagreement, methods, numbers, truth
from .evidence import calibration_evidence, descan
from .lines import along_line, grains, orientations, profile
from .maps import error_bars, scan_map, strain, virtual
from .patterns import bragg_vector_map, calibration, detection
from .runs import difference, two_runs, where_found
from .style import to_png

__all__ = [
    "along_line",
    "bragg_vector_map",
    "calibration",
    "calibration_evidence",
    "descan",
    "detection",
    "difference",
    "disagreement",
    "error_bars",
    "grains",
    "methods",
    "numbers",
    "orientations",
    "profile",
    "scan_map",
    "strain",
    "to_png",
    "truth",
    "two_runs",
    "virtual",
    "where_found",
]
