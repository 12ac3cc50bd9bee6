"""Moments of pictures under a sliding window, each blur made once, and SSIM's terms of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusionkit.metrics._filters import gaussian, separable

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

    def __init__(self, taps: Sequence[float], **pictures: torch.Tensor):
        self.taps = taps
        self.pictures = pictures
        self.mean = {name: separable(x, taps) for name, x in pictures.items()}
        self.variance = {
            name: separable(x.square(), taps) - self.mean[name].square()
            for name, x in pictures.items()
        }

    def covariance(self, x: str, y: str) -> torch.Tensor:
        product = separable(self.pictures[x] * self.pictures[y], self.taps)
        return product - self.mean[x] * self.mean[y]


def ssim_terms(
    moments: Moments, x: str, y: str, c1: float = C1, c2: float = C2
) -> tuple[torch.Tensor, torch.Tensor]:
    """SSIM's two maps between the pictures x and y: luminance; contrast times structure."""
    product = moments.mean[x] * moments.mean[y]
    squares = moments.mean[x].square() + moments.mean[y].square()
    luminance = (2 * product + c1) / (squares + c1)
    variances = moments.variance[x] + moments.variance[y]
    return luminance, (2 * moments.covariance(x, y) + c2) / (variances + c2)


def ssim_map(moments: Moments, x: str, y: str, c1: float = C1, c2: float = C2) -> torch.Tensor:
    """SSIM between the pictures x and y in every window."""
    luminance, structure = ssim_terms(moments, x, y, c1, c2)
    return luminance * structure


def check_size(image: torch.Tensor, smallest: int, metric: str) -> None:
    """Raise a ValueError where `metric` needs more pixels than (..., H, W) has."""
    height, width = image.shape[-2:]
    if min(height, width) < smallest:
        raise ValueError(f"{metric} needs {smallest}×{smallest} pixels; got {height}×{width}")
