"""Readers of vendors' formats: each turns a file into a `Source`, lazily, and says what it did to the rows.

The format is found by looking inside the file, for several formats share one extension (``.h5`` most of all).
"""

from .base import Axis, Source
from .detect import open_source

__all__ = ["Axis", "Source", "open_source"]
