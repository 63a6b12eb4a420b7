"""Rings of a powder, whichever way its crystal was named."""

import numpy as np
import pytest

from fcunet.simulation.rings import find_crystal, powder_rings

A = 4.0782  # gold, angstrom


def fcc_rings(q_max):
    """Radii of the rings that a face-centred cube gives: indices all even or all odd."""
    hkl = np.stack(np.meshgrid(*[np.arange(9)] * 3, indexing="ij"), -1).reshape(-1, 3)[1:]
    allowed = (hkl % 2 == hkl[:, :1] % 2).all(1)
    q = np.unique(np.round(np.linalg.norm(hkl[allowed], axis=1) / A, 6))
    return q[q < q_max]


def test_powder_rings__of_a_name_a_cell_and_a_cif_file_are_the_same(tmp_path):
    from ase.build import bulk

    bulk("Au", "fcc", a=A, cubic=True).write(tmp_path / "gold.cif")
    for text in ("Au", f"F {A}", f"F {A},{A},{A}", str(tmp_path / "gold.cif")):
        np.testing.assert_allclose(powder_rings(find_crystal(text), 1.5)[0], fcc_rings(1.5), atol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"), [("Kryptonite", "unknown crystal"), ("F 1,2,3,4", "no crystal")]
)
def test_find_crystal__says_what_it_needs(text, message):
    with pytest.raises(ValueError, match=message):
        find_crystal(text)
    with pytest.raises(FileNotFoundError, match="no such CIF"):
        find_crystal("nowhere.cif")
