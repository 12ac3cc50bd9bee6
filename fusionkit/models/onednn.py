"""Products that torch gives to slower code on a CPU than oneDNN's, where nothing differentiates."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from fusionkit.kernels._dispatch import transformed


class PointwiseConv2d(nn.Conv2d):
    """A 1×1 convolution without bias, by `pointwise`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pointwise(x, self.weight)


class Linear(nn.Linear):
    """A linear layer by `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def pointwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) with weights (D, C, 1, 1) -> (B, D, H, W); no bias."""
    # With one thread torch gives these to im2col, a third as fast as oneDNN.
    if torch.get_num_threads() == 1 and _takes(x, weight):
        return _convolution(x, weight, None)
    return F.conv2d(x, weight)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(..., C) with weights (D, C) -> (..., D): `F.linear`."""
    # Torch gives these to MKL, which on processors of other makers than Intel is half as fast.
    # Tokens side by side are a picture of one row in the memory format channels_last.
    if not _takes(x, weight, *(() if bias is None else (bias,))):
        return F.linear(x, weight, bias)
    tokens = x.contiguous().view(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    out = _convolution(tokens, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def depthwise_gelu(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """GELU of the depth-wise convolution of (B, C, H, W) with (C, 1, 3, 3), zero-padded."""
    if _takes(x, taps) and _fuses():
        return _fused_gelu(x, taps)
    return F.gelu(_depthwise(x, taps))


def depthwise_times(x: torch.Tensor, taps: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The depth-wise convolution of (B, C, H, W) with (C, 1, 3, 3), zero-padded, times `factor`."""
    if _takes(x, taps, factor) and _fuses():
        return _fused_times(x, taps, factor)
    return _depthwise(x, taps) * factor


def with_onednn(module: nn.Module) -> nn.Module:
    """`module` with `Linear` for every linear layer in it; weights and keys are the same."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            with torch.device("meta"):  # no memory, no random numbers
                layer = Linear(child.in_features, child.out_features, child.bias is not None)
            layer.weight, layer.bias = child.weight, child.bias
            setattr(module, name, layer)
        else:
            with_onednn(child)
    return module


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mkldnn_convolution(x, weight, bias, (0, 0), (1, 1), (1, 1), 1)


def _depthwise(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, taps, padding=1, groups=len(taps))


# Convolutions that do one thing more with each result before they write it. What torch's compiler
# calls; the names are not public, so `_fuses` asks once whether this version has them.
_GEOMETRY = (1, 1), (1, 1), (1, 1)  # padding, stride, dilation


def _fused_gelu(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    fused = torch.ops.mkldnn._convolution_pointwise
    return fused(x, taps, None, *_GEOMETRY, len(taps), "gelu", [], "none")


def _fused_times(x: torch.Tensor, taps: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    fused = torch.ops.mkldnn._convolution_pointwise.binary
    return fused(x, factor, taps, None, *_GEOMETRY, len(taps), "mul", None, None, [], None)


@cache
def _fuses() -> bool:
    x, taps = torch.linspace(-1, 1, 18).view(1, 2, 3, 3), torch.linspace(1, 2, 18).view(2, 1, 3, 3)
    try:
        found = _fused_times(x, taps, _fused_gelu(x, taps))
    except (AttributeError, RuntimeError, TypeError):
        return False
    plain = _depthwise(x, taps)
    return torch.allclose(found, plain * F.gelu(plain), atol=1e-5)


def _takes(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether x is float32 on a CPU with oneDNN, and nothing differentiates, casts or compiles."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not transformed(x, *others)
    )
