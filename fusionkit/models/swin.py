"""Blocks of the unfolding networks, from timm: a Swin V2 layer for any size, a ConvNeXt V2 block.

Sources: Liu et al., Swin Transformer V2, CVPR 2022; Woo et al., ConvNeXt V2, CVPR 2023.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer_v2 import (
    SwinTransformerV2Block,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import nn
from torch.nn import functional as F

BAND_PIXELS = 8192  # what a band holds, in pixels: its attention stays in a processor's cache
FEW_TOKENS = 4  # up to so many, `attend_in_small_windows` is faster than matrix products


class BandedSwinBlock(SwinTransformerV2Block):
    """timm's Swin V2 block; without gradients on a CPU, band by band of the picture.

    After the shift no window knows of another, and the rest is pixel by pixel. So the block may do
    all its work on a few rows of windows before it goes on to the next, and the attention of a
    whole picture (of 16 tokens and 8 heads, 128 numbers a pixel) is never held. The result is the
    same to rounding. (B, H, W, dim) -> the same; H and W are multiples of the window.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        _, height, width, _ = x.shape
        window, shift = self.window_size, self.shift_size
        mask = self.get_attn_mask(x)  # (windows, tokens, tokens), or None without a shift
        if mask is not None:
            mask = mask.unflatten(0, (height // window[0], width // window[1]))
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
        out = torch.empty_like(x)
        few = self.window_area <= FEW_TOKENS
        attend = partial(attend_in_small_windows, self.attn) if few else self.attn
        rows = max(1, BAND_PIXELS // (width * window[0]))  # of windows, in a band
        for top in range(0, height // window[0], rows):
            band = slice(top * window[0], (top + rows) * window[0])
            part = x[:, band]
            own = None if mask is None else mask[top : top + rows].flatten(0, 1)
            attended = attend(window_partition(part, window).flatten(1, 2), own)
            attended = window_reverse(attended.unflatten(1, window), window, part.shape[1:3])
            part = part + self.norm1(attended)
            out[:, band] = part + self.norm2(self.mlp(part))
        return out if mask is None else out.roll(shift, dims=(1, 2))


def attend_in_small_windows(
    attention: WindowAttention, x: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`attention(x, mask)` of Swin V2, without gradients, computed across windows.

    Matrices of 4×4 are too small for matrix products and rows of four for a softmax. With the
    windows along the last axis, each of the few products and sums runs over all windows at once.

    Args:
        x: (windows, tokens, dim), as are the results.
        mask: what is added to the logits, (windows of one item, tokens, tokens).
    """
    windows, tokens, dim = x.shape
    heads = attention.num_heads
    offset = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    qkv = F.linear(x, attention.qkv.weight, offset).permute(1, 2, 0).contiguous()
    q, k, v = qkv.view(tokens, 3, heads, dim // heads, windows).unbind(1)
    scale = attention.logit_scale.clamp(max=math.log(100)).exp()  # (heads, 1, 1)
    # F.normalize's values; its norm over an axis in the middle is forty times slower.
    q, k = (x * x.square().sum(2, keepdim=True).clamp_min(1e-24).rsqrt() for x in (q, k))
    q = q * scale
    table = attention.cpb_mlp(attention.relative_coords_table).view(-1, heads)
    positions = 16 * table[attention.relative_position_index].sigmoid()  # (tokens, tokens, heads)
    logits = positions[..., None].repeat(1, 1, 1, windows)
    if mask is not None:
        logits += mask.permute(1, 2, 0)[:, :, None].repeat(1, 1, 1, windows // len(mask))
    for i in range(dim // heads):
        logits.addcmul_(q[:, None, :, i], k[None, :, :, i])
    weights = logits.softmax(dim=1)
    out = torch.zeros_like(q)
    for token in range(tokens):
        out.addcmul_(weights[:, token, :, None], v[token])
    return attention.proj(out.view(tokens, dim, windows).permute(2, 0, 1))


class NormedSwin(nn.Module):
    """LayerNorm, a Swin V2 layer of two blocks, LayerNorm; no residual goes around it.

    (B, dim, H, W) -> the same; H and W are multiples of `window`. The second block is shifted by
    half a window. Its mask and the tables of positions are computed: checkpoints have none.
    """

    def __init__(self, dim: int, heads: int, window: int, mlp_ratio: float = 3.0) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.blocks = nn.Sequential(
            *(
                BandedSwinBlock(
                    dim,
                    input_resolution=window,  # any, as the mask follows the input
                    num_heads=heads,
                    window_size=window,
                    shift_size=shift,
                    always_partition=True,
                    dynamic_mask=True,
                    mlp_ratio=mlp_ratio,
                )
                for shift in (0, window // 2)
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm_in(x.permute(0, 2, 3, 1))
        return self.norm_out(self.blocks(tokens)).permute(0, 3, 1, 2)


def convnext_block(dim: int) -> ConvNeXtBlock:
    """A ConvNeXt V2 block: 7×7 depth-wise, norm, 4·dim with GRN, back, plus identity."""
    return ConvNeXtBlock(dim, use_grn=True, ls_init_value=None)
