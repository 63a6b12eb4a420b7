"""The report of a run, and of two runs compared: HTML files that hold their figures, readable on a phone.

`source` reads what is known of a run, `page` writes HTML, `single` and `compare` are the two reports.
"""

from .compare import write_comparison
from .single import write_report

__all__ = ["write_comparison", "write_report"]
