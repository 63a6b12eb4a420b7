"""The ``fcunet`` command, with blocks that take a while: for faults that must find it at work."""

import slow_tile

from fcunet import tiles
from fcunet.cli import main

if __name__ == "__main__":
    tiles.submitted = slow_tile.slow_tile
    main()
