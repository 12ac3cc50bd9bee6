"""Products by oneDNN are torch's own, and step aside where they must."""

import pytest
import torch
from torch import nn

from fusionkit.models.onednn import Linear, linear, pointwise, with_onednn


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
