"""Metrics on a multi-scale transform of the pictures. Larger is better."""

from __future__ import annotations

import torch

from fusionkit.metrics._common import by_picture
from fusionkit.metrics._filters import gaussian, pad, separable
from fusionkit.metrics._phase_congruency import phase_congruency
from fusionkit.metrics.remember import remembered

LEVEL_EXPONENTS = (2 / 3, 1 / 3)  # of the fine and the coarse level, as the collection has them

WINDOW = tuple(gaussian(11, 1.5))
FEATURE = 0.1  # phase congruency from which a pixel of a source counts
STABLE = 1e-4  # added to covariance and to the product of the deviations


def qp(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Q_P: how well the fused picture keeps the sources' features by phase congruency; (B,).

    The product of three means, one each for the phase congruency and its maximum and minimum
    moment: of the largest correlation of the fused picture's map with a's, with b's and with that
    of both, where each pixel has the map of the source with the larger congruency. Correlations
    are taken in Gaussian windows (11, σ 1.5; zeros beyond the border). A source's maps are 0, and
    its correlations count as 0, where its congruency is not above 0.1; the means are over the
    other pixels of the two sources. The fused picture's maps are whole, so that identical pictures
    have a little less than 1. NaN where neither source has such a pixel, and 1 for a constant
    fused picture, whose correlations are the constant 1e-4 over itself. It has no gradient, since
    the phase has none where there is no response: no loss.

    The paper leaves windows, constants and filters open; these were found by search against seven
    values of the MATLAB collection of Liu et al. 2012. On its 16 pictures the value differs by
    5e-4 at most.

    Raises:
        ValueError: pictures smaller than 11×11.

    Source: Zhao, Laganière and Liu, Performance assessment of combinative pixel-level image fusion
    based on an absolute feature measurement, 2007.
    """
    return by_picture(_qp, a, b, fused)


def qm(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Q_M: detail of the sources preserved in two levels of Haar wavelets, 0 to 3; (B,).

    At each place of a level, exp(-|difference to the source|) is summed over the three detail
    bands of the orthonormal transform of gray levels, and averaged with the sources' energies
    there as weights; the levels' values are multiplied, with exponents 2/3 and 1/3. 3 for
    identical pictures, and far less for a difference of a few gray levels. NaN where both sources
    have no detail at a level. Odd rows and columns at the end of a level do not count.

    Raises:
        ValueError: pictures smaller than 4×4.

    Source: P.-W. Wang and B. Liu, A novel image fusion metric based on multi-scale analysis, 2008,
    as in the MATLAB collection of Liu et al. 2012 (where the bands are summed, not averaged).
    """
    return by_picture(_qm, a, b, fused)


@torch.no_grad()
def _qp(a: torch.Tensor, b: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    height, width = f.shape[-2:]
    if min(height, width) < len(WINDOW):
        raise ValueError(f"Q_P's window is {len(WINDOW)} wide; got {height}×{width} pixels")
    a_maps, b_maps, f_maps = map(phase_congruency, (a, b, f))
    in_a, in_b = a_maps.congruency > FEATURE, b_maps.congruency > FEATURE
    in_either = in_a | in_b
    from_a = a_maps.congruency > b_maps.congruency
    product = 1
    for a_map, b_map, f_map in zip(a_maps, b_maps, f_maps, strict=True):
        both = torch.where(from_a, a_map, b_map)
        sources = (a_map, in_a), (b_map, in_b), (both, in_either)
        moments = _moments(f_map)
        kept = [_correlation(x * mask, f_map, moments) * mask for x, mask in sources]
        largest = torch.stack(kept).amax(0)
        product = product * largest.sum((-2, -1)) / in_either.sum((-2, -1))
    return product


def _window_mean(x: torch.Tensor) -> torch.Tensor:
    return separable(pad(x, len(WINDOW) // 2, "zeros"), WINDOW)


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance in the windows."""
    mean = _window_mean(x)
    return mean, _window_mean(x.square()) - mean.square()


def _correlation(
    x: torch.Tensor, y: torch.Tensor, y_moments: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Local correlation of (B, H, W) and (B, H, W), whose moments are known."""
    (mean_x, variance_x), (mean_y, variance_y) = _moments(x), y_moments
    covariance = _window_mean(x * y) - mean_x * mean_y
    return (covariance + STABLE) / ((variance_x * variance_y).abs().sqrt() + STABLE)


def _qm(a: torch.Tensor, b: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    if min(f.shape[-2:]) < 4:
        raise ValueError(f"Q_M needs 4×4 pixels at least; got {f.shape[-2]}×{f.shape[-1]}")
    product = 1
    for exponent in LEVEL_EXPONENTS:
        (a, a_details), (b, b_details), (f, f_details) = (_haar(x) for x in (a, b, f))
        kept = total = 0
        for details in (a_details, b_details):
            energy = details.square().sum(0)
            kept = kept + (torch.exp(-(details - f_details).abs()).sum(0) * energy).sum((-2, -1))
            total = total + energy.sum((-2, -1))
        product = product * (kept / total) ** exponent
    return product


@remembered
def _haar(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One orthonormal level: (B, H, W) -> (B, H/2, W/2) and details (3, B, H/2, W/2)."""
    height, width = (size // 2 * 2 for size in x.shape[-2:])
    top, bottom = x[..., 0:height:2, :width] / 2, x[..., 1:height:2, :width] / 2
    mean, slope = top + bottom, top - bottom
    low, rows = mean[..., 0::2] + mean[..., 1::2], slope[..., 0::2] + slope[..., 1::2]
    columns, diagonal = mean[..., 0::2] - mean[..., 1::2], slope[..., 0::2] - slope[..., 1::2]
    return low, torch.stack([columns, rows, diagonal])
