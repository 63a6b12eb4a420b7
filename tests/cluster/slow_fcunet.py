"""The ``fcunet`` command, with blocks that take a while, so that faults find it at work, and no figures."""

import slow_tile

from fcunet import runner, tiles
from fcunet.cli import main

if __name__ == "__main__":
    tiles.submitted = slow_tile.slow_tile
    runner._write_report = lambda out: out / "report.html"
    main()
