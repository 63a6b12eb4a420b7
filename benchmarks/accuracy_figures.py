"""Figures of the accuracy benchmark: where the error sits, against dose, thickness and mistilt."""

from pathlib import Path
from typing import Any

import numpy as np

from .accuracy_bars import STRAIN_BARS
from .accuracy_report import ABTEM, NETWORK, Row

_TITLES = {"abtem-sno2": "SnO$_2$ [001]", "abtem-si": "Si [110]"}
_SHOWN = (NETWORK, "correlation, defaults", "correlation, square root", "radial-gradient template")
_DOSES = (1e3, 1e4, 1e5, 1e6, None)
_NO_NOISE = 1e7  # where the axis of doses shows it


def draw_figures(rows: list[Row], folder: Path) -> None:
    """``accuracy-dose.png`` and ``accuracy-where.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    against_dose(rows, folder / "accuracy-dose.png")
    against_conditions(rows, folder / "accuracy-where.png")


def _style() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def _colours(names: list[str]) -> dict[str, Any]:
    greys = ["#9aa0a6", "#c58b3b", "#6f9c5b", "#8a6bb0", "#b05a5a", "#3f8f8f", "#444444", "#d9a5c9"]
    greys += ["#8fbf3f", "#5a6fd0", "#c9b458", "#7a5230", "#ff8c69", "#556b2f"]
    return {
        n: "#0b5fa5" if n == NETWORK else greys[i % len(greys)]
        for i, n in enumerate(sorted(set(names) - {NETWORK}))
    } | {NETWORK: "#0b5fa5"}


def against_dose(rows: list[Row], path: Path) -> None:
    """rms of e_xx and e_yy against dose, bars and bound beside it."""
    plt = _style()
    fig, axes = plt.subplots(2, 2, figsize=(9, 6.6), sharex=True, sharey=True, layout="constrained")
    names = _compared(rows)
    colours = _colours(names)
    for column, data in enumerate(ABTEM):
        for line, component in enumerate(("e_xx", "e_yy")):
            ax = axes[line, column]
            mine = [r for r in rows if r["data"] == data]
            for name in names:
                found = {
                    r["dose"]: 1e3 * r["strain"][component]["rms"]
                    for r in mine
                    if r["method"] == name and r["strain"][component]["fitted"] > 0.9
                }
                doses = [d for d in _DOSES if d in found]
                ours = name == NETWORK
                look = {"ms": 4, "lw": 2, "zorder": 3} if ours else {"ms": 2.5, "lw": 1}
                x, y = [d or _NO_NOISE for d in doses], [found[d] for d in doses]
                ax.plot(x, y, "o-", color=colours[name], label=name, **look)
            limits = {r["dose"]: 1e3 * r["bound"][component] for r in mine if r["bound"]}
            known = [d for d in _DOSES if d in limits]
            ax.plot(known, [limits[d] for d in known], "k:", lw=1, label="Cramer-Rao bound, flat disks")
            for i, (dose, bar) in enumerate(STRAIN_BARS.items()):
                x = dose or _NO_NOISE
                ax.plot(
                    [x / 1.5, x * 1.5],
                    [1e3 * bar] * 2,
                    color="#c0392b",
                    lw=2.5,
                    label="target" if not i else None,
                )
            ax.set(xscale="log", yscale="log", title=f"{_TITLES[data]}, {component}")
            ax.grid(alpha=0.25, which="major")
    ticks = [1e3, 1e4, 1e5, 1e6, _NO_NOISE]
    for ax in axes[1]:
        ax.set_xticks(ticks, ["10$^3$", "10$^4$", "10$^5$", "10$^6$", "no noise"])
        ax.set_xlabel("electrons per pattern")
    for ax in axes[:, 0]:
        ax.set_ylabel("rms error, 10$^{-3}$")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncol=3, frameon=False, fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _compared(rows: list[Row]) -> list[str]:
    """The network and whatever was measured beside it on the multislice scans, without its own variants."""
    seen = dict.fromkeys(r["method"] for r in rows if r["data"] in ABTEM)
    return [n for n in seen if n == NETWORK or not (n.startswith(NETWORK) or "same budget" in n)]


def against_conditions(rows: list[Row], path: Path) -> None:
    """rms of e_xx and e_yy against thickness (mistilt to 6 mrad) and mistilt (10 to 40 nm), at 1e5 and
    without noise."""
    plt = _style()
    from matplotlib.lines import Line2D

    fig, axes = plt.subplots(2, 2, figsize=(9, 6.2), sharey=True, layout="constrained")
    everything = [r for r in rows if r.get("conditions")]
    names = [n for n in dict.fromkeys(r["method"] for r in everything) if n in _SHOWN]
    colours = _colours(names)
    for column, data in enumerate(ABTEM):
        for line, (key, other, low, high, title) in enumerate(
            (
                ("thickness_nm", "mistilt_mrad", 0, 6.1, "thickness, nm (mistilt to 6 mrad)"),
                ("mistilt_mrad", "thickness_nm", 9, 41, "mistilt, mrad (10 to 40 nm)"),
            )
        ):
            ax = axes[line, column]
            for row in everything:
                if row["data"] != f"{data}-all" or row["method"] not in names:
                    continue
                used = [c for c in row["conditions"] if low <= c[other] <= high and c["fitted"] > 0.5]
                x = sorted({c[key] for c in used})
                y = [
                    1e3
                    * np.sqrt(np.mean([(c["e_xx"] ** 2 + c["e_yy"] ** 2) / 2 for c in used if c[key] == v]))
                    for v in x
                ]
                ours = row["method"] == NETWORK
                dashes, label = ("o-", row["method"]) if row["dose"] is None else ("o--", None)
                look = {"ms": 3, "lw": 2 if ours else 0.9, "color": colours[row["method"]]}
                ax.plot(x, y, dashes, label=label, **look)
            ax.set(yscale="log", xlabel=title, title=_TITLES[data])
            ax.grid(alpha=0.25)
    for ax in axes[:, 0]:
        ax.set_ylabel("rms error of e_xx, e_yy, 10$^{-3}$")
    handles = axes[0, 0].get_legend_handles_labels()[0]
    doses = (("-", "no noise"), ("--", "10$^5$ electrons"))
    handles += [Line2D([], [], color="k", ls=dashes, label=dose) for dashes, dose in doses]
    fig.legend(handles=handles, loc="outside lower center", ncol=3, frameon=False, fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)
