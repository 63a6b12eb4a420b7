"""The packaged weights on one seeded pattern; run as a script, this file writes the golden peaks anew."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fcunet.nn.detect import detect
from fcunet.nn.weights import CARD_NAME, load_model, resolve_weights

GOLDEN = Path(__file__).with_name("golden_default.json")
SHAPE, RADIUS, ORIGIN, G = (128, 112), 5.3, (61.3, 57.8), ((3.1, 23.7), (22.4, -4.9))


def make_pattern(dose=2e5):
    """Disks with a slope on a known lattice, Poisson noise: pattern, probe, positions (k, 2) of the disks."""
    rng = np.random.default_rng(20261121)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    sites = np.array([(h, k) for h in range(-2, 3) for k in range(-2, 3)])
    centres = np.array(ORIGIN) + sites @ np.array(G)
    image = np.full(SHAPE, 0.01)
    for centre, height, slope in zip(
        centres, rng.uniform(0.5, 2, len(sites)), rng.uniform(-0.7, 0.7, (len(sites), 2)), strict=True
    ):
        dy, dx = y - centre[0], x - centre[1]
        disk = np.clip(RADIUS + 0.5 - np.hypot(dy, dx), 0, 1)
        image += height * disk * (1 + (slope[0] * dy + slope[1] * dx) / RADIUS).clip(0)
    pattern = rng.poisson(dose * image / image.sum()).astype(np.float32)
    probe = np.clip(RADIUS + 0.5 - np.hypot(y - SHAPE[0] // 2, x - SHAPE[1] // 2), 0, 1).astype(np.float32)
    inside = ((centres > RADIUS) & (centres < np.array(SHAPE) - 1 - RADIUS)).all(axis=1)
    return torch.from_numpy(pattern), torch.from_numpy(probe), centres[inside]


def find():
    model = load_model("default", device="cpu", precision="fp32")
    pattern, probe, centres = make_pattern()
    peaks = detect(model, pattern[None], probe, edge_boundary=RADIUS)
    n = int(peaks.n_peaks[0])
    table = torch.stack((peaks.qy, peaks.qx, peaks.intensity, peaks.sigma), dim=-1)[0, :n].numpy()
    return table[np.lexsort((table[:, 1], table[:, 0].round()))], centres, model.info.sha256


def test_default_weights__give_the_golden_peaks():
    table, _, sha256 = find()
    golden = json.loads(GOLDEN.read_text())
    assert sha256 == golden["sha256"], "new weights: write the golden file anew, and look at what changed"
    np.testing.assert_allclose(table, golden["peaks"], rtol=5e-3, atol=5e-3)


def test_default_weights__find_every_disk_of_the_golden_pattern():
    table, centres, _ = find()
    distance = np.linalg.norm(centres[:, None] - table[None, :, :2], axis=-1)
    assert len(table) == len(centres)
    # slopes of 70 % move the centre of mass of a disk by 0.9 px; the network is to see through that
    assert np.sqrt((distance.min(axis=1) ** 2).mean() / 2) < 0.15


def test_default_weights__are_those_of_their_checksum_and_have_a_card():
    folder, sha256 = resolve_weights("default")
    assert len(sha256) == 64
    assert "held-out prototypes" in (folder / CARD_NAME).read_text()
    assert sum(f.stat().st_size for f in folder.iterdir()) < 12e6


@pytest.mark.gpu
def test_default_weights__give_the_golden_peaks_on_a_gpu():
    model = load_model("default", device="cuda", precision="fp32")
    pattern, probe, _ = make_pattern()
    found = detect(model, pattern[None].cuda(), probe.cuda())
    reference = detect(load_model("default", device="cpu", precision="fp32"), pattern[None], probe)
    assert int(found.n_peaks) == int(reference.n_peaks)

    def sort(peaks):  # two peaks as bright as each other may come in either order
        places = torch.stack((peaks.qy, peaks.qx), dim=-1)[0, : int(peaks.n_peaks)].cpu().numpy()
        return places[np.lexsort((places[:, 1], places[:, 0].round()))]

    np.testing.assert_allclose(sort(found), sort(reference), rtol=0, atol=0.02)


if __name__ == "__main__":
    peaks, _, checksum = find()
    rows = [[round(float(v), 4) for v in row] for row in peaks]
    GOLDEN.write_text(
        json.dumps({"sha256": checksum, "columns": ["qy", "qx", "volts", "sigma"], "peaks": rows}, indent=1)
    )
