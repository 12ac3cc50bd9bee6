"""Building blocks which several fusion networks share: Restormer's transformer block.

Source: Zamir et al., Restormer, CVPR 2022, as ReFusion and TDFusion use it: no convolution has a
bias, padding is zero, and attention is taken over channels, so its cost is linear in pixels.
"""

from __future__ import annotations

import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn import functional as F

from fusionkit.kernels.channel_statistics import channel_statistics
from fusionkit.kernels.gated_depthwise import gated_depthwise
from fusionkit.kernels.normed_depthwise import (
    normed_depthwise_takes,
    normed_depthwise_twin,
    normed_gated_depthwise_twin,
)
from fusionkit.models.onednn import (
    PointwiseConv2d,
    depthwise_gelu,
    depthwise_times,
    pointwise,
)


def conv1x1(in_dim: int, out_dim: int) -> nn.Conv2d:
    """A 1×1 convolution without bias."""
    return PointwiseConv2d(in_dim, out_dim, 1, bias=False)


def conv3x3(in_dim: int, out_dim: int, groups: int = 1) -> nn.Conv2d:
    """A zero-padded 3×3 convolution without bias; `groups=in_dim` makes it depth-wise."""
    return nn.Conv2d(in_dim, out_dim, 3, padding=1, groups=groups, bias=False)


class ProjectedQKV(nn.Sequential):
    """Queries, keys and values: a 1×1 convolution to 3·dim, then a depth-wise 3×3 one.

    (B, dim, H, W) -> (B, dim, H, W) three times. A `norm` comes first, if one is given.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(conv1x1(dim, 3 * dim), conv3x3(3 * dim, 3 * dim, groups=3 * dim))

    def forward(
        self, x: torch.Tensor, norm: LayerNorm2d | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if norm is not None:
            weights = norm.weight, norm.bias, self[0].weight, self[1].weight
            if normed_depthwise_takes(x, *weights):
                return normed_depthwise_twin(x, *weights, norm.eps).chunk(3, dim=1)
            x = norm(x)
        if parts_pay(x):
            return *self.queries_keys(x), self.values(x)
        return super().forward(x).chunk(3, dim=1)

    def queries_keys(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries and the keys alone."""
        return _part(x, *self, slice(None, 2 * self[0].in_channels)).chunk(2, dim=1)

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """The values alone."""
        return _part(x, *self, slice(2 * self[0].in_channels, None))


def _part(
    x: torch.Tensor, expand: nn.Conv2d, depthwise: nn.Conv2d, channels: slice
) -> torch.Tensor:
    """Some channels of `depthwise(expand(x))`."""
    weight = depthwise.weight[channels]
    return F.conv2d(pointwise(x, expand.weight[channels]), weight, padding=1, groups=len(weight))


def parts_pay(x: torch.Tensor) -> bool:
    """Whether maps are better computed part by part than all at once, and then cut.

    On a CPU what follows is faster on maps of their own than on every second run of channels.
    """
    return x.device.type == "cpu" and not torch.is_grad_enabled()


class ChannelAttention(nn.Module):
    """Attention between channels: softmax(q̂ k̂ᵀ · temperature) v within each head.

    q̂ and k̂ have unit length along the pixels. Since the lengths are sums over the whole picture,
    the result at one pixel depends on all of it.

    q, k, v: (B, C, H, W) -> (B, C, H, W); head h owns the channels h·C/heads to
    (h + 1)·C/heads - 1. The temperature, one for each head, is learned. `project` is the 1×1
    convolution that follows, if one does.

    The heads are narrow, two to four channels each. One C×C product for all of them, of which the
    blocks on the diagonal count, takes fewer passes over the picture than a product for each; and
    the projection, being linear too, is multiplied into that matrix.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        project: nn.Conv2d | None = None,
    ) -> torch.Tensor:
        return self.with_statistics(channel_statistics(q, k), v, project)

    def with_statistics(
        self,
        statistics: tuple[torch.Tensor, ...],
        v: torch.Tensor,
        project: nn.Conv2d | None = None,
    ) -> torch.Tensor:
        """`forward` with the `channel_statistics` of q and k given.

        They are sums over pixels, so those of a large picture are the sums of its tiles'.
        """
        matrix = self.matrix(*statistics)
        if project is not None:
            matrix = project.weight.flatten(1) @ matrix
        if len(v) == 1:  # a convolution keeps the memory format, whichever it is
            return pointwise(v, matrix[0, :, :, None, None])
        return (matrix @ v.flatten(2)).unflatten(2, v.shape[2:])

    def matrix(
        self, products: torch.Tensor, q_squared: torch.Tensor, k_squared: torch.Tensor
    ) -> torch.Tensor:
        """The attention of all heads, (B, C, C), zero between channels of different heads."""
        cosines = products * _inverse_root(q_squared) * _inverse_root(k_squared).transpose(-1, -2)
        batch, channels, heads = *products.shape[:2], len(self.temperature)
        blocks = cosines.view(batch, heads, channels // heads, heads, channels // heads)
        blocks = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # (B, heads, c, c)
        attention = (blocks * self.temperature).softmax(-1)
        apart = torch.eye(heads, dtype=products.dtype, device=products.device)[:, None, :, None]
        return (attention.unsqueeze(3) * apart).flatten(3).flatten(1, 2)


def _inverse_root(squared: torch.Tensor) -> torch.Tensor:
    """1 / √x, and 1 where x is 0.

    A black crop makes q exactly zero. Dividing by a clamped length gives the right value there, but
    second derivatives of 1e24; masking inside the root keeps derivatives of every order finite.
    """
    return torch.where(squared > 0, squared, torch.ones_like(squared)).rsqrt()


class TransposedAttention(nn.Module):
    """Multi-head self-attention over channels, of norm(x). (B, dim, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv = ProjectedQKV(dim)
        self.attend = ChannelAttention(heads)
        self.project = conv1x1(dim, dim)

    def forward(self, x: torch.Tensor, norm: LayerNorm2d | None = None) -> torch.Tensor:
        return self.attend(*self.qkv(x, norm), self.project)


class GatedFeedForward(nn.Module):
    """Half of norm(x)'s expanded channels, through GELU, gates the other half. Shape is kept."""

    def __init__(self, dim: int, expansion: float = 2.0) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.expand = conv1x1(dim, 2 * hidden)
        self.depthwise = conv3x3(2 * hidden, 2 * hidden, groups=2 * hidden)
        self.project = conv1x1(hidden, dim)

    def forward(self, x: torch.Tensor, norm: LayerNorm2d | None = None) -> torch.Tensor:
        if norm is not None:
            weights = norm.weight, norm.bias, self.expand.weight, self.depthwise.weight
            if normed_depthwise_takes(x, *weights):
                return self.project(normed_gated_depthwise_twin(x, *weights, norm.eps))
            x = norm(x)
        if parts_pay(x):
            (gate, value), taps = self.expand.weight.chunk(2), self.depthwise.weight.chunk(2)
            gate = depthwise_gelu(pointwise(x, gate), taps[0])
            return self.project(depthwise_times(pointwise(x, value), taps[1], gate))
        return self.project(gated_depthwise(self.expand(x), self.depthwise.weight))


class RestormerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). (B, dim, H, W), any H and W."""

    def __init__(self, dim: int, heads: int, expansion: float = 2.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=1e-5)
        self.attention = TransposedAttention(dim, heads)
        self.norm2 = LayerNorm2d(dim, eps=1e-5)
        self.feed_forward = GatedFeedForward(dim, expansion)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, self.norm1)
        return x + self.feed_forward(x, self.norm2)

    def queries_keys(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the attention compares, (B, dim, H, W) twice; a pixel's depend on one more."""
        return [self.attention.qkv.queries_keys(self.norm1(x))]

    def finish(self, x: torch.Tensor, statistics: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        """`forward` with the `channel_statistics` of `queries_keys` given; depends on two more."""
        attention = self.attention
        values = attention.qkv.values(self.norm1(x))
        x = x + attention.attend.with_statistics(statistics[0], values, attention.project)
        return x + self.feed_forward(self.norm2(x))


def restormer_stage(dim: int, heads: int, blocks: int = 2) -> nn.Sequential:
    """`blocks` Restormer blocks in a row."""
    return nn.Sequential(*(RestormerBlock(dim, heads) for _ in range(blocks)))
