"""What only a GPU can show: that the dispatchers take the twins there, and give the same."""

from __future__ import annotations

import pytest
import torch

from fusionkit.kernels import channel_statistics as statistics
from fusionkit.kernels import joint_histogram
from fusionkit.metrics import edges, mutual_information, nmi, qabf
from fusionkit.models import blocks
from fusionkit.models.refusion import ReFusion

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def called(monkeypatch):
    """The names of the twins that have been called."""
    names = []
    for module, name in (
        (blocks, "normed_depthwise_twin"),
        (blocks, "normed_gated_depthwise_twin"),
        (statistics, "channel_statistics_twin"),
        (joint_histogram, "joint_counts_twin"),
        (edges, "qabf_twin"),
    ):
        twin = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, t=twin, n=name: names.append(n) or t(*x))
    return names


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_refusion_is_that_of_a_cpu(memory_format, called):
    torch.manual_seed(0)
    network = ReFusion().to(memory_format=memory_format)
    a, b = torch.rand(2, 2, 1, 61, 83)
    with torch.no_grad():
        expected = network(a, b)
        found = network.cuda()(a.cuda(), b.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert {"normed_depthwise_twin", "normed_gated_depthwise_twin"} <= set(called)


def test_refusion_learns_as_on_a_cpu(called):
    torch.manual_seed(0)
    network, (a, b) = ReFusion(dim=8, heads=4, blocks=1), torch.rand(2, 1, 1, 21, 23)

    def gradients():
        device = next(network.parameters()).device
        loss = network(a.to(device), b.to(device)).square().mean()
        first = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
        second = sum(g.square().sum() for g in first)
        both = first, torch.autograd.grad(second, list(network.parameters()))
        return [x.detach().cpu() for order in both for x in order]

    expected = gradients()
    network.cuda()
    for found, right in zip(gradients(), expected, strict=True):
        assert (found - right).abs().max() <= 1e-3 * right.abs().max() + 1e-7
    assert set(called) == {"channel_statistics_twin"}


def test_metrics_are_those_of_a_cpu(called):
    given = torch.rand(3, 2, 1, 67, 130)
    for metric in (mutual_information, nmi, qabf):
        torch.testing.assert_close(metric(*given.cuda()).cpu(), metric(*given))
    assert {"joint_counts_twin", "qabf_twin"} <= set(called)
