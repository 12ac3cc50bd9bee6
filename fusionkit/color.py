"""Colour: RGB and YCbCr in float, and the rule for the chroma of a fused picture.

YCbCr is JPEG's full-range Rec. 601. Everything lies in [0, 1]; the neutral chroma is 0.5.
"""

from __future__ import annotations

import torch

REC_601 = (0.299, 0.587, 0.114)
NEUTRAL = 0.5


def luminance(image: torch.Tensor) -> torch.Tensor:
    """Y = 0.299 R + 0.587 G + 0.114 B, not rounded; a gray picture is returned as it is.

    (..., 1 or 3, H, W) in [0, 1] -> (..., 1, H, W) in [0, 1].

    Raises:
        ValueError: neither one channel nor three.
    """
    channels = image.shape[-3]
    if channels == 1:
        return image
    if channels != 3:
        raise ValueError(f"expected 1 (gray) or 3 (RGB) channels, got shape {tuple(image.shape)}")
    weights = image.new_tensor(REC_601).view(3, 1, 1)
    return (image * weights).sum(dim=-3, keepdim=True).clamp(0, 1)


def chroma(image: torch.Tensor) -> torch.Tensor:
    """Cb and Cr of RGB (..., 3, H, W) as (..., 2, H, W); a gray picture's are neutral."""
    y = luminance(image)
    if image.shape[-3] == 1:
        return torch.full_like(torch.cat([y, y], dim=-3), NEUTRAL)
    red, _, blue = image.unbind(dim=-3)
    y = y.squeeze(-3)
    cb = (blue - y) / (2 * (1 - REC_601[2]))
    cr = (red - y) / (2 * (1 - REC_601[0]))
    return torch.stack([cb, cr], dim=-3) + NEUTRAL


def to_rgb(y: torch.Tensor, cbcr: torch.Tensor) -> torch.Tensor:
    """Y (..., 1, H, W) and CbCr (..., 2, H, W) -> RGB (..., 3, H, W), clipped to [0, 1]."""
    cb, cr = (cbcr - NEUTRAL).split(1, dim=-3)
    red = y + 2 * (1 - REC_601[0]) * cr
    blue = y + 2 * (1 - REC_601[2]) * cb
    green = (y - REC_601[0] * red - REC_601[2] * blue) / REC_601[1]
    return torch.cat([red, green, blue], dim=-3).clamp(0, 1)


def fuse_chroma(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The chroma of a fused picture from two sources' chroma, (..., 2, H, W) each.

    A mean weighted by the distance to neutral, |C - 0.5|, for Cb and Cr each: a gray source has
    no say, and of two colours the stronger one prevails. ReFusion's and TDFusion's releases have
    this rule for multi-exposure pairs, with the slip of comparing 0-to-255 chroma with 0.5.
    """
    weight_a, weight_b = (a - NEUTRAL).abs(), (b - NEUTRAL).abs()
    total = weight_a + weight_b
    mean = (weight_a * a + weight_b * b) / total.clamp_min(torch.finfo(total.dtype).tiny)
    return torch.where(total > 0, mean, torch.full_like(mean, NEUTRAL))
