"""Draw the axes and signs of docs/concepts.md from the code that computes them: docs/images/axes.svg.

python docs/draw_axes.py [FILE.svg or FILE.png]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from fcunet.kernels.strain import deformation_gradient, rotate_frame, strain_from_F

SIZE = 0.16  # of the deformations shown, many times those of a real sample
# F acts on vectors (y, x)
CASES = {
    "e_xx": np.array([[1, 0], [0, 1 + SIZE]]),
    "e_yy": np.array([[1 + SIZE, 0], [0, 1]]),
    "e_xy": np.array([[1, SIZE], [SIZE, 1]]),
    "theta": np.array([[np.cos(SIZE), np.sin(SIZE)], [-np.sin(SIZE), np.cos(SIZE)]]),
}
TITLES = {
    "e_xx": "e_xx > 0: longer along x",
    "e_yy": "e_yy > 0: longer along y",
    "e_xy": "e_xy > 0: longer along +x+y",
    "theta": "theta > 0: from +x towards +y",
}
GREY, BLUE, RED = "0.55", "#1f5fa8", "#c2452d"


def arrow(ax, start, vector, color="k", label="", shift=(0, 0)):
    """An arrow for a vector (y, x), with its name at the tip."""
    (y, x), (dy, dx) = start, vector
    ax.annotate("", (x + dx, y + dy), (x, y), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.6})
    ax.text(x + dx + shift[1], y + dy + shift[0], label, color=color, ha="center", va="center", fontsize=9)


def frame(ax, title, limit):
    """Equal axes with y down and nothing around."""
    ax.set(xlim=(-limit, limit), ylim=(limit, -limit), aspect="equal")
    ax.set_title(title, fontsize=9)
    ax.axis("off")


def draw_scan(ax):
    """Positions of the probe; one of them is looked at."""
    frame(ax, "scan: (scan_y, scan_x), nm", 3.6)
    y, x = (a.ravel() for a in np.mgrid[-2:3, -2:3])
    ax.plot(x, y, "s", color="0.85", ms=11)
    ax.plot(1, 0, "s", color=RED, ms=11)
    arrow(ax, (-2.9, -2.9), (0, 3.2), label="+x, columns", shift=(-0.4, -0.3))
    arrow(ax, (-2.9, -2.9), (3.2, 0), label="+y,\nrows", shift=(0.55, 0.1))


def draw_detector(ax):
    """Disks of one pattern with the lattice that is fitted to them."""
    frame(ax, "one pattern: (qy, qx), 1/angstrom or px", 3.6)
    g = np.array([[0.15, 1.3], [1.5, -0.2]])
    h, k = (a.ravel() for a in np.mgrid[-2:3, -2:3])
    q = np.stack([h, k], 1) @ g
    q = q[np.abs(q).max(1) < 3.3]
    q = q[(q > -2.2).any(1)]
    ax.plot(q[:, 1], q[:, 0], "o", color="0.8", ms=12)
    ax.plot(0, 0, "o", color="0.35", ms=12)
    arrow(ax, (0, 0), g[0], BLUE, "g1", (-0.35, 0.15))
    arrow(ax, (0, 0), g[1], BLUE, "g2", (0.1, -0.4))
    arrow(ax, (-3.4, -3.4), (0, 1.6), label="+qx", shift=(0, 0.4))
    arrow(ax, (-3.4, -3.4), (1.6, 0), label="+qy", shift=(0.35, 0))


def draw_rotation(ax, degree=25.0):
    """The axes of the scan against those of the detector."""
    frame(ax, f"scan_rotation_degree = +{degree:g}", 3.6)
    axes = np.eye(2)[::-1] * 2.6  # rows: +x and +y of the detector, as (y, x)
    turn = np.deg2rad(degree)
    turned = axes @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    for vector, name in zip(axes, "xy", strict=True):
        arrow(ax, (-1, -1.2), vector, GREY, f"+{name} detector", (-0.35, 0) if name == "x" else (0.1, 1.3))
    for vector, name in zip(turned, "xy", strict=True):
        arrow(ax, (-1, -1.2), vector, RED, f"+{name} scan", (0.45, 0.2 if name == "x" else -0.2))
    stretch = np.eye(2) + SIZE * np.outer(turned[0], turned[0]) / 2.6**2  # along the scan's x
    in_scan = strain_from_F(rotate_frame(stretch, degree))
    assert abs(in_scan["e_xx"] - SIZE) < 1e-12  # the picture says what the code does
    assert abs(in_scan["e_yy"]) < 1e-12


def draw_cell(ax, name, F):
    """A piece of the crystal before (dashed) and after."""
    found = strain_from_F(F, "biot")
    assert found[name] > 0.9 * SIZE  # the picture says what the code does
    frame(ax, TITLES[name], 1.5)
    square = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1], [-1, -1]], float)
    for corners, style in ((square, {"color": GREY, "ls": "--"}), (square @ F.T, {"color": RED, "lw": 1.8})):
        ax.plot(corners[:, 1], corners[:, 0], **style)


def draw_spots(ax, F):
    """The pattern of the same: open before, filled after; the reciprocal lattice answers the other way."""
    frame(ax, "", 3.0)
    h, k = (a.ravel() for a in np.mgrid[-2:3, -2:3])
    g_ref = np.array([[0.0, 1.2], [1.2, 0.0]])
    g = g_ref @ np.linalg.inv(F)
    np.testing.assert_allclose(deformation_gradient(g, g_ref), F)
    for lattice, style in ((g_ref, {"mfc": "none", "mec": GREY}), (g, {"color": RED, "alpha": 0.8})):
        q = np.stack([h, k], 1) @ lattice
        ax.plot(q[:, 1], q[:, 0], "o", ms=7, **style)


def draw():
    """The figure."""
    figure = plt.figure(figsize=(10, 8.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.45))
    for ax, part in zip(top.subplots(1, 3), (draw_scan, draw_detector, draw_rotation), strict=True):
        part(ax)
    axes = bottom.subplots(2, 4)
    for (name, F), (cell, spots) in zip(CASES.items(), axes.T, strict=True):
        draw_cell(cell, name, F)
        draw_spots(spots, F)
    bottom.supxlabel(
        "real space above, its diffraction pattern below; grey: unstrained reference", fontsize=9
    )
    return figure


if __name__ == "__main__":
    target = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("images") / "axes.svg"
    plt.rcParams["svg.hashsalt"] = "fcunet"  # the same file every time
    draw().savefig(target, dpi=110, metadata={"Date": None} if target.suffix == ".svg" else None)
    print(f"wrote {target}")
