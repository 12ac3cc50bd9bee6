"""Feature mutual information (FMI) of the fused picture with its sources. Larger is better.

Haghighat et al., A non-reference image fusion metric based on mutual information of image
features, 2011; in the window form of Haghighat and Razian, Fast-FMI, 2014. In every 3×3 window
of a feature picture, its values, shifted and scaled to sum to 1, are read as a distribution over
the nine places (column by column). Two such distributions, of a source and of the fused picture,
have many joint ones; the one taken mixes independence and perfect dependence so that its
correlation is that of the values (Nelsen, Discrete bivariate distributions with given marginals
and correlation, 1987). The metric is the mean over windows and sources of 2 I / (H + H), in [0, 1]
but for rounding and for mixtures which are no distributions, where the MATLAB code goes on, and so
do we.

Each function takes a, b and fused, (B, 1, H, W) in [0, 1] and at least 3×3, and gives (B,)
float64. Windows that are equal, or both constant, count 1; else one that is constant counts 0.
All refuse other shapes, NaN and values outside [0, 1] with a ValueError. They have no gradient.
Transposed pictures have slightly different values, as the places have an order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fusionkit.metrics._common import by_picture
from fusionkit.metrics._fmi_features import dct, edges, gradient, meyer_bands, pixels
from fusionkit.metrics.remember import remembered

WINDOW = 3
# Windows at a time, on a GPU and elsewhere: their distributions should fit a processor's cache, and
# keep a GPU busy.
CHUNK = {False: 2**14, True: 2**18}


def fmi_pixel(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """FMI of the gray levels themselves; (B,)."""
    return _fmi(a, b, fused, pixels)


def fmi_gradient(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """FMI of the gradient along the lines, central inside and one-sided at the border; (B,).

    The papers speak of the gradient's magnitude. The code that gave the published values keeps
    only the first result of MATLAB's `gradient`, the horizontal derivative with its sign.
    """
    return _fmi(a, b, fused, gradient)


def fmi_edge(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """FMI of thin Sobel edges, with the threshold of MATLAB's `edge` for each picture; (B,).

    The default feature of the code, and the highest values, as most windows have no edge.
    """
    return _fmi(a, b, fused, edges)


def fmi_dct(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """FMI of the discrete cosine transform of the whole picture; (B,)."""
    return _fmi(a, b, fused, dct)


def fmi_wavelet(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """FMI of one level of the discrete Meyer wavelet transform, four bands side by side; (B,)."""
    return _fmi(a, b, fused, meyer_bands)


@torch.no_grad()
def _fmi(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    feature: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    return by_picture(lambda *pictures: _mean_information(*pictures, feature), a, b, fused)


def _mean_information(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    feature: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    height, width = fused.shape[-2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"FMI's window is {WINDOW} wide; got {height}×{width} pixels")
    a, b, f = (_feature(x, feature) for x in (a, b, fused))
    batch, height, width = f.shape
    height, width = height - WINDOW + 1, width - WINDOW + 1
    total = f.new_zeros(batch, dtype=torch.float64)
    rows = max(1, CHUNK[f.is_cuda] // (batch * width))
    for top in range(0, height, rows):
        bottom = min(top + rows, height) + WINDOW - 1
        y = _windows(f, top, bottom)
        for source in (a, b):
            alike = source[:, top:bottom] == f[:, top:bottom]
            equal = _over_windows(torch.logical_and, alike).flatten()
            values = _window_information(_source_windows(source, top, bottom), y, equal)
            total += values.view(batch, -1).sum(1, dtype=total.dtype)
    return total / (2 * height * width)


@remembered
def _feature(x: torch.Tensor, feature: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    # Whole 1/1024ths of a level: sums are exact then, so that what is equal or constant in 8-bit
    # pictures is found so, in float32 too.
    return feature(x.mul(1024).round().div(1024))


class _Windows(NamedTuple):
    """Windows of one picture as distributions over the nine places; NaN for constant windows.

    In single precision, which is off by 1e-5 in a window and by 5e-7 in a picture's mean.
    """

    share: torch.Tensor  # (9, n), places columns first
    constant: torch.Tensor  # (n,), whether all nine values are equal
    power: torch.Tensor  # (n,), of the shares about their mean
    mean: torch.Tensor  # (n,), of the place
    spread: torch.Tensor  # (n,), variance of the place
    entropy: torch.Tensor  # (n,), in nats


def _windows(x: torch.Tensor, top: int, bottom: int) -> _Windows:
    """The windows within the lines `top` to `bottom` of (B, H, W)."""
    x = x[:, top:bottom]
    lowest = _over_windows(torch.minimum, x)
    height, width = lowest.shape[1:]
    p = lowest.new_empty((WINDOW, WINDOW, *lowest.shape), dtype=torch.float32)
    for j in range(WINDOW):
        for i in range(WINDOW):
            torch.sub(x[:, i : i + height, j : j + width], lowest, out=p[j, i])
    p = p.flatten(2).flatten(0, 1)  # (9, n)
    total = p.sum(0)
    p /= total
    place = _places(p)
    mean = (place * p).sum(0)
    spread = ((place - mean).square_().mul_(p)).sum(0)
    power = p.square().sum(0) - 1 / len(p)
    return _Windows(p, total == 0, power, mean, spread, -_x_log_x(p).sum(0))


_source_windows = remembered(_windows, bulky=True)  # of several fused pictures


def _over_windows(operation: Callable, x: torch.Tensor) -> torch.Tensor:
    """An operation of two tensors over all windows, (B, H, W) -> (B, H - 2, W - 2)."""
    x = operation(operation(x[:, :-2], x[:, 1:-1]), x[:, 2:])
    return operation(operation(x[..., :-2], x[..., 1:-1]), x[..., 2:])


def _window_information(x: _Windows, y: _Windows, equal: torch.Tensor) -> torch.Tensor:
    """2 I / (H + H) of pairs of windows, (n,), some of which are `equal`."""
    values = (equal | (x.constant & y.constant)).to(x.share.dtype)
    other = ~(equal | x.constant | y.constant)
    if 2 * other.sum() > len(other):
        return torch.where(other, _nelsen_information(x, y), values)
    x, y = (_Windows(*(part[..., other] for part in z)) for z in (x, y))
    values[other] = _nelsen_information(x, y)
    return values


def _nelsen_information(x: _Windows, y: _Windows) -> torch.Tensor:
    p, last = x.share, len(x.share) - 1
    covariance = (p * y.share).sum(0) - 1 / len(p)
    # Perfect negative dependence is perfect positive dependence on the places in reverse.
    negative = covariance < 0
    q = torch.where(negative, y.share.flip(0), y.share)
    mean_q = torch.where(negative, last - y.mean, y.mean)

    # Perfect dependence fills 17 of the 81 cells, a staircase: each up to where one of the
    # cumulative sums ends, p's at row i or q's at column j.
    below_p, below_q = (torch.cat([torch.zeros_like(z[:1]), z.cumsum(0)]) for z in (p, q))
    reached = (below_p[1:, None] <= below_q[1:]).view(torch.uint8)
    row, column = _count(reached.unbind(0)), len(p) - _count(reached.unbind(1))
    steps = (
        (p, below_p, x.mean, q, below_q, mean_q, column),
        (q, below_q, mean_q, p, below_p, x.mean, row),
    )
    place, largest, cells = _places(p), 0, []
    for z, below, mean, other, below_other, mean_other, index in steps:
        at = index.long()
        filled = torch.maximum(below[:-1], below_other.gather(0, at)).neg_().add_(below[1:])
        at.clamp_(max=last)  # the sums of all nine may differ by rounding
        cells.append((filled, other.gather(0, at).mul_(z)))
        # Adds up to the covariance of the places under perfect dependence.
        covered = (at - mean_other).mul_(place - mean).mul_(filled)
        largest = largest + covered.sum(0)
    share = covariance.abs() * (x.spread * y.spread / (x.power * y.power)).sqrt() / largest
    share = share.nan_to_num_(0, 0, 0)  # one place holds all: nothing depends on anything

    # The other cells are (1 - share) p q, of which all 81 add up to the first line.
    entropies = x.entropy + y.entropy
    rest = 1 - share
    information = entropies + _x_log_x(rest) - rest * entropies
    for filled, independent in cells:
        independent *= rest
        changed = _x_log_x(filled.mul_(share).add_(independent)).sub_(_x_log_x(independent))
        information += changed.sum(0)
    return (2 * information / entropies).nan_to_num_(0)


def _places(p: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(p), dtype=p.dtype, device=p.device)[:, None]


def _count(flags: Sequence[torch.Tensor]) -> torch.Tensor:
    """How many of some (9, n) of 0 and 1 are 1."""
    total = flags[0] + flags[1]
    for flag in flags[2:]:
        total += flag
    return total


def _x_log_x(x: torch.Tensor) -> torch.Tensor:
    """x log |x|, 0 for 0.

    A share above 1 makes some of the joint negative; MATLAB's code takes the real part of the
    complex logarithm then.
    """
    return x.abs().clamp_(min=1e-37).log_().mul_(x)
