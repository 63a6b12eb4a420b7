"""Units as microscope vendors spell them, turned into the two of this package: nm and 1/angstrom.

What cannot be turned, or gives a step no microscope makes, is reported as such and left out: a missing
calibration shows, an invented one does not.
"""

import math
import re

# nm per unit, 1/angstrom per unit, radian per unit; keys are spelt as `_normalise` leaves them
_LENGTH = {
    "m": 1e9,
    "cm": 1e7,
    "mm": 1e6,
    "um": 1e3,
    "micron": 1e3,
    "nm": 1.0,
    "angstrom": 0.1,
    "a": 0.1,
    "pm": 1e-3,
}
_LENGTH |= {"ang": 0.1, "ångström": 0.1, "å": 0.1, "microns": 1e3, "micrometer": 1e3, "nanometer": 1.0}
_ANGLE = {
    "rad": 1.0,
    "radian": 1.0,
    "radians": 1.0,
    "angle": 1.0,
    "mrad": 1e-3,
    "urad": 1e-6,
    "deg": math.pi / 180,
}
_ANGLE |= {"degree": math.pi / 180, "degrees": math.pi / 180, "°": math.pi / 180}

SCAN_STEP_NM = (1e-4, 1e5)  # 0.1 pm to 0.1 mm
Q_STEP = (1e-6, 2.0)  # 1/angstrom: 0.02 urad at 300 kV to a pixel beyond any Bragg spacing


def wavelength(beam_energy_keV: float) -> float:
    """Relativistic electron wavelength in angstrom, without refraction: h / sqrt(2 m E (1 + E / 2 m c^2))."""
    volt = 1e3 * beam_energy_keV
    if not volt > 0:
        raise ValueError(f"the beam energy is {beam_energy_keV} keV; it must be positive, such as 200")
    return 12.264259661 / math.sqrt(volt * (1 + 9.784756e-7 * volt))


def to_nm(value: float, units: str | None) -> float:
    """A length in nm.

    Raises
    ------
    ValueError
        If `units` is no length.
    """
    name, power = _normalise(units)
    if power != 1 or name not in _LENGTH:
        raise ValueError(f"the unit {units!r} is not a length")
    return value * _LENGTH[name]


def to_inverse_angstrom(value: float, units: str | None, beam_energy_keV: float | None = None) -> float:
    """A step on the detector in 1/angstrom (q = 1/d, no 2 pi); angles need the beam energy.

    Raises
    ------
    ValueError
        If `units` is neither an inverse length nor an angle, or the beam energy is missing for an angle.
    """
    name, power = _normalise(units)
    if power == -1 and name in _LENGTH:
        return value / (10 * _LENGTH[name])
    if power == 1 and name in _ANGLE:
        if beam_energy_keV is None:
            raise ValueError("it is an angle, which needs the beam energy: --beam-energy-kev")
        return value * _ANGLE[name] / wavelength(beam_energy_keV)
    if power == 1 and name in _LENGTH:
        raise ValueError(
            f"the unit {units!r} is a length on the camera, which needs the camera length: --q-pixel"
        )
    raise ValueError(f"the unit {units!r} is neither an inverse length nor an angle")


def _normalise(units: str | None) -> tuple[str, int]:
    r"""Name and power of a unit: ``$A^{-1}$``, ``1 / Å``, ``[n_m^-1]`` and ``Å⁻¹`` give -1."""
    text = (units or "").strip().lower().replace("μ", "u").replace("µ", "u").replace("\u212b", "å")
    text = re.sub(r"[\s$\[\]{}()_\\]", "", text).replace("⁻¹", "^-1").replace("**", "^")
    power = 1
    if text.startswith("1/"):
        text, power = text[2:], -1
    match = re.fullmatch(r"(.+?)(\^-1|-1|\^1)", text)
    if match:
        text = match[1]
        power *= -1 if match[2].endswith("-1") else 1
    return text, power
