"""Strain maps with error bars from 4D-STEM scans: Zarr in, FCU-Net or correlation per pattern, xarray out.

Everything public is imported on first use, so ``import fcunet`` costs milliseconds and a worker or a command
loads only what it needs.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# public name -> module, or module:attribute where the two differ
_PUBLIC = {
    "Config": "config",
    "FCUNet": "nn.model",
    "bragg_vector_map": "pipeline",
    "cluster": "cluster:connect",
    "compute_strain": "pipeline",
    "convert": "convert",
    "explore": "explore.app",
    "find_peaks": "pipeline",
    "fit_lattice": "pipeline",
    "load_model": "nn.weights",
    "open": "store:open_datacube",
    "open_results": "store",
    "plot": "plot:",
    "run": "runner",
    "simulate": "simulation.scan",
    "virtual_image": "pipeline",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fcunet' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module_name, _, attribute = _PUBLIC[name].partition(":")
    module = import_module(f"fcunet.{module_name}")
    return module if _PUBLIC[name].endswith(":") else getattr(module, attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps the functions `convert` and `cluster` reachable although submodules have the same names."""

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system binds a freshly imported submodule here: leave such names to __getattr__
        if name in _PUBLIC and isinstance(value, ModuleType) and not _PUBLIC[name].endswith(":"):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
