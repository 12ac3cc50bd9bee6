"""Norm, 1×1 and depth-wise convolution in one: the Triton twins against the references."""

from __future__ import annotations

import pytest
import torch

from fusionkit.kernels import channel_statistics as statistics_module
from fusionkit.kernels import normed_depthwise as module
from fusionkit.kernels.normed_depthwise import (
    normed_depthwise_reference,
    normed_depthwise_takes,
    normed_depthwise_twin,
    normed_gated_depthwise_reference,
    normed_gated_depthwise_twin,
)
from fusionkit.models import blocks
from fusionkit.models.blocks import RestormerBlock

PAIRS = {
    "plain": (normed_depthwise_twin, normed_depthwise_reference),
    "gated": (normed_gated_depthwise_twin, normed_gated_depthwise_reference),
}


def inputs(shape, device, out_channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    shapes = [shape, channels, channels, (out_channels, channels, 1, 1), (out_channels, 1, 3, 3)]
    drawn = [torch.randn(s, generator=generator) for s in shapes]
    drawn[0] = 3 * drawn[0] + 1
    return [x.to(device, dtype) for x in drawn]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("shape", "out_channels"),
    [
        ((2, 6, 8, 8), 18),
        ((1, 20, 3, 5), 8),  # fewer out than in
        ((1, 2, 17, 64), 6),  # more than one band and one strip
        ((1, 1, 1, 1), 4),
    ],
)
@pytest.mark.parametrize("pair", PAIRS)
def test_twin_is_the_reference(pair, shape, out_channels, memory_format, device):
    twin, reference = PAIRS[pair]
    x, *weights = inputs(shape, device, out_channels)
    x = x.to(memory_format=memory_format)
    found = twin(x, *weights, 0.1)
    torch.testing.assert_close(
        found, reference(x, *weights, 0.1), rtol=1e-5, atol=2e-5, check_stride=False
    )
    assert found.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("pair", PAIRS)
def test_not_contiguous(pair, device):
    twin, reference = PAIRS[pair]
    x, norm_weight, norm_bias, weight, taps = inputs((1, 8, 18, 7), device, 10)
    x, norm_weight, norm_bias = x[:, ::2, 1::2].mT, norm_weight[::2], norm_bias[::2]
    weights = norm_weight, norm_bias, weight[:, ::2], taps.mT
    torch.testing.assert_close(
        twin(x, *weights), reference(x, *weights), rtol=1e-5, atol=2e-5, check_stride=False
    )


@pytest.mark.parametrize("pair", PAIRS)
def test_bf16_is_computed_in_float32(pair, device):
    twin, reference = PAIRS[pair]
    given = inputs((1, 4, 8, 8), device, 8, torch.bfloat16)
    found = twin(*given)
    assert found.dtype == torch.bfloat16
    expected = reference(*(x.float() for x in given))
    # Rounded to bf16, by the interpreter towards zero: 2^-7; a GPU's products round inputs to TF32.
    torch.testing.assert_close(found.float(), expected, rtol=8e-3, atol=1e-2, check_stride=False)


def test_a_bright_flat_picture_is_not_amplified(device):
    # The padding is of the mixed channels: a border pixel lacks taps, and is not normed zeros.
    _, *weights = inputs((1, 4, 3, 3), device, 4)
    x = torch.full((1, 4, 3, 3), 1000.0, device=device)
    found = normed_depthwise_twin(x, *weights)
    mixed = weights[2][..., 0, 0] @ weights[1]
    expected = mixed * weights[3][:, 0].sum((1, 2))
    torch.testing.assert_close(found[0, :, 1, 1], expected, rtol=1e-5, atol=1e-5)
    corner = mixed * weights[3][:, 0, 1:, 1:].sum((1, 2))
    torch.testing.assert_close(found[0, :, 0, 0], corner, rtol=1e-5, atol=1e-5)


def test_when_the_twin_is_taken(device, monkeypatch):
    monkeypatch.setattr(module, "twin_takes", lambda *x: True)
    given = inputs((1, 4, 3, 3), device, 4)
    assert normed_depthwise_takes(*given)
    with torch.autocast(device, torch.bfloat16):
        assert not normed_depthwise_takes(*given)
    assert not normed_depthwise_takes(*inputs((1, 33, 1, 1), device, 4))
    for x in given:
        x.requires_grad_()
        assert not normed_depthwise_takes(*given)
        with torch.no_grad():
            assert normed_depthwise_takes(*given)
        x.requires_grad_(False)


def test_a_block_takes_the_twins_where_no_gradient_is_asked_for(device, monkeypatch):
    torch.manual_seed(0)
    block, x = RestormerBlock(4, 2).to(device), torch.randn(1, 4, 7, 9, device=device)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        expected = block(x)
    called = []
    for name in ("normed_depthwise_twin", "normed_gated_depthwise_twin"):
        twin = getattr(blocks, name)
        monkeypatch.setattr(blocks, name, lambda *x, t=twin, n=name: called.append(n) or t(*x))
    for each in (module, statistics_module):
        monkeypatch.setattr(each, "twin_takes", lambda *x: True)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4, check_stride=False)
    assert called == ["normed_depthwise_twin", "normed_gated_depthwise_twin"]
    recorded = block(x)
    assert len(called) == 2
    assert recorded.requires_grad


def test_a_block_on_a_cpu_is_its_modules_bit_for_bit():
    torch.manual_seed(0)
    block, x = RestormerBlock(8, 2), torch.randn(2, 8, 9, 7)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            after = x + block.attention(block.norm1(x))
            assert torch.equal(block(x), after + block.feed_forward(block.norm2(after)))
