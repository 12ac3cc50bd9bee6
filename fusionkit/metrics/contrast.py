"""Metrics that look at contrast as the eye does, through a contrast sensitivity function (CSF).

Both follow the MATLAB collection of Liu et al. (Objective assessment of multiresolution image
fusion algorithms for context enhancement in night vision, 2012), which takes 8-bit pictures and
stretches each to its own 0 to 255 first, rounded again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn import functional as F

from fusionkit.metrics._common import by_picture
from fusionkit.metrics._filters import pad, separable
from fusionkit.metrics.remember import remembered

BLOCK = 16
TINY = 1e-300  # makes 0 / 0 of two equal contrasts 1


def qcb(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Q_CB: how much of the sources' local contrast the fused picture preserves, 0 to 1; (B,).

    Larger is better. 1 for identical pictures; NaN where a picture is constant, which has no range
    to be stretched and no contrast. Pictures of any size.

    Raises:
        ValueError: pictures that are not gray, of one size and in [0, 1].

    Source: Chen and Blum, A new automated quality assessment algorithm for image fusion, 2009,
    with the difference-of-Gaussians CSF.
    """
    return by_picture(_qcb, a, b, fused)


def qcv(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Q_CV: squared difference to the sources as the eye sees it, in squared gray levels; (B,).

    Smaller is better: 0 for identical pictures, hundreds for usual ones. The difference to each
    source is filtered by the CSF and averaged over 16×16 blocks with the source's saliency (sum of
    the Sobel magnitude's fifth power) as weights. A constant source has no saliency and does not
    count; NaN where both are constant. Pictures of any size: blocks at the right and at the bottom
    are filled with zeros.

    Raises:
        ValueError: pictures that are not gray, of one size and in [0, 1].

    Source: Chen and Varshney, A human perception inspired quality metric for image fusion based on
    regional information, 2007, with Mannos and Sakrison's CSF (0.144 in place of their 0.114, as
    in the collection).
    """
    return by_picture(_qcv, a, b, fused)


def _qcb(a: torch.Tensor, b: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    a, b, f = (_masked_contrast(x) for x in (a, b, f))
    weight = a.square() / (a.square() + b.square()).clamp_min(TINY)
    preserved_a, preserved_b = (
        (torch.minimum(x, f) + TINY) / (torch.maximum(x, f) + TINY) for x in (a, b)
    )
    return torch.lerp(preserved_b, preserved_a, weight).mean((-2, -1))


def _qcv(a: torch.Tensor, b: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    a, b, f = (_stretched(x) for x in (a, b, f))
    weighted, weights = 0, 0
    for x in (a, b):
        saliency = _saliency(x)
        difference = _block_means(_seen(x - f, _mannos_sakrison).square())
        weighted = weighted + (saliency * difference).sum((-2, -1))
        weights = weights + saliency.sum((-2, -1))
    return weighted / weights


@remembered
def _stretched(levels: torch.Tensor) -> torch.Tensor:
    """Whole levels, stretched to 0 to 255 and rounded half up; a constant picture becomes 0."""
    levels = levels.round()
    low, high = levels.amin((-2, -1), keepdim=True), levels.amax((-2, -1), keepdim=True)
    return ((levels - low) / (high - low).clamp_min(1) * 255 + 0.5).floor()


def _seen(x: torch.Tensor, csf: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(B, H, W) filtered by a CSF over the periodic picture."""
    height, width = x.shape[-2:]
    sensitivity = _sensitivity(csf, height, width, x.device)
    return torch.fft.irfft2(torch.fft.rfft2(x) * sensitivity, s=(height, width))


@lru_cache(maxsize=8)
def _sensitivity(
    csf: Callable[[torch.Tensor], torch.Tensor], height: int, width: int, device: torch.device
) -> torch.Tensor:
    """A CSF on the frequencies of `rfft2`, (height, width // 2 + 1)."""
    with torch.inference_mode(False):  # it is kept, and what comes later may need gradients
        y, x = (
            frequencies(size, 1 / size, dtype=torch.float64, device=device)
            for frequencies, size in ((torch.fft.fftfreq, height), (torch.fft.rfftfreq, width))
        )
        return csf(torch.hypot(y[:, None], x))


def _difference_of_gaussians(cycles: torch.Tensor) -> torch.Tensor:
    """Chen and Blum's choice of CSF, as if the picture spanned 15 degrees; `cycles` a picture."""
    r = cycles / 15
    return torch.exp(-((r / 15.387) ** 2)) - 0.7622 * torch.exp(-((r / 1.3456) ** 2))


def _mannos_sakrison(cycles: torch.Tensor) -> torch.Tensor:
    """Chen and Varshney's CSF, as if the picture spanned 4 degrees; `cycles` a picture."""
    r = 0.144 * cycles / 4
    return 2.6 * (0.0192 + r) * torch.exp(-(r**1.1))


@remembered
def _masked_contrast(x: torch.Tensor) -> torch.Tensor:
    """Peli's contrast by Gaussians of σ 2 and 4, after masking with k = h = 1, p = 3, q = 2."""
    x = pad(_seen(_stretched(x), _difference_of_gaussians), 15, "zeros")
    contrast = (separable(x, _density(2)) / separable(x, _density(4)) - 1).abs()
    square = contrast.square()
    return contrast * square / (square + 1e-4)


def _density(sigma: float) -> list[float]:
    """31 samples of the normal density; not quite of sum 1, and the contrast depends on it."""
    scale = sigma * math.sqrt(2 * math.pi)
    return [math.exp(-(t**2) / (2 * sigma**2)) / scale for t in range(-15, 16)]


@remembered
def _saliency(x: torch.Tensor) -> torch.Tensor:
    """Of each block, by the fifth power of the Sobel magnitude."""
    x = pad(x, 1, "zeros")
    smooth, difference = (1, 2, 1), (-1, 0, 1)
    square = separable(x, difference, smooth).square() + separable(x, smooth, difference).square()
    return _block_means(square.square() * square.sqrt())


def _block_means(x: torch.Tensor) -> torch.Tensor:
    height, width = x.shape[-2:]
    return F.avg_pool2d(F.pad(x, (0, -width % BLOCK, 0, -height % BLOCK)), BLOCK)
