"""The crystal library: some 2000 plausible crystals of more than 200 structure prototypes, in one JSON file.

`workflows/build_crystal_library.py` writes the file and says where everything in it comes from. A training
set needs many geometries and compositions rather than exact lattice constants, which these crystals have to a
few per cent; published structures are in `crystals`.
"""

import json
from functools import cache
from math import gcd
from typing import Any

import numpy as np

from .crystals import DATA, Crystal, cell_from_parameters, default_u_rms, load_crystals

LIBRARY_FILE = DATA / "library.json"


@cache
def _document() -> dict[str, Any]:
    return json.loads(LIBRARY_FILE.read_text())


def library_provenance() -> dict[str, str]:
    """Where prototypes and volumes come from, with versions."""
    return dict(_document()["provenance"])


@cache
def _library() -> dict[str, Crystal]:
    crystals = {}
    for entry in _document()["prototypes"]:
        cell = cell_from_parameters(*entry["cell"])
        volume = abs(np.linalg.det(cell))
        positions = np.array(entry["positions"], float).reshape(-1, 3)
        counts = np.bincount(entry["species"])
        counts = counts // gcd(*counts.tolist())
        for *elements, crystal_volume in entry["crystals"]:
            formula = "".join(e + (str(n) if n > 1 else "") for e, n in zip(elements, counts, strict=True))
            symbols = tuple(elements[s] for s in entry["species"])
            name = f"{formula}-{entry['prototype']}"
            crystals[name] = Crystal(
                name=name,
                prototype=entry["family"],
                split=entry["split"],
                cell=cell * (crystal_volume / volume) ** (1 / 3),
                centring="P",
                symbols=symbols,
                positions=positions,
                u_rms=np.array([default_u_rms(s) for s in symbols]),
            )
    return crystals


def load_library(split: str | None = None, *, published: bool = True) -> dict[str, Crystal]:
    """Crystals by name, all of them or those of one split.

    Parameters
    ----------
    split : str, optional
        "train", "validation" or "test". A prototype, under whatever name, lies in one split only.
    published : bool
        Include the crystals with published lattice constants of `load_crystals`; they replace crystals of the
        library that have the same name.

    Returns
    -------
    dict of str to Crystal
        Library crystals have Niggli-reduced primitive cells (centring "P") and names such as
        "SrTiO3-AB3C_cP5_221_a_c_b": formula and AFLOW label. Their `prototype` is the family of alike
        structures, named after the published prototype where there is one.

    Raises
    ------
    ValueError
        If `split` is unknown.
    """
    if split not in (None, "train", "validation", "test"):
        raise ValueError(f"unknown split {split!r}; known: train, validation, test, or None for all crystals")
    everything = {c.name: c for c in load_crystals()} if published else {}
    everything = _library() | everything
    return {name: c for name, c in everything.items() if split in (None, c.split)}
