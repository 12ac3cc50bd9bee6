"""Classical fusion without parameters: what a network has to beat.

Modules with `forward(a, b) -> fused` on (B, C, H, W) in [0, 1], any size from 8×8 on; they go
wherever a network goes. All raise ValueError for sources that differ in shape or are smaller.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

SMALLEST = 8


class Average(nn.Module):
    """Mean of the sources, pixel by pixel."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        _check(a, b)
        return (a + b) / 2


class Maximum(nn.Module):
    """The brighter source, pixel by pixel."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        _check(a, b)
        return torch.maximum(a, b)


class LaplacianPyramid(nn.Module):
    """The larger band-pass coefficient in magnitude, level by level; the average at the top.

    Args:
        levels: band-pass levels; small pictures have as many as leave 2 pixels a side at the top.

    Source: Burt and Adelson, The Laplacian pyramid as a compact image code, 1983.
    """

    def __init__(self, levels: int = 5):
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels {levels}; expected 1 or more")
        self.levels = levels

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        _check(a, b)
        bands = []
        for _ in range(min(self.levels, (min(a.shape[-2:]) - 1).bit_length() - 1)):
            smaller_a, smaller_b = _reduce(a), _reduce(b)
            band_a = a - _expand(smaller_a, a.shape[-2:])
            band_b = b - _expand(smaller_b, b.shape[-2:])
            bands.append(torch.where(band_a.abs() >= band_b.abs(), band_a, band_b))
            a, b = smaller_a, smaller_b
        fused = (a + b) / 2
        for band in reversed(bands):
            fused = band + _expand(fused, band.shape[-2:])
        return fused.clamp(0, 1)


class GuidedFilter(nn.Module):
    """Guided-filter fusion: each source's weights follow its own edges, in two scales.

    A source is split by a 31×31 mean into base and detail. Saliency (the Laplacian's magnitude,
    blurred) says at each pixel which source weighs 1; each map is smoothed by a guided filter with
    its source as the guide, widely for the bases and narrowly for the details. Saliency and guide
    of colour pictures are the means over the channels.

    Source: Li, Kang and Hu, Image fusion with guided filtering, 2013, with the paper's settings
    (r1 = 45, ε1 = 0.3, r2 = 7, ε2 = 1e-6).
    """

    BASE_RADIUS = 15
    SALIENCY_SIZE, SALIENCY_SIGMA = 11, 5.0
    BASE_SMOOTHING = (45, 0.3)
    DETAIL_SMOOTHING = (7, 1e-6)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        _check(a, b)
        # ε2 is less than the error of a variance in single precision.
        sources = torch.stack([a, b]).double()
        guides = sources.mean(2, keepdim=True)
        saliency = self._saliency(guides.float())
        first = (saliency[0] >= saliency[1]).to(guides)
        chosen = torch.stack([first, 1 - first])
        base = _box_mean(sources, self.BASE_RADIUS)
        fused = 0
        for layer, (radius, epsilon) in (
            (base, self.BASE_SMOOTHING),
            (sources - base, self.DETAIL_SMOOTHING),
        ):
            # Positive, so that both can be made to sum to 1.
            weights = guided_filter(guides, chosen, radius, epsilon).clamp_min(1e-6)
            fused = fused + (weights * layer).sum(0) / weights.sum(0)
        return fused.clamp(0, 1).to(a.dtype)

    def _saliency(self, x: torch.Tensor) -> torch.Tensor:
        """Magnitude of the Laplacian blurred by a Gaussian, for (..., H, W)."""
        laplacian = x.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
        position = torch.arange(self.SALIENCY_SIZE, dtype=x.dtype, device=x.device)
        centred = position - self.SALIENCY_SIZE // 2
        gaussian = torch.softmax(-centred.square() / (2 * self.SALIENCY_SIGMA**2), dim=0)
        magnitude = _filter(x, laplacian).abs()
        return _filter(_filter(magnitude, gaussian[None]), gaussian[:, None])


def guided_filter(
    guide: torch.Tensor, x: torch.Tensor, radius: int, epsilon: float
) -> torch.Tensor:
    """`x` (..., H, W) smoothed as a local linear function of `guide`, of one shape with it.

    Windows of 2·radius + 1, cut off at the border; `epsilon` is the variance of the guide, in its
    squared units, below which a window counts as flat.

    Source: He, Sun and Tang, Guided image filtering, 2013.
    """
    means = torch.stack([guide, x, guide * x, guide * guide])
    mean_guide, mean_x, mean_product, mean_square = _box_mean(means, radius)
    slope = (mean_product - mean_guide * mean_x) / (mean_square - mean_guide**2 + epsilon)
    offset = mean_x - slope * mean_guide
    slope, offset = _box_mean(torch.stack([slope, offset]), radius)
    return slope * guide + offset


def _box_mean(x: torch.Tensor, radius: int) -> torch.Tensor:
    """Mean over the part of a (2·radius + 1)² window inside the picture, by cumulative sums."""
    for axis in (-1, -2):
        sums = x.cumsum(axis)
        size = sums.shape[axis]
        first, last = sums.narrow(axis, 0, 1), sums.narrow(axis, size - 1, 1)
        before = torch.zeros_like(first).repeat_interleave(radius + 1, axis)
        sums = torch.cat([before, sums, last.repeat_interleave(radius, axis)], axis)
        total = sums.narrow(axis, 2 * radius + 1, size) - sums.narrow(axis, 0, size)
        position = torch.arange(size, device=x.device)
        count = (position + radius + 1).clamp_max(size) - (position - radius).clamp_min(0)
        x = total / (count if axis == -1 else count[:, None])
    return x


def _filter(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """(..., H, W) correlated with a kernel of odd sides, the border replicated."""
    height, width = kernel.shape
    flat = x.reshape(-1, 1, *x.shape[-2:])
    sides = (width // 2, width // 2, height // 2, height // 2)
    return F.conv2d(F.pad(flat, sides, mode="replicate"), kernel[None, None]).reshape(x.shape)


def _reduce(x: torch.Tensor) -> torch.Tensor:
    """Blur by (1, 4, 6, 4, 1) / 16 along both axes and take every other pixel."""
    taps = x.new_tensor([1, 4, 6, 4, 1]) / 16
    return _filter(_filter(x, taps[None]), taps[:, None])[..., ::2, ::2]


def _expand(x: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Twice as large by the same taps, then cut to `size`.

    The taps fall on known pixels as (1, 6, 1) / 8 at even places and as (1, 1) / 2 between.
    """
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    for axis in (-1, -2):
        before, at, after = (
            padded.narrow(axis, start, padded.shape[axis] - 2) for start in range(3)
        )
        even, odd = (before + 6 * at + after) / 8, (at + after) / 2
        padded = torch.stack([even, odd], axis).flatten(axis - 1, axis)
    return padded[..., : size[0], : size[1]]


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(
            "expected two sources (B, C, H, W) of one shape, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if min(a.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"expected at least {SMALLEST}×{SMALLEST} pixels, got {a.shape[-2]}×{a.shape[-1]}"
        )


BASELINES: dict[str, Callable[[], nn.Module]] = {
    "average": Average,
    "maximum": Maximum,
    "laplacian_pyramid": LaplacianPyramid,
    "guided_filter": GuidedFilter,
}
