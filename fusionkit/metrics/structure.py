"""Metrics that hold the fused picture's structure against the sources'. Larger is better."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fusionkit.metrics._common import correlation, gray_levels
from fusionkit.names import check_name

REDUCTIONS = ("mean", "sum")


def scd(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """SCD, the sum of the correlations of differences: r(f - b, a) + r(f - a, b), -2 to 2; (B,).

    NaN where a picture or a difference is constant.

    Source: Aslantas and Bendes, A new image quality metric for image fusion, 2015.
    """
    a, b, f = gray_levels(a, b, fused)
    return correlation(f - b, a) + correlation(f - a, b)


def ssim(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """SSIM of the fused picture with each source, data range 255; (B,).

    Gaussian window of 11 with σ 1.5, valid region, C1 = (0.01·255)², C2 = (0.03·255)².

    Args:
        reduction: "mean" over the sources (at most 1), as in ReFusion's and TDFusion's tables; or
            "sum" (at most 2), as in VIFB's MATLAB code.

    Raises:
        ValueError: pictures smaller than the window, or an unknown reduction.

    Source: Wang et al., Image quality assessment: from error visibility to structural similarity,
    2004.
    """
    check_name(reduction, REDUCTIONS, "reduction")
    a, b, f = gray_levels(a, b, fused)
    if min(f.shape[-2:]) < 11:
        raise ValueError(f"SSIM's window is 11 wide; got {f.shape[-2]}×{f.shape[-1]} pixels")
    total = _ssim(a, f) + _ssim(b, f)
    return total / 2 if reduction == "mean" else total


def _ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    position = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    window = torch.softmax(-position.square() / (2 * 1.5**2), dim=0)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    stack = torch.stack([x, y, x * x, y * y, x * y], dim=1)
    kernel = window.expand(5, 1, 11)
    blurred = F.conv2d(stack, kernel[:, :, None], groups=5)
    blurred = F.conv2d(blurred, kernel[:, :, :, None], groups=5)
    mean_x, mean_y, xx, yy, xy = blurred.unbind(1)
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    luminance = (2 * product + c1) / (squares + c1)
    contrast_structure = (2 * (xy - product) + c2) / (xx + yy - squares + c2)
    return (luminance * contrast_structure).mean((-2, -1))
