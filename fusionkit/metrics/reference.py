"""Pixel-wise errors against the sources, and measures of a fused picture against a ground truth.

Multi-focus and multi-exposure pairs that are made from photographs have a ground truth.
"""

from __future__ import annotations

import torch

from fusionkit.metrics._common import by_picture
from fusionkit.metrics._ssim import GAUSSIAN, Moments, check_size, ssim_map
from fusionkit.names import check_name

RMSE_CONVENTIONS = ("vifb", "plain")
PSNR_CONVENTIONS = (*RMSE_CONVENTIONS, "linfengtang")


def rmse(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, convention: str = "vifb"
) -> torch.Tensor:
    """Error of the fused picture against each source, mean over the two; (B,). Smaller is better.

    A picture between two sources that differ has a large error however well it is fused.

    Args:
        convention: "vifb" is sqrt(Σ d²) / (H·W), as VIFB's and MEFB's MATLAB code, which falls
            with the picture's size; "plain" the root of the mean squared difference, in gray
            levels.

    Raises:
        ValueError: unknown convention.

    Source: Zhang et al., VIFB: a visible and infrared image fusion benchmark, 2020.
    """
    check_name(convention, RMSE_CONVENTIONS, "convention")
    errors = by_picture(lambda a, b, f: (_rmse(a, f) + _rmse(b, f)) / 2, a, b, fused)
    if convention == "plain":
        return errors
    return errors / (fused.shape[-2] * fused.shape[-1]) ** 0.5


def psnr(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, convention: str = "vifb"
) -> torch.Tensor:
    """PSNR of the fused picture against the sources, in dB; (B,). Infinite where all three agree.

    Args:
        convention: "vifb" is 10 log10(255² / e) with `rmse`'s "vifb" value in the place of the
            mean square, as VIFB's and MEFB's MATLAB code (near 57); "plain" the mean over the
            sources of the ordinary PSNR; "linfengtang" has the sources' mean squared error on the
            scale 0 to 1 under the peak 255, as that MATLAB collection (near 62: about 48 too much).

    Raises:
        ValueError: unknown convention.

    Source: Zhang et al., VIFB: a visible and infrared image fusion benchmark, 2020.
    """
    check_name(convention, PSNR_CONVENTIONS, "convention")
    if convention == "vifb":
        return _decibels(rmse(a, b, fused))

    def value(a, b, f):
        squares = [_mean_square(x, f) for x in (a, b)]
        if convention == "plain":
            return (_decibels(squares[0]) + _decibels(squares[1])) / 2
        return _decibels((squares[0] + squares[1]) / 2 / 255**2)

    return by_picture(value, a, b, fused)


def reference_rmse(fused: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Root of the mean squared difference to the ground truth, in gray levels; (B,)."""
    return by_picture(_rmse, fused, truth)


def reference_psnr(fused: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """PSNR against the ground truth for the peak 255, in dB; (B,). Infinite where they agree."""
    return by_picture(lambda f, t: _decibels(_mean_square(f, t)), fused, truth)


def reference_ssim(fused: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """SSIM with the ground truth, with the window and constants of `structure.ssim`; (B,).

    Raises:
        ValueError: pictures smaller than 11×11.
    """

    def value(f, t):
        check_size(f, 11, "SSIM")
        return ssim_map(Moments(GAUSSIAN, f=f, t=t), "f", "t").mean((-2, -1))

    return by_picture(value, fused, truth)


def _rmse(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _mean_square(x, y).sqrt()


def _mean_square(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).square().mean((-2, -1))


def _decibels(mean_square: torch.Tensor) -> torch.Tensor:
    return 10 * torch.log10(255**2 / mean_square)
