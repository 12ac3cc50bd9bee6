"""The gated depth-wise convolution's Triton twin against the reference."""

from __future__ import annotations

import pytest
import torch

from fusionkit.kernels import gated_depthwise as module
from fusionkit.kernels.gated_depthwise import (
    gated_depthwise,
    gated_depthwise_reference,
    gated_depthwise_twin,
)


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(shape, generator=generator)
    weight = torch.randn(shape[1], 1, 3, 3, generator=generator)
    return x.to(device, dtype), weight.to(device, dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 6, 7, 9), (1, 4, 8, 8), (1, 70, 3, 5), (1, 2, 1, 700)])
def test_twin_is_the_reference(shape, memory_format, device):
    x, weight = inputs(shape, device)
    x = x.to(memory_format=memory_format)
    found = gated_depthwise_twin(x, weight)
    torch.testing.assert_close(found, gated_depthwise_reference(x, weight), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=memory_format)


def test_not_contiguous(device):
    x, weight = inputs((1, 8, 20, 9), device)
    x, weight = x[:, 1:7, ::2].mT, weight[1:7].mT
    found = gated_depthwise_twin(x, weight)
    torch.testing.assert_close(found, gated_depthwise_reference(x, weight), rtol=1e-5, atol=1e-5)


def test_bf16_is_computed_in_float32(device):
    x, weight = inputs((1, 4, 5, 7), device, torch.bfloat16)
    found = gated_depthwise_twin(x, weight)
    assert found.dtype == torch.bfloat16
    expected = gated_depthwise_reference(x.float(), weight.float())
    # Rounded to bf16, by the interpreter towards zero: 2^-7.
    torch.testing.assert_close(found.float(), expected, rtol=8e-3, atol=1e-5)


def test_steps_aside_for_gradients(device, monkeypatch):
    monkeypatch.setattr(module, "twin_takes", lambda *x: True)
    called = []
    monkeypatch.setattr(
        module, "gated_depthwise_twin", lambda *x: called.append(1) or gated_depthwise_twin(*x)
    )
    x, weight = torch.randn(1, 8, 5, 6, device=device), torch.randn(8, 1, 3, 3, device=device)
    recorded = gated_depthwise(x, weight.requires_grad_())
    assert recorded.requires_grad
    assert not called
    with torch.no_grad():
        found = gated_depthwise(x, weight)
    torch.testing.assert_close(found, recorded.detach(), rtol=1e-4, atol=1e-5)
    assert called
