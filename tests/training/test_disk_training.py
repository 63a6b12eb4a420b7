import pytest
import torch

from fcunet.nn.disks import DiskReading
from fcunet.nn.model import AMPLITUDE_UNIT_V, FCUNet, FCUNetConfig, disk_radius
from fcunet.nn.weights import load_model, load_parts, save_weights
from fcunet.training.disks import disk_losses, propose, strain_losses
from fcunet.training.loop import train
from fcunet.training.settings import TrainConfig

NETWORK = {"widths": [8, 8, 8, 8], "attention_heads": 2, "attention_layers": 1, "filter_orders": [0, 1]}
READER = {"reader_width": 16, "reader_layers": 1, "reader_heads": 2, "reader_channels": [4, 4, 4, 4]}
TINY = {
    "batch": 2,
    "size": 64,
    "precision": "fp32",
    "device": "cpu",
    "validation_patterns": 2,
    "validation_size": 64,
    "validation_doses": (1e4,),
    "selection_doses": (1e4,),
    "log_every": 1,
}


@pytest.fixture
def batch(toy_source):
    torch.manual_seed(0)
    return toy_source(128, seed=3, dose=1e6).batch(4)


def truth_as_reading(proposals, sigma=0.1):
    real = proposals.real
    offset = torch.where(real[..., None], proposals.truth - proposals.position, 0.0)
    root = torch.where(real, (proposals.amplitude / AMPLITUDE_UNIT_V).sqrt(), 0.0)
    return DiskReading(offset, torch.full_like(root, sigma).log(), root, torch.full((len(root),), -9.0))


def test_propose__bright_disks_are_there_within_their_radius(batch):
    proposals = propose(batch)
    moved = (proposals.position - proposals.truth)[proposals.real]
    assert float(moved.abs().max()) < float(disk_radius(batch.probe).max())
    bright = int((batch.spot_electrons > 1e3).sum())
    assert bright * 0.8 < int((proposals.real & (proposals.electrons > 1e3)).sum()) <= bright


def test_propose__some_places_have_no_disk(batch):
    found = [propose(batch) for _ in range(10)]
    assert sum(int((torch.isfinite(p.position).all(-1) & ~p.real).sum()) for p in found) > 5


def test_disk_losses__prefer_the_truth(batch):
    proposals, radius = propose(batch), disk_radius(batch.probe)
    right = truth_as_reading(proposals)
    best = disk_losses(right, proposals, radius)
    for wrong in (
        right._replace(offset=right.offset + 0.5),
        right._replace(log_sigma=right.log_sigma + 1),
        right._replace(root_amplitude=right.root_amplitude + 0.3),
    ):
        assert float(disk_losses(wrong, proposals, radius).total) > float(best.total) + 0.1
    assert float(best.amplitude) < 0.1


def test_disk_losses__a_forbidden_spot_that_is_read_as_nothing_costs_nothing(batch):
    proposals, radius = propose(batch), disk_radius(batch.probe)
    proposals = proposals._replace(amplitude=torch.zeros_like(proposals.amplitude))
    reading = truth_as_reading(proposals)
    assert float(disk_losses(reading, proposals, radius).amplitude) < 0.05
    assert (
        float(
            disk_losses(
                reading._replace(root_amplitude=reading.root_amplitude + 1), proposals, radius
            ).amplitude
        )
        > 1
    )


def test_disk_losses__of_nothing_are_finite_with_a_gradient(batch):
    proposals = propose(batch)
    nowhere = proposals._replace(position=torch.full_like(proposals.position, torch.nan))
    reading = DiskReading(*(t.requires_grad_() for t in truth_as_reading(proposals)))
    losses = disk_losses(reading, nowhere, disk_radius(batch.probe))
    losses.total.backward()
    assert float(losses.total.detach()) == 0
    assert bool(torch.isfinite(reading.offset.grad).all())


def test_propose__the_disks_of_a_pattern_are_displaced_together_too(batch):
    shifts, dilations = [], []
    for _ in range(50):
        proposals = propose(batch)
        for i in range(len(batch.pattern)):
            real = proposals.real[i]
            q = (proposals.truth[i] - batch.origin[i])[real]
            moved = (proposals.position - proposals.truth)[i][real]
            rows = torch.cat((torch.ones(len(q), 1), q), dim=1)
            shift, *strain = torch.linalg.lstsq(rows, moved).solution
            shifts.append(shift / float(disk_radius(batch.probe)[i]))
            dilations.append(float(strain[0][0] + strain[1][1]) / 2)
    assert 0.06 < float(torch.stack(shifts).std()) < 0.13  # radii; of independent errors 0.02
    assert 3e-3 < float(torch.tensor(dilations).std()) < 3e-2


def test_strain_losses__see_a_shared_dilation_and_no_shared_shift(batch):
    proposals = propose(batch)
    right = truth_as_reading(proposals)

    def strain_loss(reading):
        return float(strain_losses(reading, proposals)[0])

    assert strain_loss(right) == pytest.approx(0, abs=1e-6)
    shifted = right._replace(offset=right.offset + 0.3)
    assert strain_loss(shifted) == pytest.approx(0, abs=1e-4)
    from_middle = torch.nan_to_num(proposals.truth - batch.origin[:, None])
    small, large = (strain_loss(right._replace(offset=right.offset + k * from_middle)) for k in (2e-2, 2e-1))
    assert 1 < small < large
    assert large < 12 * small  # the gradient saturates


def test_strain_losses__the_stated_dilation_is_best_where_it_is_the_error(batch):
    proposals = propose(batch)
    from_middle = torch.nan_to_num(proposals.truth - batch.origin[:, None])
    right = truth_as_reading(proposals, sigma=1e-4)
    wrong = right._replace(offset=right.offset + 2e-3 * from_middle)
    stated = {s: wrong._replace(log_dilation_std=torch.full((4,), s).log()) for s in (2e-4, 2e-3, 2e-2)}
    losses = {s: float(strain_losses(reading, proposals)[1]) for s, reading in stated.items()}
    assert min(losses, key=losses.get) == 2e-3


def test_strain_losses__of_too_few_disks_are_zero_with_a_gradient(batch):
    proposals = propose(batch)
    few = proposals.position.clone()
    few[:, 4:] = torch.nan
    reading = DiskReading(*(t.requires_grad_() for t in truth_as_reading(proposals)))
    loss = sum(strain_losses(reading, proposals._replace(position=few)))
    loss.backward()
    assert float(loss.detach()) == 0
    assert bool((reading.offset.grad == 0).all())
    assert bool((reading.log_dilation_std.grad == 0).all())


def test_train__the_second_stage_leaves_the_maps_as_they_are(tmp_path, toy_source):
    def make(split, size, seed, dose):
        return toy_source(size, seed + (split != "train"), dose)

    first = train(TrainConfig(out=tmp_path / "maps", steps=1, network=NETWORK, **TINY), make_source=make)
    config = TrainConfig(
        out=tmp_path / "disks",
        steps=2,
        stage="disks",
        start_from=str(first),
        network=NETWORK | READER,
        **TINY,
    )
    second = train(config, make_source=make)
    before = load_model(first, device="cpu").state_dict()
    after = load_model(second, device="cpu").state_dict()
    maps = [k for k in after if not k.startswith("reader.")]
    assert maps
    assert all(torch.equal(after[k], before[k]) for k in maps)
    assert any(k.startswith("reader.") for k in after)


def test_load_parts__more_layers_begin_as_identities(tmp_path, batch):
    options = NETWORK | READER
    shallow, deep = (FCUNet(FCUNetConfig.from_dict(options | {"reader_layers": k})).eval() for k in (1, 3))
    save_weights(tmp_path, shallow, card="")
    rest = load_parts(deep, tmp_path)
    assert rest
    assert all(k.startswith(("reader.blocks.1.", "reader.blocks.2.")) for k in rest)
    y, x = propose(batch).position.unbind(-1)
    before, after = (net.read_disks(batch.pattern, batch.probe, y, x, binning=1) for net in (shallow, deep))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(b, a, equal_nan=True)


def test_train_config__the_second_stage_needs_a_network_that_has_one():
    with pytest.raises(ValueError, match="reader_width"):
        TrainConfig(steps=1, stage="disks")


def test_disk_losses__a_wrong_scale_costs_less_than_a_wrong_pattern(batch):
    proposals, radius = propose(batch), disk_radius(batch.probe)
    right = truth_as_reading(proposals)
    doubled = right._replace(root_amplitude=right.root_amplitude * 2**0.5)
    order = torch.rand(right.root_amplitude.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    shuffled = right._replace(root_amplitude=right.root_amplitude.gather(1, order))
    scaled = float(disk_losses(doubled, proposals, radius).amplitude)
    assert 0.1 < scaled < 0.5 * float(disk_losses(shuffled, proposals, radius).amplitude)
