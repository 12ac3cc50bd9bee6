"""Products by oneDNN are torch's own, and step aside where they must."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from fusionkit.models import onednn
from fusionkit.models.onednn import (
    Linear,
    depthwise_gelu,
    depthwise_times,
    linear,
    pointwise,
    with_onednn,
)


@pytest.fixture
def taken(monkeypatch) -> list:
    """A record of the calls that reach oneDNN."""
    calls, convolution = [], torch.mkldnn_convolution

    def record(*arguments):
        calls.append(arguments[0].shape)
        return convolution(*arguments)

    monkeypatch.setattr(torch, "mkldnn_convolution", record)
    return calls


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here")


@needs_onednn
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 7, 3, 5)])
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 4)])
def test_linear_is_torchs(shape, bias, taken):
    x, weight = torch.rand(shape), torch.rand(4, 5)
    with torch.no_grad():
        for given in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
            found = linear(given, weight, bias)
            torch.testing.assert_close(found, nn.functional.linear(x, weight, bias))
            assert found.is_contiguous()
    assert len(taken) == 2


@needs_onednn
def test_pointwise_is_torchs(taken):
    x, weight = torch.rand(2, 5, 7, 3), torch.rand(4, 5, 1, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            found = pointwise(x, weight)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found, nn.functional.conv2d(x, weight))
    assert taken == [x.shape]


@pytest.mark.parametrize("fuses", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_depthwise_with_what_follows(fuses, memory_format, monkeypatch):
    if fuses and not onednn._fuses():
        pytest.skip("this torch has no such convolutions")
    monkeypatch.setattr(onednn, "_fuses", lambda: fuses)
    x, factor = (torch.randn(2, 6, 5, 7).to(memory_format=memory_format) for _ in range(2))
    taps = torch.randn(6, 1, 3, 3)
    plain = nn.functional.conv2d(x, taps, padding=1, groups=6)
    with torch.no_grad():
        opened, times = depthwise_gelu(x, taps), depthwise_times(x, taps, factor)
        slices = depthwise_times(x[:, 1:4], taps[1:4], factor[:, 2:5])
    torch.testing.assert_close(opened, nn.functional.gelu(plain), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(times, plain * factor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slices, plain[:, 1:4] * factor[:, 2:5], rtol=1e-5, atol=1e-5)


def test_fused_convolutions_leave_gradients_alone():
    x, taps = torch.rand(1, 2, 4, 4, dtype=torch.double), torch.rand(2, 1, 3, 3, dtype=torch.double)
    factor = torch.rand_like(x).requires_grad_()
    inputs = x.requires_grad_(), taps.requires_grad_()
    assert torch.autograd.gradcheck(depthwise_gelu, inputs)
    assert torch.autograd.gradcheck(depthwise_times, (*inputs, factor))


def test_a_torch_without_fused_convolutions_has_none(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", lambda *x: x[0], raising=False)
    assert not onednn._fuses.__wrapped__()


def test_gradients_double_precision_and_autocast_are_left_to_torch(taken):
    x, layer = torch.rand(2, 5, requires_grad=True), Linear(5, 4)
    torch.autograd.gradcheck(layer.double(), x.double())
    layer.float()
    layer(x).sum().backward()
    assert torch.equal(x.grad, layer.weight.sum(0).expand(2, 5))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    tangent = torch.func.jvp(layer, (x.detach(),), (torch.ones(2, 5),))[1]
    torch.testing.assert_close(tangent, layer.weight.sum(1).expand(2, 4))
    assert not taken


def test_layers_are_exchanged_in_place_and_keep_their_weights():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.ModuleDict({"inner": nn.Linear(4, 2, bias=False)}))
    weights = dict(plain.named_parameters())
    state = torch.get_rng_state()
    changed = with_onednn(plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert changed is plain
    assert [type(m) for m in (plain[0], plain[1]["inner"])] == [Linear, Linear]
    found = dict(plain.named_parameters())
    assert found.keys() == weights.keys()
    assert all(found[name] is weights[name] for name in weights)


def test_forward_mode_is_left_to_torch():
    x, factor = torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4, 4)
    taps, step = torch.rand(2, 1, 3, 3), torch.rand(1, 2, 4, 4)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(factor, step)
        tangent = forward_ad.unpack_dual(depthwise_times(x, taps, dual)).tangent
        plain = nn.functional.conv2d(x, taps, padding=1, groups=2)
    torch.testing.assert_close(tangent, plain * step)
