"""Metrics of the fused picture's own contrast and detail. Larger is better in all of them."""

from __future__ import annotations

import torch

from fusionkit.metrics._common import by_picture
from fusionkit.metrics._filters import pad
from fusionkit.metrics._sobel import magnitude, root, sobel
from fusionkit.names import check_name

DIVISORS = ("pixels", "differences")


def standard_deviation(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """SD: population standard deviation of the fused picture, in gray levels (0 to 127.5); (B,).

    The sources do not enter.

    Source: Zhang et al., VIFB: a visible and infrared image fusion benchmark, 2020.
    """
    return by_picture(lambda a, b, f: f.std((-2, -1), correction=0), a, b, fused)


def spatial_frequency(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, divide_by: str = "pixels"
) -> torch.Tensor:
    """SF: root of the mean squared first differences of rows and of columns, in gray levels; (B,).

    Args:
        divide_by: "pixels" divides both sums by the number of pixels, as VIFB's MATLAB code does;
            "differences" each by its own number, as others do: up to 0.2 % more.

    Raises:
        ValueError: unknown `divide_by`, or with "differences" pictures smaller than 2×2.

    Source: Eskicioglu and Fisher, Image quality measures and their performance, 1995.
    """
    check_name(divide_by, DIVISORS, "divide_by")

    def value(a, b, f):
        if divide_by == "pixels":
            rows, columns = (f.diff(dim=d).square().sum((-2, -1)) / f[0].numel() for d in (-1, -2))
        else:
            _check_size(f, "spatial frequency by differences")
            rows, columns = (f.diff(dim=d).square().mean((-2, -1)) for d in (-1, -2))
        return (rows + columns).sqrt()

    return by_picture(value, a, b, fused)


def average_gradient(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, divide_by: str = "differences"
) -> torch.Tensor:
    """AG: mean of sqrt((g_x² + g_y²) / 2), in gray levels a pixel; (B,).

    Central differences inside and one-sided ones at the border.

    Args:
        divide_by: "differences" divides the sum by (H - 1)(W - 1), as the MATLAB code does;
            "pixels" by H·W, which is about 0.5 % less at 300×500.

    Raises:
        ValueError: unknown `divide_by`, or pictures smaller than 2×2.

    Source: Cui et al., Detail preserved fusion of visible and infrared images, 2015.
    """
    check_name(divide_by, DIVISORS, "divide_by")

    def value(a, b, f):
        _check_size(f, "average gradient")
        gy, gx = torch.gradient(f, dim=(-2, -1))
        strength = root((gx.square() + gy.square()) / 2)
        if divide_by == "pixels":
            return strength.mean((-2, -1))
        return strength.sum((-2, -1)) / ((f.shape[-2] - 1) * (f.shape[-1] - 1))

    return by_picture(value, a, b, fused)


def edge_intensity(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """EI: mean of the Sobel gradient's magnitude, in gray levels times 8 a pixel; (B,).

    Kernel weights 1 2 1, not normalised, hence the 8; the border is repeated outwards.
    Differentiable, with gradient 0 from flat places.

    Source: Xydeas and Petrovic, Objective image fusion performance measure, 2000, which has the
    gradient; VIFB's MATLAB code, which has the mean.
    """

    def value(a, b, f):
        return magnitude(*sobel(pad(f, 1, "replicate"))).mean((-2, -1))

    return by_picture(value, a, b, fused)


def _check_size(f: torch.Tensor, name: str) -> None:
    if min(f.shape[-2:]) < 2:
        raise ValueError(f"{name} needs 2×2 pixels at least; got {f.shape[-2]}×{f.shape[-1]}")
