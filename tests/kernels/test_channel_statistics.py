"""q kᵀ and the squared lengths in one pass: the Triton twin against the reference."""

from __future__ import annotations

import pytest
import torch

from fusionkit.kernels import channel_statistics as module
from fusionkit.kernels import normed_depthwise
from fusionkit.kernels.channel_statistics import (
    channel_statistics,
    channel_statistics_reference,
    channel_statistics_twin,
)
from fusionkit.models.blocks import RestormerBlock
from tests.kernels.cases import check, check_second_gradients, not_contiguous, pictures

BOTH = channel_statistics_twin, channel_statistics_reference


@pytest.mark.parametrize(
    "shape", [(2, 6, 7, 9), (1, 4, 8, 8), (1, 20, 3, 5), (1, 2, 3, 700), (1, 1, 1, 1)]
)
def test_twin_is_the_reference(shape, device):
    check(*BOTH, pictures(shape, device, count=2))


def test_parts_of_a_map_in_channels_last(device):
    (whole,) = pictures((2, 18, 5, 7), device, count=1)
    q, k, _ = whole.detach().to(memory_format=torch.channels_last).chunk(3, dim=1)
    inputs = [x.requires_grad_() for x in (q, k)]
    assert not q.flatten(2).is_contiguous()
    check(*BOTH, inputs)
    gradient, _ = torch.autograd.grad(channel_statistics_twin(*inputs)[0].sum(), inputs)
    assert gradient.stride(1) == 1


def test_not_contiguous(device):
    inputs = not_contiguous((2, 3, 6, 9), device, count=2)
    check(*BOTH, inputs)
    check_second_gradients(*BOTH, inputs)


def test_bf16_is_computed_in_float32(device):
    # The results are rounded to bf16, by the interpreter towards zero: 2^-7.
    inputs = pictures((1, 4, 8, 8), device, count=2, dtype=torch.bfloat16)
    check(*BOTH, inputs, tolerance=8e-3)


def test_one_of_both_has_a_gradient(device):
    q, k = pictures((1, 3, 8, 8), device, count=2)
    for inputs in ((q, k.detach()), (q.detach(), k)):
        wanted = [x for x in inputs if x.requires_grad]
        found, expected = (
            torch.autograd.grad(sum(x.sum() for x in f(*inputs)), wanted) for f in BOTH
        )
        torch.testing.assert_close(found, expected)


def test_second_gradients_where_one_is_the_other(device):
    twin, reference = (lambda x, f=f: f(x, x.sqrt()) for f in BOTH)
    check_second_gradients(twin, reference, pictures((1, 3, 5, 6), device, count=1))


def test_reference_has_second_gradients():
    inputs = [x.detach().double().requires_grad_() for x in pictures((1, 2, 2, 3), "cpu", 2)]
    assert torch.autograd.gradcheck(channel_statistics, inputs)
    assert torch.autograd.gradgradcheck(channel_statistics, inputs)


def test_a_block_has_the_same_gradients_of_both_orders(device, monkeypatch):
    torch.manual_seed(0)
    block, x = RestormerBlock(4, 2).to(device), torch.randn(1, 4, 6, 5, device=device)
    weights = list(block.parameters())

    def run():
        first = torch.autograd.grad(block(x).square().mean(), weights, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), weights)

    expected = run()
    for each in (module, normed_depthwise):
        monkeypatch.setattr(each, "twin_takes", lambda *x: True)
    called, twin = [], channel_statistics_twin
    monkeypatch.setattr(module, "channel_statistics_twin", lambda *x: called.append(1) or twin(*x))
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-6)
    assert called == [1]
