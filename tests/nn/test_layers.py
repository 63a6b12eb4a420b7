import pytest
import torch
from torch.nn import functional as F

from fcunet.nn.layers import (
    ComplexConv2d,
    ComplexNorm2d,
    FourierCorrelation,
    ModReLU,
    ProbeFilters,
    ReLU,
    TokenAttention,
    concat_complex,
    stack_complex,
    unstack_complex,
)


def random(*shape, seed=0, complex_=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.complex64 if complex_ else torch.float32)


def test_stack_complex__is_undone_by_unstack():
    z = random(2, 3, 5, 4, complex_=True)
    torch.testing.assert_close(unstack_complex(stack_complex(z)), z, rtol=0, atol=0)


def test_concat_complex__keeps_real_beside_real():
    a, b = random(1, 2, 4, 4, complex_=True), random(1, 3, 4, 4, seed=1, complex_=True)
    joined = unstack_complex(concat_complex(stack_complex(a), stack_complex(b)))
    torch.testing.assert_close(joined, torch.cat((a, b), dim=1), rtol=0, atol=0)


def native_conv(conv, z, mode="constant"):
    weight = torch.complex(*conv.weight.detach())
    padded = torch.complex(*(F.pad(part, (1, 1, 1, 1), mode=mode) for part in (z.real, z.imag)))
    return F.conv2d(padded, weight) + torch.complex(*conv.bias.detach().chunk(2))[:, None, None]


def test_complex_conv__equals_the_native_complex_convolution():
    conv, z = ComplexConv2d(3, 5), random(2, 3, 9, 8, complex_=True)
    conv.bias.data.copy_(random(10, seed=3))
    torch.testing.assert_close(
        unstack_complex(conv(stack_complex(z))), native_conv(conv, z), rtol=1e-5, atol=1e-5
    )


def test_complex_conv__wraps_with_circular_padding():
    conv, z = ComplexConv2d(2, 2, padding_mode="circular"), random(1, 2, 8, 8, complex_=True)
    expected = native_conv(conv, z, "circular")
    torch.testing.assert_close(unstack_complex(conv(stack_complex(z))), expected, rtol=1e-5, atol=1e-5)


def test_mod_relu__keeps_the_phase():
    z = random(1, 4, 6, 6, complex_=True)
    out = unstack_complex(ModReLU(4)(stack_complex(z)))
    alive = out.abs() > 1e-3
    torch.testing.assert_close(out.angle()[alive], z.angle()[alive], rtol=0, atol=1e-4)


def test_complex_norm__turns_with_the_phase_of_its_input():
    norm, z = ComplexNorm2d(3), random(4, 3, 6, 6, complex_=True)
    turn = torch.polar(torch.tensor(1.0), torch.tensor(0.7))
    a, b = unstack_complex(norm(stack_complex(z))), unstack_complex(norm(stack_complex(z * turn)))
    torch.testing.assert_close(b, a * turn, rtol=1e-4, atol=1e-5)


def test_fourier_correlation__peaks_where_the_probe_sits():
    probe = torch.zeros(1, 1, 32, 32)
    probe[..., 14:19, 14:19] = 1
    pattern = torch.roll(probe, (4, -6), dims=(-2, -1)) * 7
    z = unstack_complex(FourierCorrelation(shifted=True)(pattern, probe))
    image = torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(z, dim=(-2, -1))).real, dim=(-2, -1))
    assert divmod(int(image.argmax()), 32) == (16 + 4, 16 - 6)
    torch.testing.assert_close(torch.linalg.vector_norm(z), torch.tensor(1.0))


def disk(size, radius, y=0.0, x=0.0):
    d = torch.fft.fftfreq(size, 1 / size)
    return (radius + 0.5 - torch.hypot(d[:, None] - y, d - x)).clamp(0, 1)


def plain_correlation(order=0):
    """A single filter without power, profile 1 in the real part, 0 in the imaginary one."""
    filters = ProbeFilters(1, orders=(order,))
    with torch.no_grad():
        filters.mix.fill_(1)
        filters.power.fill_(-30)
        filters.radial[..., 1] = 0
    return filters


def test_probe_filters__with_power_zero_are_the_band_limited_correlation():
    filters, size = plain_correlation(), 64
    probe = disk(size, 5.0)[None] / disk(size, 5.0).sum()
    x = random(1, 1, size, size)
    out = filters(x, probe, torch.tensor([5.0]))[:, 0]
    # the same in full sampling, by the definition in the docstring
    k = torch.fft.fftfreq(size)
    q = torch.hypot(k[:, None], k)
    nodes = filters.nodes
    profile = 0.5 * torch.exp(-((q[..., None] * 5.0 - nodes) / nodes[1]).square()).sum(-1)
    inner = (k[:, None] < 0.25) & (k[:, None] >= -0.25) & (k.abs() <= 0.25)
    z = torch.fft.fft2(x[:, 0]) * torch.fft.fft2(probe).conj() * profile * inner
    z[..., k.abs() == 0.25] = 0  # Nyquist of the coarse grid: a convention, left out on both sides
    z[..., k.abs() == 0.25, :] = 0
    half = torch.exp(1j * torch.pi * (k[:, None] + k))
    full = torch.fft.ifft2(z * half).real[:, ::2, ::2]
    spectrum = torch.fft.fft2(out)
    edge = torch.fft.fftfreq(size // 2).abs() == 0.5
    spectrum[..., edge] = 0
    spectrum[..., edge, :] = 0
    torch.testing.assert_close(torch.fft.ifft2(spectrum).real, full, rtol=1e-4, atol=1e-5)


def test_probe_filters__of_order_one_change_sign_across_the_disk():
    filters, size = plain_correlation(order=1), 64
    probe = disk(size, 5.0)[None] / disk(size, 5.0).sum()
    x = disk(size, 5.0, 10.5, 20.5)[None, None]  # between pixels 5 of the coarse grid: 2 * 5 + 0.5
    across_x, across_y = filters(x, probe, torch.tensor([5.0]))[0].detach()
    assert abs(float(across_x[5, 10])) < 1e-3 * float(across_x.abs().max())
    assert float(across_x[5, 9]) * float(across_x[5, 11]) < 0
    assert float(across_y[4, 10]) * float(across_y[6, 10]) < 0
    assert abs(float(across_x[4, 10] - across_x[6, 10])) < 1e-3 * float(across_x.abs().max())


def test_token_attention__moves_with_a_permutation_of_positions():
    block, x = TokenAttention(16).eval(), random(2, 16, 4, 6)
    torch.testing.assert_close(block(x).flip(-1), block(x.flip(-1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [True, False])
def test_relu__is_the_same_in_every_arithmetic(kind, gradient):
    x = random(2, 5, 6, 7).to(kind).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0] = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 3e38, -3e38, -torch.inf])
    expected = F.relu(x)
    with torch.set_grad_enabled(gradient):
        found = ReLU()(x.clone(memory_format=torch.preserve_format))
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
