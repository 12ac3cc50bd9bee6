"""Metrics that hold the fused picture's structure against the sources'. Larger is better."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fusionkit.metrics._common import by_picture, correlation
from fusionkit.metrics._ssim import C1, C2, GAUSSIAN, REDUCTIONS, Moments, ssim_map, ssim_terms
from fusionkit.metrics.remember import remembered
from fusionkit.names import check_name

CONVENTIONS = ("standard", "ivif_zoo")
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def scd(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """SCD, the sum of the correlations of differences: r(f - b, a) + r(f - a, b), -2 to 2; (B,).

    NaN where a picture or a difference is constant.

    Source: Aslantas and Bendes, A new image quality metric for image fusion, 2015.
    """

    def value(a, b, f):
        return correlation(f - b, a) + correlation(f - a, b)

    return by_picture(value, a, b, fused)


def cc(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """CC: mean of the fused picture's correlations with the sources, -1 to 1; (B,).

    NaN where a picture is constant.

    Source: Ma et al., Infrared and visible image fusion methods and applications, 2019.
    """

    def value(a, b, f):
        return (correlation(a, f) + correlation(b, f)) / 2

    return by_picture(value, a, b, fused)


def ssim(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    reduction: str = "mean",
    convention: str = "standard",
) -> torch.Tensor:
    """SSIM of the fused picture with each source, data range 255; (B,).

    Gaussian window of 11 with σ 1.5, valid region, C1 = (0.01·255)², C2 = (0.03·255)².

    Args:
        reduction: "mean" over the sources (at most 1), as in ReFusion's and TDFusion's tables; or
            "sum" (at most 2), as in VIFB's MATLAB code.
        convention: "ivif_zoo" multiplies the gray levels by 255 once more, as that Python
            collection does, so that the constants all but vanish and flat regions' noise counts.

    Raises:
        ValueError: pictures smaller than the window, or an unknown option.

    Source: Wang et al., Image quality assessment: from error visibility to structural similarity,
    2004.
    """
    c1, c2 = _constants(convention)
    check_name(reduction, REDUCTIONS, "reduction")

    def value(a, b, f):
        if min(f.shape[-2:]) < 11:
            raise ValueError(f"SSIM's window is 11 wide; got {f.shape[-2]}×{f.shape[-1]} pixels")
        moments = Moments(GAUSSIAN, a=a, b=b, f=f)
        return sum(ssim_map(moments, x, "f", c1, c2).mean((-2, -1)) for x in "ab")

    total = by_picture(value, a, b, fused)
    return total / 2 if reduction == "mean" else total


def ms_ssim(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    reduction: str = "mean",
    convention: str = "standard",
) -> torch.Tensor:
    """MS-SSIM of the fused picture with each source, five scales, data range 255; (B,).

    SSIM's window and constants. A scale's contrast and structure, averaged over the picture,
    enters to the scale's power; where that mean is not positive, the value is 0. Luminance enters
    at the coarsest scale. Between scales, means of 2×2 pixels; an odd last line is left out.

    Args:
        reduction: "mean" over the sources (at most 1), or "sum" (at most 2).
        convention: "standard" or "ivif_zoo", as in `ssim`.

    Raises:
        ValueError: pictures of fewer than 176 pixels a side (11 at the fifth scale), or an
            unknown option.

    Source: Wang et al., Multiscale structural similarity for image quality assessment, 2003.
    """
    c1, c2 = _constants(convention)
    check_name(reduction, REDUCTIONS, "reduction")

    def value(a, b, f):
        if min(f.shape[-2:]) < 176:
            raise ValueError(
                f"MS-SSIM's five scales need 176×176 pixels; got {f.shape[-2]}×{f.shape[-1]}"
            )
        pictures = a, b, f
        products = [1, 1]
        for scale, weight in enumerate(SCALE_WEIGHTS):
            coarsest = scale == len(SCALE_WEIGHTS) - 1
            moments = Moments(GAUSSIAN, **dict(zip("abf", pictures, strict=True)))
            for i, x in enumerate("ab"):
                luminance, structure = ssim_terms(moments, x, "f", c1, c2)
                mean = (luminance * structure if coarsest else structure).mean((-2, -1))
                products[i] = products[i] * _positive_power(mean, weight)
            if not coarsest:
                pictures = [_halve(x) for x in pictures]
        return products[0] + products[1]

    total = by_picture(value, a, b, fused)
    return total / 2 if reduction == "mean" else total


@remembered
def _halve(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 2)


def _constants(convention: str) -> tuple[float, float]:
    check_name(convention, CONVENTIONS, "convention")
    scale = 255**2 if convention == "ivif_zoo" else 1
    return C1 / scale, C2 / scale


def _positive_power(x: torch.Tensor, exponent: float) -> torch.Tensor:
    """x to the exponent, 0 for x <= 0, without the power's infinite gradient at 0."""
    return torch.where(x > 0, x.clamp(min=1e-12) ** exponent, 0)
