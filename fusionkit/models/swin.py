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

BAND_PIXELS = 8192  # of a band, whose attention then stays in a processor's cache
FEW_TOKENS = 4  # up to so many, `attend_in_small_windows` is faster than matrix products


class BandSwinBlock(SwinTransformerV2Block):
    """timm's Swin V2 block, which can also be had for some rows of windows at a time."""

    def band(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The block of some rows of windows, already shifted: (B, h, W, dim) -> the same.

        mask: what is added to the logits, (windows of one item, tokens, tokens). Not for gradients.
        """
        few = self.window_area <= FEW_TOKENS
        attend = partial(attend_in_small_windows, self.attn) if few else self.attn
        attended = attend(window_partition(x, self.window_size).flatten(1, 2), mask)
        attended = attended.unflatten(1, self.window_size)
        x = x + self.norm1(window_reverse(attended, self.window_size, x.shape[1:3]))
        return x + self.norm2(self.mlp(x))

    def masks(self, rows: range, x: torch.Tensor) -> torch.Tensor:
        """The masks of some rows of windows of a shifted x (B, H, W, dim), for `band`.

        Only windows at the lower and the right edge hold what the shift brought together, so
        those of two by two windows tell all.
        """
        tokens, (height, width) = self.window_area, self.window_size
        corner = self.get_attn_mask(x.new_empty(1, 2 * height, 2 * width, 1))
        lowest, last = x.shape[1] // height - 1, x.shape[2] // width - 1
        below = torch.tensor([int(row == lowest) for row in rows], device=x.device)
        right = torch.tensor([int(column == last) for column in range(last + 1)], device=x.device)
        return corner.view(2, 2, tokens, tokens)[below[:, None], right].flatten(0, 1)


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
                BandSwinBlock(
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
        tokens = x.permute(0, 2, 3, 1)
        if torch.is_grad_enabled() or x.device.type != "cpu":
            tokens = self.norm_out(self.blocks(self.norm_in(tokens)))
        else:
            tokens = self._banded(tokens)
        return tokens.permute(0, 3, 1, 2)

    def _banded(self, tokens: torch.Tensor) -> torch.Tensor:
        """`forward` without gradients, in less memory and time.

        After the shift no window knows of another, and the rest is pixel by pixel. So all work is
        done on a few rows of windows before it goes on to the next, in their place: neither the
        attention of a whole picture is held (of 16 tokens and 8 heads, 128 numbers a pixel), nor a
        shifted copy. The result is the same to rounding.
        """
        _, height, width, _ = tokens.shape
        plain, shifted = self.blocks
        window, shift = plain.window_size[0], shifted.shift_size
        count = height // window
        at_once = max(1, BAND_PIXELS // (width * window))
        bands = [range(i, min(i + at_once, count)) for i in range(0, count, at_once)]
        out = None
        for band in bands:
            rows = slice(band.start * window, band.stop * window)
            part = plain.band(self.norm_in(tokens[:, rows]))
            out = part.new_empty(tokens.shape) if out is None else out
            out[:, rows] = part
        for band in bands:
            rows = torch.arange(band.start * window, band.stop * window, device=out.device)
            rows = (rows + shift[0]) % height
            part = shifted.band(out[:, rows].roll(-shift[1], 2), shifted.masks(band, out))
            out[:, rows] = self.norm_out(part).roll(shift[1], 2)
        return out


def convnext_block(dim: int) -> ConvNeXtBlock:
    """A ConvNeXt V2 block: 7×7 depth-wise, norm, 4·dim with GRN, back, plus identity."""
    return ConvNeXtBlock(dim, use_grn=True, ls_init_value=None)
