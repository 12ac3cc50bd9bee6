"""Restormer's block, each part against a plain statement of it."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from fusionkit.models.blocks import (
    ChannelAttention,
    GatedFeedForward,
    ProjectedQKV,
    RestormerBlock,
    restormer_stage,
)


def channel_attention(q, k, v, temperature):
    attention = ChannelAttention(len(temperature))
    return functional_call(attention, {"temperature": temperature}, (q, k, v))


def naive_attention(q, k, v, temperature):
    heads, width = temperature.shape[0], q.shape[1] // temperature.shape[0]
    out = torch.zeros_like(v)
    for item in range(q.shape[0]):
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            q_hat = F.normalize(q[item, own].flatten(1), dim=-1)
            k_hat = F.normalize(k[item, own].flatten(1), dim=-1)
            attention = (q_hat @ k_hat.T * temperature[head, 0, 0]).softmax(dim=-1)
            out[item, own] = (attention @ v[item, own].flatten(1)).view_as(v[item, own])
    return out


@pytest.mark.parametrize(("channels", "heads"), [(8, 2), (8, 8), (6, 1)])
def test_attention_equals_a_plain_loop(channels, heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, channels, 5, 7, dtype=torch.float64)
    temperature = torch.rand(heads, 1, 1, dtype=torch.float64) * 3
    expected = naive_attention(q, k, v, temperature)
    torch.testing.assert_close(channel_attention(q, k, v, temperature), expected)


def test_attention_equals_a_plain_loop_in_channels_last():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 8, 5, 7).to(memory_format=torch.channels_last) for _ in range(3))
    temperature = torch.rand(4, 1, 1)
    expected = naive_attention(q, k, v, temperature)
    torch.testing.assert_close(
        channel_attention(q, k, v, temperature), expected, check_stride=False
    )


def test_attention_gradients():
    torch.manual_seed(0)
    given = [torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    given.append(torch.rand(2, 1, 1, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(channel_attention, given)
    assert torch.autograd.gradgradcheck(channel_attention, given)


def test_zero_queries_attend_evenly():
    v = torch.randn(1, 4, 3, 3)
    zero = torch.zeros_like(v)
    out = channel_attention(zero, zero, v, torch.ones(1, 1, 1))
    torch.testing.assert_close(out, v.mean(dim=1, keepdim=True).expand_as(v))


def test_norm_is_layer_norm_over_channels():
    torch.manual_seed(0)
    norm = RestormerBlock(8, 2).norm1
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    x = torch.randn(2, 8, 5, 7)
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (8,), norm.weight, norm.bias, eps=1e-5)
    torch.testing.assert_close(norm(x), expected.permute(0, 3, 1, 2), check_stride=False)
    # A flat pixel shows the eps and the biased variance.
    tiny = torch.tensor([1e-3, -1e-3]).repeat(4).view(1, 8, 1, 1)
    by_hand = tiny / (1e-6 + 1e-5) ** 0.5 * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(tiny), by_hand)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (1, 1)])
def test_block_keeps_the_shape(size):
    x = torch.randn(2, 8, *size)
    assert RestormerBlock(8, 2)(x).shape == x.shape
    assert restormer_stage(8, 4, 3)(x).shape == x.shape


def test_block_is_two_residual_branches():
    torch.manual_seed(0)
    block, x = RestormerBlock(8, 2), torch.randn(1, 8, 6, 6)
    mid = x + block.attention(block.norm1(x))
    torch.testing.assert_close(block(x), mid + block.feed_forward(block.norm2(mid)))
    with torch.no_grad():
        block.attention.project.weight.zero_()
        block.feed_forward.project.weight.zero_()
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_feed_forward_gates_with_the_first_half():
    torch.manual_seed(0)
    layer, x = GatedFeedForward(4, 2.0), torch.randn(1, 4, 5, 5)
    hidden = F.conv2d(x, layer.expand.weight)
    hidden = F.conv2d(hidden, layer.depthwise.weight, padding=1, groups=16)
    gate, value = hidden[:, :8], hidden[:, 8:]
    gelu = 0.5 * gate * (1 + torch.erf(gate / 2**0.5))
    expected = F.conv2d(gelu * value, layer.project.weight)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():  # computed half by half
        torch.testing.assert_close(layer(x), expected)


def test_no_convolution_has_a_bias():
    convolutions = [m for m in RestormerBlock(8, 2).modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 6
    assert all(c.bias is None for c in convolutions)


def test_queries_keys_and_values_are_thirds_of_the_channels():
    layer, x = ProjectedQKV(4), torch.randn(1, 4, 5, 6)
    expected = layer[1](layer[0](x)).chunk(3, dim=1)
    with torch.no_grad():
        alone = layer(x)  # computed part by part
    for found in (layer(x), alone):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
