"""Write crystals.json: published structures, expanded once with ASE's space groups so that run time needs
NumPy only.

Run ``python build_crystals.py`` here after editing the table (needs ``pip install ase``). Lattice constants
in angstrom at room temperature and free coordinates as in Wyckoff, Crystal Structures (1963-71), Villars and
Cenzual, Pearson's Crystal Data, and the papers named in the table, rounded; good to better than 1 %, which is
what training data need (cells are jittered by more).
"""

import json
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers
from ase.spacegroup import Spacegroup, crystal

THIRD = (1 / 3, 2 / 3)

# prototype -> (split, space group, setting)
PROTOTYPES = {
    "diamond": ("test", 227, 1),
    "rutile": ("test", 136, 1),
    "chalcopyrite": ("test", 122, 1),
    "pyrite": ("validation", 205, 1),
    "wurtzite": ("validation", 186, 1),
    "fluorite": ("validation", 225, 1),
    "cementite": ("validation", 62, 1),
    "zincblende": ("train", 216, 1),
    "rocksalt": ("train", 225, 1),
    "fcc": ("train", 225, 1),
    "bcc": ("train", 229, 1),
    "hcp": ("train", 194, 1),
    "perovskite": ("train", 221, 1),
    "GdFeO3": ("train", 62, 1),
    "anatase": ("train", 141, 1),
    "spinel": ("train", 227, 2),
    "CsCl": ("train", 221, 1),
    "NiAs": ("train", 194, 1),
    "corundum": ("train", 167, 1),
    "2H-MoS2": ("train", 194, 1),
    "CdI2": ("train", 164, 1),
    "graphite": ("train", 194, 1),
    "hexagonal BN": ("train", 194, 1),
    "L1_2": ("train", 221, 1),
    "L1_0": ("train", 123, 1),
    "A15": ("train", 223, 1),
    "quartz": ("train", 154, 1),
    "cristobalite": ("train", 92, 1),
    "marcasite": ("train", 58, 1),
    "B20": ("train", 198, 1),
    "MnP": ("train", 62, 1),
    "beta-tin": ("train", 141, 1),
    "cuprite": ("train", 224, 1),
    "CuAl2": ("train", 140, 1),
    "Laves C15": ("train", 227, 2),
    "Laves C14": ("train", 194, 1),
    "baddeleyite": ("train", 14, 1),
    "tetragonal zirconia": ("train", 137, 2),
    "black phosphorus": ("train", 64, 1),
    "alpha-uranium": ("train", 63, 1),
    "GeS": ("train", 62, 1),
    "Bi2Te3": ("train", 166, 1),
    "arsenic": ("train", 166, 1),
    "MoSi2": ("train", 139, 1),
    "TiSi2": ("train", 70, 2),
    "calcite": ("train", 167, 1),
    "zircon": ("train", 141, 2),
    "scheelite": ("train", 88, 1),
    "half-Heusler": ("train", 216, 1),
    "Heusler": ("train", 225, 1),
    "ReO3": ("train", 221, 1),
    "beta-manganese": ("train", 213, 1),
    "PtS": ("train", 131, 1),
    "litharge": ("train", 129, 1),
    "K2NiF4": ("train", 139, 1),
    "AlB2": ("train", 191, 1),
    "LiNbO3": ("train", 161, 1),
    "beta-Ga2O3": ("train", 12, 1),
    "YBa2Cu3O7": ("train", 47, 1),
}

TABLE: list[tuple[str, str, tuple[float, ...], tuple]] = []


def add(name, prototype, cell, *sites):
    """One crystal: cell (a, b, c[, alpha, beta, gamma]) and its sites (symbol, x, y, z)."""
    TABLE.append((name, prototype, tuple(cell), sites))


def cubic(a):
    return (a, a, a)


def tetragonal(a, c):
    return (a, a, c)


def hexagonal(a, c):
    return (a, a, c, 90, 90, 120)


for symbol, a in {"C": 3.567, "Si": 5.431, "Ge": 5.658, "Sn": 6.489}.items():
    add(symbol if symbol != "Sn" else "alpha-Sn", "diamond", cubic(a), (symbol, 0, 0, 0))
for (p, q), a in {
    ("Ga", "As"): 5.6533,
    ("In", "P"): 5.8687,
    ("Zn", "S"): 5.409,
    ("Cd", "Te"): 6.482,
    ("Si", "C"): 4.3596,
    ("Al", "As"): 5.661,
    ("In", "Sb"): 6.479,
}.items():
    add(p + q, "zincblende", cubic(a), (p, 0, 0, 0), (q, 0.25, 0.25, 0.25))
for (p, q), a in {
    ("Mg", "O"): 4.2112,
    ("Na", "Cl"): 5.640,
    ("Ti", "N"): 4.240,
    ("Pb", "Te"): 6.462,
    ("Ni", "O"): 4.177,
    ("Pb", "S"): 5.936,
}.items():
    add(p + q, "rocksalt", cubic(a), (p, 0, 0, 0), (q, 0.5, 0.5, 0.5))
for symbol, a in {"Al": 4.0495, "Cu": 3.6149, "Au": 4.0782, "Ni": 3.524, "Ag": 4.0853}.items():
    add(symbol, "fcc", cubic(a), (symbol, 0, 0, 0))
for symbol, a in {"Fe": 2.8665, "W": 3.1652, "Ta": 3.3013}.items():
    add(symbol, "bcc", cubic(a), (symbol, 0, 0, 0))
for symbol, a, c in [
    ("Ti", 2.9508, 4.6855),
    ("Mg", 3.2094, 5.2108),
    ("Co", 2.5071, 4.0695),
    ("Zn", 2.6649, 4.9468),
]:
    add(symbol, "hcp", hexagonal(a, c), (symbol, *THIRD, 0.25))
for p, q, a, c, u in [
    ("Ga", "N", 3.189, 5.186, 0.377),
    ("Zn", "O", 3.2498, 5.2066, 0.3819),
    ("Cd", "Se", 4.299, 7.010, 0.3767),
]:
    add(p + q, "wurtzite", hexagonal(a, c), (p, *THIRD, 0), (q, *THIRD, u))
for p, q, a in [("Sr", "Ti", 3.905), ("Ba", "Zr", 4.193), ("K", "Ta", 3.989)]:
    add(f"{p}{q}O3", "perovskite", cubic(a), (p, 0.5, 0.5, 0.5), (q, 0, 0, 0), ("O", 0.5, 0, 0))
# Pnma setting
add("CaTiO3", "GdFeO3", (5.4423, 7.6401, 5.3796), ("Ca", 0.0359, 0.25, -0.0068), ("Ti", 0.5, 0, 0),
    ("O", 0.4838, 0.25, 0.0711), ("O", 0.2893, 0.0371, 0.7108))  # fmt: skip
add("GdFeO3", "GdFeO3", (5.611, 7.669, 5.349), ("Gd", 0.0626, 0.25, -0.0156), ("Fe", 0.5, 0, 0),
    ("O", 0.4669, 0.25, 0.1009), ("O", 0.3016, 0.0506, 0.6957))  # fmt: skip
for p, q, a, c, u in [
    ("Ti", "O", 4.5937, 2.9587, 0.3053),
    ("Sn", "O", 4.7374, 3.1864, 0.3071),
    ("Mg", "F", 4.621, 3.052, 0.303),
]:
    add(f"{p}{q}2-rutile", "rutile", tetragonal(a, c), (p, 0, 0, 0), (q, u, u, 0))
add("TiO2-anatase", "anatase", tetragonal(3.7842, 9.5146), ("Ti", 0, 0, 0), ("O", 0, 0, 0.2081))
for name, p, q, a in [("CaF2", "Ca", "F", 5.4626), ("CeO2", "Ce", "O", 5.411), ("Mg2Si", "Si", "Mg", 6.351)]:
    add(name, "fluorite", cubic(a), (p, 0, 0, 0), (q, 0.25, 0.25, 0.25))
for name, p, q, a, u in [
    ("MgAl2O4", "Mg", "Al", 8.0832, 0.2624),
    ("Fe3O4", "Fe", "Fe", 8.396, 0.2549),
    ("Co3O4", "Co", "Co", 8.084, 0.2631),
]:
    add(name, "spinel", cubic(a), (p, 0.125, 0.125, 0.125), (q, 0.5, 0.5, 0.5), ("O", u, u, u))
for p, q, a in [("Cs", "Cl", 4.123), ("Ni", "Al", 2.887), ("Cu", "Zn", 2.945)]:
    add(p + q, "CsCl", cubic(a), (p, 0, 0, 0), (q, 0.5, 0.5, 0.5))
for p, q, a, c in [("Ni", "As", 3.618, 5.034), ("Co", "Sb", 3.866, 5.188), ("Mn", "Te", 4.147, 6.711)]:
    add(p + q, "NiAs", hexagonal(a, c), (p, 0, 0, 0), (q, *THIRD, 0.25))
for p, a, c, z, x in [
    ("Al", 4.7602, 12.9933, 0.35216, 0.30624),
    ("Fe", 5.0346, 13.752, 0.35534, 0.3056),
    ("Cr", 4.9607, 13.599, 0.3475, 0.3058),
]:
    add(f"{p}2O3", "corundum", hexagonal(a, c), (p, 0, 0, z), ("O", x, 0, 0.25))
for p, q, a, c, z in [("Mo", "S", 3.1604, 12.295, 0.621), ("W", "Se", 3.282, 12.96, 0.6211)]:
    add(f"{p}{q}2-2H", "2H-MoS2", hexagonal(a, c), (p, *THIRD, 0.25), (q, *THIRD, z))
for p, q, a, c, z in [("Ti", "S", 3.4073, 5.6953, 0.2501), ("Mg", "Cl", 3.641, 5.927, 0.23)]:
    add(f"{p}{q}2-1T", "CdI2", hexagonal(a, c), (p, 0, 0, 0), (q, *THIRD, z))
add("graphite", "graphite", hexagonal(2.461, 6.708), ("C", 0, 0, 0.25), ("C", *THIRD, 0.25))
add("h-BN", "hexagonal BN", hexagonal(2.504, 6.661), ("B", *THIRD, 0.25), ("N", *THIRD, 0.75))
for p, q, a in [("Au", "Cu", 3.747), ("Al", "Ni", 3.572), ("Ti", "Pt", 3.906)]:
    add(f"{q}3{p}", "L1_2", cubic(a), (p, 0, 0, 0), (q, 0.5, 0.5, 0))
for p, q, a, c in [("Fe", "Pt", 2.723, 3.712), ("Cu", "Au", 2.804, 3.673), ("Ti", "Al", 2.832, 4.070)]:
    add(p + q, "L1_0", tetragonal(a, c), (p, 0, 0, 0), (q, 0.5, 0.5, 0.5))
for p, q, a in [("Nb", "Sn", 5.290), ("V", "Si", 4.724), ("Cr", "Si", 4.564)]:
    add(f"{p}3{q}", "A15", cubic(a), (q, 0, 0, 0), (p, 0.25, 0, 0.5))
# Levien, Prewitt, Weidner, Am. Mineral. 65 (1980) 920, origin moved by 2/3 along c
add(
    "SiO2-quartz", "quartz", hexagonal(4.916, 5.4054), ("Si", 0.4697, 0, 2 / 3), ("O", 0.4135, 0.2669, 0.7858)
)
add("GeO2-quartz", "quartz", hexagonal(4.987, 5.652), ("Ge", 0.4513, 0, 2 / 3), ("O", 0.397, 0.302, 0.7575))
add("SiO2-cristobalite", "cristobalite", tetragonal(4.9732, 6.9236), ("Si", 0.3003, 0.3003, 0),
    ("O", 0.2392, 0.1044, 0.1787))  # fmt: skip
for p, q, a, u in [("Fe", "S", 5.4179, 0.3851), ("Mn", "S", 6.1013, 0.4012), ("Pt", "P", 5.6956, 0.39)]:
    add(f"{p}{q}2-pyrite", "pyrite", cubic(a), (p, 0, 0, 0), (q, u, u, u))
add("FeS2-marcasite", "marcasite", (4.4446, 5.4246, 3.3864), ("Fe", 0, 0, 0), ("S", 0.1999, 0.3783, 0))
for p, a, x, y in [("Fe", 4.4867, 0.1358, 0.844), ("Mn", 4.558, 0.137, 0.845)]:
    add(f"{p}Si", "B20", cubic(a), (p, x, x, x), ("Si", y, y, y))
add("MnP", "MnP", (5.258, 3.172, 5.918), ("Mn", 0.0049, 0.25, 0.1965), ("P", 0.1878, 0.25, 0.5686))
add("FeP", "MnP", (5.191, 3.099, 5.792), ("Fe", 0.0025, 0.25, 0.2004), ("P", 0.1916, 0.25, 0.5684))
add("beta-Sn", "beta-tin", tetragonal(5.8318, 3.1819), ("Sn", 0, 0, 0))
add("Cu2O", "cuprite", cubic(4.2696), ("O", 0, 0, 0), ("Cu", 0.25, 0.25, 0.25))
add("Ag2O", "cuprite", cubic(4.72), ("O", 0, 0, 0), ("Ag", 0.25, 0.25, 0.25))
add("CuAl2", "CuAl2", tetragonal(6.063, 4.872), ("Cu", 0, 0, 0.25), ("Al", 0.1581, 0.6581, 0))
for p, q, a in [("Mg", "Cu", 7.034), ("Zr", "V", 7.439)]:
    add(f"{p}{q}2", "Laves C15", cubic(a), (p, 0.125, 0.125, 0.125), (q, 0.5, 0.5, 0.5))
add(
    "MgZn2",
    "Laves C14",
    hexagonal(5.223, 8.566),
    ("Mg", *THIRD, 0.062),
    ("Zn", 0, 0, 0),
    ("Zn", 0.83, 0.66, 0.25),
)
add("ZrO2-monoclinic", "baddeleyite", (5.1505, 5.2116, 5.3173, 90, 99.23, 90), ("Zr", 0.2754, 0.0395, 0.2083),
    ("O", 0.07, 0.3317, 0.3447), ("O", 0.4496, 0.7569, 0.4792))  # fmt: skip
add("HfO2-monoclinic", "baddeleyite", (5.117, 5.1754, 5.2915, 90, 99.22, 90), ("Hf", 0.2759, 0.0402, 0.2082),
    ("O", 0.074, 0.332, 0.347), ("O", 0.449, 0.758, 0.48))  # fmt: skip
# Teufer, Acta Cryst. 15 (1962) 1187
add(
    "ZrO2-tetragonal",
    "tetragonal zirconia",
    tetragonal(3.64, 5.27),
    ("Zr", 0.75, 0.25, 0.75),
    ("O", 0.25, 0.25, 0.435),
)
add("black P", "black phosphorus", (3.3136, 10.478, 4.3763), ("P", 0, 0.10168, 0.08056))
add("alpha-U", "alpha-uranium", (2.854, 5.869, 4.955), ("U", 0, 0.1025, 0.25))
add("SnS", "GeS", (11.18, 3.982, 4.329), ("Sn", 0.1194, 0.25, 0.1198), ("S", 0.8508, 0.25, 0.4793))
add("Bi2Te3", "Bi2Te3", hexagonal(4.3852, 30.483), ("Bi", 0, 0, 0.4), ("Te", 0, 0, 0), ("Te", 0, 0, 0.2097))
for p, a, c, z in [("Bi", 4.546, 11.862, 0.2339), ("Sb", 4.307, 11.273, 0.2335)]:
    add(p, "arsenic", hexagonal(a, c), (p, 0, 0, z))
add("MoSi2", "MoSi2", tetragonal(3.2047, 7.8449), ("Mo", 0, 0, 0), ("Si", 0, 0, 0.3353))
add("TiSi2-C54", "TiSi2", (8.2687, 8.5534, 4.7983), ("Ti", 0.125, 0.125, 0.125), ("Si", 0.4614, 0.125, 0.125))
add("CaCO3", "calcite", hexagonal(4.9896, 17.061), ("Ca", 0, 0, 0), ("C", 0, 0, 0.25), ("O", 0.2568, 0, 0.25))
add("ZrSiO4", "zircon", tetragonal(6.607, 5.982), ("Zr", 0, 0.75, 0.125), ("Si", 0, 0.25, 0.375),
    ("O", 0, 0.0661, 0.1953))  # fmt: skip
add("CaWO4", "scheelite", tetragonal(5.243, 11.376), ("W", 0, 0, 0), ("Ca", 0, 0, 0.5),
    ("O", 0.2413, 0.1511, 0.0861))  # fmt: skip
for p, q, r, a, c, x in [("Cu", "In", "Se", 5.784, 11.616, 0.2258), ("Cu", "Fe", "S", 5.289, 10.423, 0.2574)]:
    add(f"{p}{q}{r}2", "chalcopyrite", tetragonal(a, c), (p, 0, 0, 0), (q, 0, 0, 0.5), (r, x, 0.25, 0.125))
add("TiNiSn", "half-Heusler", cubic(5.941), ("Ti", 0, 0, 0), ("Ni", 0.25, 0.25, 0.25), ("Sn", 0.5, 0.5, 0.5))
add("Cu2MnAl", "Heusler", cubic(5.949), ("Mn", 0, 0, 0), ("Al", 0.5, 0.5, 0.5), ("Cu", 0.25, 0.25, 0.25))
add("ReO3", "ReO3", cubic(3.748), ("Re", 0, 0, 0), ("O", 0.5, 0, 0))
add("beta-Mn", "beta-manganese", cubic(6.315), ("Mn", 0.0636, 0.0636, 0.0636), ("Mn", 0.125, 0.2022, 0.4522))
add("PtS", "PtS", tetragonal(3.47, 6.11), ("Pt", 0, 0.5, 0), ("S", 0, 0, 0.25))
add("PbO", "litharge", tetragonal(3.976, 5.023), ("O", 0, 0, 0), ("Pb", 0, 0.5, 0.2385))
add("FeSe", "litharge", tetragonal(3.7724, 5.5217), ("Fe", 0, 0, 0), ("Se", 0, 0.5, 0.2673))
add("Sr2RuO4", "K2NiF4", tetragonal(3.873, 12.7323), ("Ru", 0, 0, 0), ("Sr", 0, 0, 0.3538), ("O", 0, 0.5, 0),
    ("O", 0, 0, 0.1613))  # fmt: skip
for p, a, c in [("Mg", 3.0864, 3.5215), ("Ti", 3.028, 3.228)]:
    add(f"{p}B2", "AlB2", hexagonal(a, c), (p, 0, 0, 0), ("B", *THIRD, 0.5))
add("LiNbO3", "LiNbO3", hexagonal(5.1483, 13.863), ("Nb", 0, 0, 0), ("Li", 0, 0, 0.2787),
    ("O", 0.0492, 0.3446, 0.0647))  # fmt: skip
add("beta-Ga2O3", "beta-Ga2O3", (12.214, 3.0371, 5.7981, 90, 103.83, 90), ("Ga", 0.0905, 0, 0.7946),
    ("Ga", 0.3414, 0, 0.6857), ("O", 0.1674, 0, 0.1011), ("O", 0.4957, 0, 0.2553),
    ("O", 0.8279, 0, 0.4365))  # fmt: skip
add("YBa2Cu3O7", "YBa2Cu3O7", (3.8227, 3.8872, 11.6802), ("Y", 0.5, 0.5, 0.5), ("Ba", 0.5, 0.5, 0.1843),
    ("Cu", 0, 0, 0), ("Cu", 0, 0, 0.3556), ("O", 0, 0.5, 0), ("O", 0.5, 0, 0.3773), ("O", 0, 0.5, 0.3789),
    ("O", 0, 0, 0.1584))  # fmt: skip
add("Fe3C", "cementite", (5.089, 6.7433, 4.5235), ("Fe", 0.1816, 0.0666, 0.3374),
    ("Fe", 0.0367, 0.25, 0.8402), ("C", 0.8771, 0.25, 0.4426))  # fmt: skip

CENTRING: dict[str, list[tuple[float, float, float]]] = {
    "P": [(0, 0, 0)],
    "I": [(0, 0, 0), (0.5, 0.5, 0.5)],
    "F": [(0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)],
    "C": [(0, 0, 0), (0.5, 0.5, 0)],
    "R": [(0, 0, 0), (2 / 3, 1 / 3, 1 / 3), (1 / 3, 2 / 3, 2 / 3)],
}


def one_lattice_point(positions, numbers, centring):
    """Sites of one lattice point: those not reached from an earlier one by a centring translation."""
    kept: list[int] = []
    for i, position in enumerate(positions):
        for j in kept:
            images = positions[j] + np.array(CENTRING[centring]) - position
            if numbers[i] == numbers[j] and np.any(np.abs(images - np.round(images)).max(axis=1) < 1e-3):
                break
        else:
            kept.append(i)
    if len(kept) * len(CENTRING[centring]) != len(positions):
        raise RuntimeError(f"{len(positions)} sites do not reduce by the centring {centring}")
    return kept


def main():
    entries: list[dict] = []
    for name, prototype, cell, sites in TABLE:
        split, group, setting = PROTOTYPES[prototype]
        cellpar = (*cell, 90, 90, 90)[:6]
        atoms = crystal(
            [s[0] for s in sites], [s[1:] for s in sites], spacegroup=group, setting=setting, cellpar=cellpar
        )
        symbol = Spacegroup(group, setting).symbol
        positions, numbers = atoms.get_scaled_positions(), atoms.numbers
        kept = one_lattice_point(positions, numbers, symbol[0])
        wrapped = positions % 1.0
        entries.append(
            {
                "name": name,
                "prototype": prototype,
                "space_group": symbol.replace(" ", ""),
                "split": split,
                "cell": [round(float(v), 5) for v in cellpar],
                "centring": symbol[0],
                "sites": [
                    [atoms.symbols[i], *(round(float(v), 6) for v in wrapped[i])]
                    for i in sorted(kept, key=lambda i: -atomic_numbers[atoms.symbols[i]])
                ],
            }
        )
    provenance = (
        "published room-temperature structures, sources in build_crystals.py; sites are those of one lattice "
        "point of the conventional cell (fractional), cell is a, b, c in angstrom and angles in degrees"
    )
    document = {"provenance": provenance, "crystals": entries}
    text = json.dumps(document, indent=None).replace('{"name"', '\n{"name"')
    Path(__file__).with_name("crystals.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
