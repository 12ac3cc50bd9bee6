"""Visual information fidelity of the fused picture to its sources. Larger is better."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F

from fusionkit.metrics._common import by_picture
from fusionkit.metrics._filters import gaussian, separable
from fusionkit.metrics.remember import remembered
from fusionkit.names import check_name

REDUCTIONS = ("sum", "mean")

WINDOWS = tuple(tuple(gaussian(size, size / 5)) for size in (17, 9, 5, 3))
SMALLEST = 41  # leaves one whole window at the fourth scale
EPSILON = 1e-10  # variances below are flat; also the least variance of the distortion

VIFF_WEIGHTS = (1 / 2.15, 0.0, 0.15 / 2.15, 1 / 2.15)
VIFF_NOISE = 0.005 * 255**2
VIFF_CONSTANT = 1e-7


def vif(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    reduction: str = "sum",
    data_range: float = 255,
) -> torch.Tensor:
    """VIF in the pixel domain (VIF-P) of the fused picture with each source, four scales; (B,).

    The information about a source that passes a channel with gain and noise, over all that it
    has: 0 for nothing, 1 for the source itself, more than 1 for the source with more contrast.
    NaN where a source is constant, since it has none. Differentiable with respect to the pictures.

    Not to be mixed with the VIF of the wavelet domain (Sheikh and Bovik's `vifvec`) or with
    `viff`, which many tables also call VIF.

    Args:
        reduction: "sum" over the sources (2 for identical pictures), as in the MATLAB collections
            that call `vifp_mscale` for each source; or "mean".
        data_range: the range of gray levels on which the eye's noise has variance 2. 255 is the
            definition's; 1 is what code gives that feeds pictures in [0, 1] to it: 0.85 to 11
            times as much on common pairs, mostly about twice.

    Raises:
        ValueError: pictures smaller than 41 pixels, an unknown reduction, or a data range which is
            not positive.

    Source: Sheikh and Bovik, Image information and visual quality, 2006, in the multi-scale pixel
    form that its authors released (`vifp_mscale`).
    """
    check_name(reduction, REDUCTIONS, "reduction")
    if not data_range > 0:
        raise ValueError(f"data_range {data_range}; expected a positive number, such as 255")
    total = by_picture(partial(_vif, noise=2 * (255 / data_range) ** 2), a, b, fused)
    return total / 2 if reduction == "mean" else total


def viff(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """VIFF, visual information fidelity for fusion, on 8-bit gray levels; (B,).

    At each pixel and scale, the source that the fused picture amplifies less is held against it;
    the ratios of the four scales are added with weights 1, 0, 0.15 and 1, over 2.15. It is 1 for
    identical pictures, constant ones among them, and nearly 0 for a constant fused picture. Where
    both gains are equal (both 0, mostly) `b` is taken: exchanging the sources changes the value,
    by 0.04 % at most on common pairs.

    Raises:
        ValueError: pictures smaller than 41 pixels.

    Source: Han, Cai, Cao and Xu, A new image fusion performance metric based on visual information
    fidelity, 2013; noise variance and weights as in its authors' code, `VIFF_Public`.
    """
    return by_picture(_viff, a, b, fused)


def _vif(a: torch.Tensor, b: torch.Tensor, f: torch.Tensor, noise: float) -> torch.Tensor:
    passed, present = 0, 0
    for taps, images in _scales(a, b, f):
        _, numerator, denominator = _information(taps, *images, noise)
        passed = passed + numerator.sum((-2, -1))
        present = present + denominator.sum((-2, -1))
    return (passed / present).sum(0)


def _viff(a: torch.Tensor, b: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    total = 0
    scales = _scales(*(_rounded(x) for x in (a, b, f)))
    for weight, (taps, images) in zip(VIFF_WEIGHTS, scales, strict=True):
        if not weight:
            continue
        gain, *maps = _information(taps, *images, VIFF_NOISE)
        first = gain[0] < gain[1]
        passed, present = (
            (torch.where(first, x[0], x[1]) + VIFF_CONSTANT).sum((-2, -1)) for x in maps
        )
        total = total + weight * passed / present
    return total


def _scales(
    *images: torch.Tensor,
) -> Iterator[tuple[tuple[float, ...], list[torch.Tensor]]]:
    """Each scale's window and its pictures, blurred by that window and halved after the first."""
    height, width = images[0].shape[-2:]
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"four scales need pictures of {SMALLEST}×{SMALLEST} pixels; got {height}×{width}"
        )
    images = [_centred(x) for x in images]
    for taps in WINDOWS:
        if taps != WINDOWS[0]:
            images = [_smaller(x, taps) for x in images]
        yield taps, images


@remembered
def _rounded(x: torch.Tensor) -> torch.Tensor:
    return x.round()


@remembered
def _centred(x: torch.Tensor) -> torch.Tensor:
    # Covariances do not change, and lose fewer digits about the mean.
    return x - x.detach().mean((-2, -1), keepdim=True)


@remembered
def _smaller(x: torch.Tensor, taps: tuple[float, ...]) -> torch.Tensor:
    return separable(x, taps)[..., ::2, ::2].contiguous()


def _information(
    taps: tuple[float, ...], a: torch.Tensor, b: torch.Tensor, f: torch.Tensor, noise: float
) -> list[torch.Tensor]:
    """At each window and for both sources: gain, information passed, information present.

    Each (2, B, h, w). The model of a window is fused = gain · source + distortion.
    """
    mean_f, variance_f = _moments(f, taps)
    maps = []
    for x in (a, b):
        mean, variance = _moments(x, taps)
        covariance = separable(x * f, taps) - mean * mean_f
        uneven = (variance > 0) & (variance_f > 0)
        gain = torch.where(uneven, covariance / (variance + EPSILON), 0).clamp_min(0)
        distortion = (variance_f - gain * covariance).clamp_min(EPSILON)
        passed = (1 + gain.square() * variance / (distortion + noise)).log10()
        maps.append((gain, passed, (1 + variance / noise).log10()))
    return [torch.stack(pair) for pair in zip(*maps, strict=True)]


@remembered
def _moments(x: torch.Tensor, taps: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance in the windows."""
    mean = separable(x, taps)
    return mean, F.threshold(separable(x * x, taps) - mean * mean, EPSILON, 0)
