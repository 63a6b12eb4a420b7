"""Where the scan of a finished run is now: where the run found it, or near the run after both were moved."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from .config import Config
from .provenance import input_fingerprint
from .remote import Place, scan_of
from .store import open_datacube

logger = logging.getLogger(__name__)


def find_scan(folder: Path | None, tree: xr.DataTree) -> tuple[Place, xr.Dataset] | None:
    """Path and datacube of the scan behind the results `tree`, cut to the region of the run.

    None if no place holds a scan of that shape and fingerprint.
    """
    for path in places(folder):
        with contextlib.suppress(OSError, ValueError, ImportError):
            if not path.exists():
                continue
            part = cut_to_region(tree, open_datacube(path, check=False))
            if part is not None and same_scan(tree.attrs, path):
                return path, part
    return None


def places(folder: Path | None) -> list[Place]:
    """Where the scan of a run may be: as the run was told, or under its name in or near the run directory."""
    if folder is None or not (folder / "config.yaml").is_file():
        return []
    try:
        config = Config.load(folder / "config.yaml")
    except ValueError as err:
        logger.info("config.yaml cannot be read: %s", err)
        return []
    if config.store is None:
        return []
    store = scan_of(config)
    near = [base / store.name for base in (folder, *list(folder.resolve().parents)[:3])]
    return [store, *near]


def cut_to_region(tree: xr.DataTree, datacube: xr.Dataset) -> xr.Dataset | None:
    """The region of the run; None if the scan has another shape."""
    region = tree.attrs.get("region")
    if region:
        y0, y1, x0, x1 = (int(v) for v in region)
        datacube = datacube.isel(scan_y=slice(y0, y1), scan_x=slice(x0, x1))
    shape = tree["strain"].sizes
    same = all(datacube.sizes[d] == shape[d] for d in ("scan_y", "scan_x"))
    return datacube if same else None


def same_scan(attrs: Mapping[Any, Any], path: Place) -> bool:
    """The fingerprint agrees, if there is one."""
    known = attrs.get("input_fingerprint")
    return not known or input_fingerprint(path) == known
