"""Moments of pictures under a sliding window, each blur made once, and SSIM's terms of them."""

from __future__ import annotations

import torch

from fusionkit.kernels import ssim as kernel
from fusionkit.metrics._filters import gaussian, separable
from fusionkit.metrics.remember import remembered

GAUSSIAN = tuple(gaussian(11, 1.5))  # the window of Wang et al. 2004
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
REDUCTIONS = ("mean", "sum")
# The variance, in squared gray levels, below which a window is flat: rounding leaves about 1e-11
# in a flat one, and one pixel that is a level off leaves 1e-6 in the corner of the Gaussian.
FLAT = 1e-8


class Moments:
    """Means, variances and covariances of pictures (B, H, W) in the windows of the valid region.

    Args:
        taps: one axis of the window.
        pictures: by name, such as `a=a, b=b, f=f`.

    `mean` and `variance` go by the pictures' names; `covariance("a", "f")` blurs the product.
    """

    def __init__(self, taps: tuple[float, ...], **pictures: torch.Tensor):
        self.taps = taps
        self.pictures = pictures
        self.mean = {name: _mean(x, taps) for name, x in pictures.items()}
        self.variance = {name: _variance(x, taps) for name, x in pictures.items()}

    def covariance(self, x: str, y: str) -> torch.Tensor:
        return _covariance(self.pictures[x], self.pictures[y], self.taps)


@remembered
def _mean(x: torch.Tensor, taps: tuple[float, ...]) -> torch.Tensor:
    return separable(x, taps)


@remembered
def _variance(x: torch.Tensor, taps: tuple[float, ...]) -> torch.Tensor:
    return separable(x.square(), taps) - _mean(x, taps).square()


@remembered
def _covariance(x: torch.Tensor, y: torch.Tensor, taps: tuple[float, ...]) -> torch.Tensor:
    return separable(x * y, taps) - _mean(x, taps) * _mean(y, taps)


def ssim_terms(
    moments: Moments, x: str, y: str, c1: float = C1, c2: float = C2
) -> tuple[torch.Tensor, torch.Tensor]:
    """SSIM's two maps between the pictures x and y: luminance; contrast times structure."""
    means, variances = (
        (moments.mean[x], moments.mean[y]),
        (moments.variance[x], moments.variance[y]),
    )
    return kernel.ssim_terms(*means, *variances, moments.covariance(x, y), c1, c2)


def ssim_map(moments: Moments, x: str, y: str, c1: float = C1, c2: float = C2) -> torch.Tensor:
    """SSIM between the pictures x and y in every window."""
    luminance, structure = ssim_terms(moments, x, y, c1, c2)
    return luminance * structure


def check_size(image: torch.Tensor, smallest: int, metric: str) -> None:
    """Raise a ValueError where `metric` needs more pixels than (..., H, W) has."""
    height, width = image.shape[-2:]
    if min(height, width) < smallest:
        raise ValueError(f"{metric} needs {smallest}×{smallest} pixels; got {height}×{width}")
