"""``.fcunet`` on datasets and trees: the functions of the package, said shorter. Sugar only.

The accessors are there as soon as any part of fcunet that uses xarray has been imported, such as by
``fcunet.open`` or ``fcunet.open_results``.
"""

import base64
import html
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from . import schema

_NUMBERS = "display:inline-block;margin:0 1.4em .3em 0"


class _Shared:
    """What datasets and trees have in common."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def to_py4dstem(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write an EMD file that py4DSTEM opens; see :func:`fcunet.export.export`."""
        from .export import export

        return export(self._data, path, to="py4dstem", overwrite=overwrite)


@xr.register_dataset_accessor("fcunet")
class DatasetAccessor(_Shared):
    """``ds.fcunet`` of a datacube, of peaks, and of each group of the results."""

    def plot(self, **options: Any) -> Any:
        """The figure that suits what the dataset holds; `options` are those of the function of `fcunet.plot`.

        Strain: the four panels. Peaks and virtual images: the images. Diffraction: the Bragg vector map. A
        datacube: the pattern at ``at=(y, x)``, default the middle of the scan.

        Raises
        ------
        ValueError
            If the dataset is none of these.
        """
        from . import plot

        if set(schema.STRAIN_COMPONENTS) <= set(self._data):
            return plot.strain(self._data, **options)
        if "intensity" in self._data:
            middle = tuple(self._data.sizes[d] // 2 for d in schema.SCAN_DIMS)
            return plot.detection(self._data, **({"at": middle} | options))
        if {"bf", "n_peaks"} & set(self._data):
            return plot.virtual(self._data, **options)
        if "bragg_vector_map" in self._data:
            return plot.bragg_vector_map(self._data, **options)
        raise ValueError(
            f"there is no figure for {', '.join(map(str, self._data))}; see fcunet.plot for all of them"
        )

    def at(self, y: int, x: int) -> Any:
        """What is known of scan position (y, x), in memory.

        Returns
        -------
        DataArray or Dataset
            The pattern (qy, qx) of a datacube; of peaks those found, without padding; else the variables at
            that position.

        Raises
        ------
        ValueError
            If the position lies outside the scan.
        """
        ny, nx = (self._data.sizes[d] for d in schema.SCAN_DIMS)
        if not (0 <= y < ny and 0 <= x < nx):
            raise ValueError(f"position {y}, {x} is outside the scan of {ny} x {nx}; both count from 0")
        if "intensity" in self._data:
            return self._data["intensity"].isel(scan_y=y, scan_x=x).compute()
        here = self._data.drop_dims(schema.BLOCK_DIMS, errors="ignore").isel(scan_y=y, scan_x=x).compute()
        if "peak" in here.dims:
            return here.isel(peak=np.flatnonzero(np.isfinite(here["peak_qy"].values)))
        return here


@xr.register_datatree_accessor("fcunet")
class TreeAccessor(_Shared):
    """``results.fcunet`` of the tree of a run; a notebook shows its numbers and its strain."""

    def plot(self, **options: Any) -> Any:
        """The four-panel strain map; see :func:`fcunet.plot.strain`."""
        from . import plot

        return plot.strain(self._data, **options)

    def at(self, y: int, x: int) -> dict[str, xr.Dataset]:
        """What each group knows of scan position (y, x)."""
        groups = {str(name): node.dataset for name, node in self._data.children.items()}
        scans = {name: d for name, d in groups.items() if set(schema.SCAN_DIMS) <= set(d.dims)}
        return {name: d.fcunet.at(y, x) for name, d in scans.items()}

    def explore(self, *, scan: Any = None) -> Any:
        """The interactive explorer; see :func:`fcunet.explore`."""
        from .explore import explore

        return explore(self._data, scan=scan)

    def summary(self) -> dict[str, str]:
        """The few numbers a reader wants first, in words."""
        strain, lattice = self._data["strain"].dataset, self._data["lattice"].dataset
        e_xx = np.asarray(strain["e_xx"].values, dtype=float)
        found = {
            "scan": f"{e_xx.shape[0]} x {e_xx.shape[1]}",
            "with a lattice": f"{100 * np.isfinite(e_xx).mean() if e_xx.size else 0:.1f} %",
        }
        for name, values, factor, unit in (
            ("residual of the fit", lattice.get("fit_error"), 1.0, "px"),
            ("error bar of e_xx", strain.get("e_xx_std"), 1e3, "x 1e-3"),
        ):
            good = np.asarray([] if values is None else values.values, dtype=float)
            good = good[np.isfinite(good)]
            if good.size:
                found[name] = f"{factor * np.median(good):.3g} {unit}"
        for name in ("reference", "frame"):
            if name in strain.attrs:
                found[name] = str(strain.attrs[name])
        return found

    def __repr__(self) -> str:
        facts = ", ".join(f"{k} {v}" for k, v in self.summary().items())
        return f"fcunet results: {facts}"

    def _repr_html_(self) -> str:
        title = html.escape(str(self._data.attrs.get("input_title") or "results"))
        cells = "".join(
            f'<span style="{_NUMBERS}"><b>{html.escape(v)}</b> {html.escape(k)}</span>'
            for k, v in self.summary().items()
        )
        png = base64.b64encode(self.plot()._repr_png_()).decode()
        picture = (
            f'<img alt="strain" style="max-width:100%;background:#fff" src="data:image/png;base64,{png}">'
        )
        return f"<div><h3>{title}</h3><div>{cells}</div>{picture}</div>"
