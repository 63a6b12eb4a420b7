import pytest
import torch

from fcunet.nn.model import FCUNetConfig
from fcunet.nn.published import PublishedFCUNet, build_network, parabola_offset


def tiny(kind, **options):
    torch.manual_seed(0)
    return build_network(FCUNetConfig(kind=kind, filters=4, levels=4, **options)).eval()


def inputs(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probe = torch.zeros(shape)
    probe[shape[0] // 2 - 2 : shape[0] // 2 + 3, shape[1] // 2 - 2 : shape[1] // 2 + 3] = 1
    return torch.rand(2, *shape, generator=generator) * 30, probe


@pytest.mark.parametrize(("filters", "convs", "millions"), [(8, 1, 9.1), (4, 2, 9.9)])
def test_paper__has_as_many_parameters_as_the_published_code(filters, convs, millions):
    net = build_network(FCUNetConfig(kind="paper", filters=filters, convs_per_block=convs))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("kind", ["paper", "paired"])
@pytest.mark.parametrize("shape", [(32, 32), (35, 47)])
def test_published__maps_have_the_size_of_the_frame(kind, shape):
    out = tiny(kind)(*inputs(shape))
    assert out.bragg_map.shape == (2, *shape)
    assert out.offset.shape == (2, 2, *shape)
    assert (out.stride, out.frame) == (1, shape)


@pytest.mark.parametrize("kind", ["paper", "paired"])
def test_published__does_not_see_the_intensity_scale(kind):
    net, (x, p) = tiny(kind, dropout=0.0), inputs((32, 32))
    torch.testing.assert_close(net(x * 1e3, p * 7).bragg_map, net(x, p).bragg_map, rtol=1e-3, atol=1e-4)


def test_paper__keeps_its_dropout_on_at_inference():
    net, (x, p) = tiny("paper"), inputs((32, 32))
    assert not torch.equal(net(x, p).bragg_map, net(x, p).bragg_map)


def test_paired__is_deterministic_at_inference():
    net, (x, p) = tiny("paired"), inputs((32, 32))
    assert torch.equal(net(x, p).bragg_map, net(x, p).bragg_map)


@pytest.mark.parametrize("kind", ["paper", "paired"])
def test_published__every_parameter_learns(kind):
    net, (x, p) = tiny(kind).train(), inputs((32, 32))
    net(x, p).bragg_map.square().mean().backward()
    assert isinstance(net, PublishedFCUNet)
    silent = [
        name for name, q in net.named_parameters() if q.grad is None or not bool(q.grad.abs().sum() > 0)
    ]
    # a bias straight before a norm that removes it may have no gradient
    assert not [name for name in silent if not name.endswith("bias")]


def test_parabola_offset__finds_the_vertex():
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    image = 5 - (y - 4.3).square() - 2 * (x - 3.8).square()
    offset = parabola_offset(image[None])[0, :, 4, 4]
    torch.testing.assert_close(offset, torch.tensor([0.3, -0.2]), rtol=1e-4, atol=1e-5)
    assert parabola_offset(image[None])[0, :, 1, 1].tolist() == [0, 0]


def test_build_network__refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="default, paper, paired"):
        FCUNetConfig(kind="papers")
