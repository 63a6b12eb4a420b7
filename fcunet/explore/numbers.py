"""The numbers of one position, as a table."""

import html

import numpy as np

from .view import Maps, View, kind_of

NOTE_STYLE = (
    "<style>.fcu{font:14px Helvetica,Arial,sans-serif;border-collapse:collapse}"
    ".fcu td{padding:1px 12px 1px 0}"
    ".fcu td:nth-child(2){text-align:right;font-variant-numeric:tabular-nums}.fcu .h{color:#666}"
    ".fcu-note{font:13px Helvetica,Arial,sans-serif;color:#8a4b00;margin:4px 0}</style>"
)


def numbers_table(maps: Maps, view: View) -> str:
    """Everything known of the position, with units and error bars, as an HTML table."""
    y, x = view.position
    strain = maps.sources.tree["strain"].dataset
    rows = [("position", f"{y}, {x}", "row, column")]
    for dim, i in (("scan_y", y), ("scan_x", x)):
        if dim in strain.coords and strain[dim].attrs.get("units") == "nm":
            rows.append((dim, f"{float(strain[dim][i]):.2f}", "nm"))
    for name, (value, std) in maps.strain_at(view).items():
        kind = kind_of(name)
        unit, factor = (kind.unit, kind.factor)
        text = "none" if not np.isfinite(value) else f"{value * factor:+.3f}"
        error = f" &pm; {std * factor:.3f}" if np.isfinite(value * std) else ""
        rows.append((name, text + error, unit))
    rows += _lattice_rows(maps, view)
    for name in ("n_peaks", "n_indexed", "fit_error", "grain", "bf", "adf"):
        if maps.has(name):
            value = maps.stored(name).values[y, x]
            text = f"{value:.3f}" if name == "fit_error" else f"{value:,.0f}"
            rows.append((kind_of(name).title, text, kind_of(name).unit))
    reference = view.reference
    where = "as in the run" if reference is None else "rows {}:{}, columns {}:{}".format(*reference)
    rows.append(("reference", where, ""))
    body = "".join(
        f'<tr><td class="h">{html.escape(a)}</td><td>{b}</td><td class="h">{html.escape(c)}</td></tr>'
        for a, b, c in rows
    )
    return f'{NOTE_STYLE}<table class="fcu">{body}</table>'


def _lattice_rows(maps: Maps, view: View) -> list[tuple[str, str, str]]:
    _, g, covariance = maps.lattice_shown(view)
    if not np.isfinite(g).all():
        return [("lattice", "none", "")]
    rows = []
    scale, unit = _per_pixel(maps)
    for i, name in enumerate(("g1", "g2")):
        length = float(np.hypot(*g[i]))
        part = covariance[2 + 2 * i : 4 + 2 * i, 2 + 2 * i : 4 + 2 * i]
        variance = float(g[i] @ part @ g[i]) / length**2
        error = f" &pm; {np.sqrt(variance):.3f}" if variance >= 0 and np.isfinite(variance) else ""
        rows.append((f"|{name}|", f"{length:.3f}{error}", "px"))
        if scale:
            rows.append((f"spacing of {name}", f"{1 / (length * scale):.4f}", unit))
    angle = np.degrees(np.arctan2(*g[1]) - np.arctan2(*g[0]))
    rows.append(("angle of g1 and g2", f"{abs((angle + 180) % 360 - 180):.2f}", "degrees"))
    return rows


def _per_pixel(maps: Maps) -> tuple[float, str]:
    """1/angstrom per detector pixel, 0 if not calibrated."""
    group = maps.sources.tree.children.get("diffraction")
    if group is None or "qx" not in group.dataset.coords or group.dataset.sizes["qx"] < 2:
        return 0.0, ""
    axis = group.dataset["qx"]
    known = axis.attrs.get("units") == "1/angstrom"
    return (abs(float(axis[1] - axis[0])), "angstrom") if known else (0.0, "")
