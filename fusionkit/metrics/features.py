"""Metrics of the fused picture's own contrast and detail. Larger is better in all of them."""

from __future__ import annotations

import torch

from fusionkit.metrics._common import gray_levels


def standard_deviation(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """SD: population standard deviation of the fused picture, in gray levels (0 to 127.5); (B,).

    The sources do not enter.
    """
    *_, f = gray_levels(a, b, fused)
    return f.std((-2, -1), correction=0)


def spatial_frequency(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """SF: root of the summed squared first differences over the number of pixels; (B,).

    In gray levels. The sum of rows and columns is divided by all pixels, as in VIFB's MATLAB code;
    dividing each by its number of differences, as others do, gives up to 0.2 % more.

    Source: Eskicioglu and Fisher, Image quality measures and their performance, 1995.
    """
    *_, f = gray_levels(a, b, fused)
    rows = f.diff(dim=-1).square().sum((-2, -1))
    columns = f.diff(dim=-2).square().sum((-2, -1))
    return ((rows + columns) / f[0].numel()).sqrt()


def average_gradient(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """AG: mean of sqrt((g_x² + g_y²) / 2), in gray levels a pixel; (B,).

    Central differences inside and one-sided ones at the border; the sum is divided by
    (H - 1)(W - 1), as the MATLAB code does.

    Source: Cui et al., Detail preserved fusion of visible and infrared images, 2015.
    """
    *_, f = gray_levels(a, b, fused)
    gy, gx = torch.gradient(f, dim=(-2, -1))
    magnitude = ((gx.square() + gy.square()) / 2).sqrt()
    return magnitude.sum((-2, -1)) / ((f.shape[-2] - 1) * (f.shape[-1] - 1))
