"""MEF-SSIM: the fused picture against the patch that both sources would make at best."""

from __future__ import annotations

import math

import torch

from fusionkit.metrics._common import by_picture
from fusionkit.metrics._filters import box, pad, separable
from fusionkit.metrics._sobel import root
from fusionkit.metrics._ssim import C2, GAUSSIAN, Moments, check_size
from fusionkit.metrics.remember import remembered

PATCH = 11
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001)
LARGEST_POWER = 10
# Added to a patch's norm (over 121 pixels) as in the authors' code; here norms are root mean
# squares, a patch's side smaller.
OFFSET = 0.001 / PATCH


def mef_ssim(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """MEF-SSIM at one scale, at most 1; (B,). Larger is better.

    For each 11×11 patch, a desired patch has the larger contrast of the sources' patches, and
    their structures averaged by contrast^p, where p = tan(π/2 · R) (at most 10) grows with their
    consistency R. The value is the mean of contrast and structure of SSIM (Gaussian window of 11,
    σ 1.5, C2 = (0.03·255)²) between the desired patch and the fused one; means of patches do
    not enter. Sources flat in a patch desire a flat one.

    Raises:
        ValueError: pictures smaller than 11×11.

    Source: Ma, Zeng and Wang, Perceptual quality assessment for multi-exposure image fusion, 2015,
    eq. 2 to 11; constants as in their MATLAB code.
    """

    def value(a, b, f):
        check_size(f, PATCH, "MEF-SSIM")
        return _scale(a, b, f)

    return by_picture(value, a, b, fused)


def mef_ms_ssim(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """MEF-SSIM at three scales, at most 1; (B,). Larger is better.

    The product of the scales' values to the powers (0.0448, 0.2856, 0.3001) over their sum. The
    MATLAB collections call it "MS-SSIM"; `structure.ms_ssim` is Wang's. A scale whose value is
    not positive makes the product 0.

    Raises:
        ValueError: pictures of fewer than 41 pixels a side (11 at the third scale).

    Source: Ma, Zeng and Wang, Perceptual quality assessment for multi-exposure image fusion, 2015.
    """

    def value(a, b, f):
        check_size(f, 4 * (PATCH - 1) + 1, "MEF-SSIM's third scale")
        product = 1
        for scale, weight in enumerate(SCALE_WEIGHTS):
            if scale:
                a, b, f = (_halve(x) for x in (a, b, f))
            mean = _scale(a, b, f)
            power = mean.clamp(min=1e-12) ** (weight / sum(SCALE_WEIGHTS))
            product = product * torch.where(mean > 0, power, 0)
        return product

    return by_picture(value, a, b, fused)


def _scale(a: torch.Tensor, b: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    # The desired patch is a sum of the sources' patches with one factor each, so its moments
    # follow from the sources' and no patch is ever formed.
    factor_a, factor_b = _factors(a, b)
    moments = Moments(GAUSSIAN, a=a, b=b, f=f)
    covariance = factor_a * moments.covariance("a", "f") + factor_b * moments.covariance("b", "f")
    variance = (
        factor_a.square() * moments.variance["a"]
        + factor_b.square() * moments.variance["b"]
        + 2 * factor_a * factor_b * moments.covariance("a", "b")
    )
    similarity = (2 * covariance + C2) / (variance + moments.variance["f"] + C2)
    return similarity.mean((-2, -1))


@remembered
def _factors(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What to multiply the sources' mean-free patches by, to add up to the desired patch."""
    patches = Moments(tuple(box(PATCH)), a=a, b=b)
    var_a, var_b = (patches.variance[x].clamp(min=0) for x in "ab")
    covariance = patches.covariance("a", "b")
    norm_a, norm_b = root(var_a), root(var_b)
    norm_of_sum = root((var_a + var_b + 2 * covariance).clamp(min=0))
    consistency = (norm_of_sum + 1e-12) / (norm_a + norm_b + 1e-12)
    power = torch.tan(math.pi / 2 * consistency.clamp(0, 1)).clamp(max=LARGEST_POWER)
    norm_a, norm_b = norm_a + OFFSET, norm_b + OFFSET
    contrast = torch.maximum(norm_a, norm_b)
    smaller = (torch.minimum(norm_a, norm_b) / contrast) ** power  # the larger one's weight is 1
    weight_a = torch.where(norm_a >= norm_b, 1, smaller)
    weight_b = torch.where(norm_b >= norm_a, 1, smaller)
    total = 1 + smaller
    # Each source's share of the structure is a mean-free patch over its norm.
    share_a, share_b = weight_a / total / norm_a, weight_b / total / norm_b
    norm = share_a.square() * var_a + share_b.square() * var_b + 2 * share_a * share_b * covariance
    flat = norm <= 1e-14
    scale = torch.where(flat, 0, contrast / norm.clamp(min=1e-14).sqrt())
    return share_a * scale, share_b * scale


@remembered
def _halve(x: torch.Tensor) -> torch.Tensor:
    """Means of 2×2 pixels, every second one; the border is mirrored where the size is odd."""
    return separable(pad(x, (0, 1, 0, 1), "symmetric"), box(2))[..., ::2, ::2]
