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
All refuse other shapes, NaN and values outside [0, 1] with a ValueError. There is no useful
gradient. Transposed pictures have slightly different values, as the places have an order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, cached_property
from typing import NamedTuple

import torch

from fusionkit.metrics._common import by_picture
from fusionkit.metrics._filters import pad, separable
from fusionkit.metrics.remember import remembered

WINDOW = 3
# Windows at a time, on a GPU and elsewhere: their 9×9 joint distributions should fit a processor's
# cache, and keep a GPU busy.
CHUNK = {False: 2**11, True: 2**18}


def fmi_pixel(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """FMI of the gray levels themselves; (B,)."""
    return _fmi(a, b, fused, _pixels)


def fmi_gradient(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """FMI of the gradient along the lines, central inside and one-sided at the border; (B,).

    The papers speak of the gradient's magnitude. The code that gave the published values keeps
    only the first result of MATLAB's `gradient`, the horizontal derivative with its sign.
    """
    return _fmi(a, b, fused, _gradient)


def fmi_edge(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """FMI of thin Sobel edges, with the threshold of MATLAB's `edge` for each picture; (B,).

    The default feature of the code, and the highest values, as most windows have no edge.
    """
    return _fmi(a, b, fused, _edges)


def fmi_dct(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """FMI of the discrete cosine transform of the whole picture; (B,)."""
    return _fmi(a, b, fused, _dct)


def fmi_wavelet(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """FMI of one level of the discrete Meyer wavelet transform, four bands side by side; (B,)."""
    return _fmi(a, b, fused, _meyer_bands)


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
    total = f.new_zeros(batch)
    rows = max(1, CHUNK[f.is_cuda] // (batch * width))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        y = _Windows(f, top, bottom)
        for source in (a, b):
            values = _window_information(_Windows(source, top, bottom), y)
            total += values.view(batch, -1).sum(1, dtype=total.dtype)
    return total / (2 * height * width)


@remembered
def _feature(x: torch.Tensor, feature: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    # Whole 1/1024ths of a level: sums are exact then, so that what is equal or constant in 8-bit
    # pictures is found so, in float32 too.
    return feature(x.mul(1024).round().div(1024))


class _Shares(NamedTuple):
    """Windows of one picture as distributions over the nine places.

    In single precision, which is off by 4e-6 in a window and by 1e-7 in a picture's mean.
    """

    share: torch.Tensor  # (9, n)
    below: torch.Tensor  # (9, n), the cumulative sum
    power: torch.Tensor  # (n,), of the shares about their mean
    spread: torch.Tensor  # (n,), variance of the place
    entropy: torch.Tensor  # (n,), in nats


class _Windows:
    """The windows of (B, H, W) whose first lines are `top` to `bottom`, places columns first."""

    def __init__(self, x: torch.Tensor, top: int, bottom: int):
        width = x.shape[-1] - WINDOW + 1
        shifts = [(i, j) for j in range(WINDOW) for i in range(WINDOW)]
        views = [x[:, top + i : bottom + i, j : j + width] for i, j in shifts]
        self.values = torch.stack(views).flatten(1)  # (9, n)
        self.shifted = (self.values - self.values.amin(0)).float()
        self.total = self.shifted.sum(0)

    @cached_property
    def shares(self) -> _Shares:
        return _shares(self.shifted, self.total)

    def some_shares(self, chosen: torch.Tensor) -> _Shares:
        return _shares(self.shifted[:, chosen], self.total[chosen])


def _shares(shifted: torch.Tensor, total: torch.Tensor) -> _Shares:
    p = shifted / total
    place = torch.arange(len(p), dtype=p.dtype, device=p.device)[:, None]
    spread = ((place - (place * p).sum(0)).square() * p).sum(0)
    power = p.square().sum(0) - 1 / len(p)
    return _Shares(p, p.cumsum(0), power, spread, -_x_log_x(p).sum(0))


def _window_information(x: _Windows, y: _Windows) -> torch.Tensor:
    """2 I / (H + H) of pairs of windows, (n,)."""
    equal = (x.values - y.values).abs_().sum(0) == 0
    constant_x, constant_y = x.total == 0, y.total == 0
    values = (equal | (constant_x & constant_y)).to(x.total.dtype)
    other = ~(equal | constant_x | constant_y)
    if 2 * other.sum() > len(other):
        return torch.where(other, _nelsen_information(x.shares, y.shares), values)
    values[other] = _nelsen_information(x.some_shares(other), y.some_shares(other))
    return values


def _nelsen_information(x: _Shares, y: _Shares) -> torch.Tensor:
    p, below_p = x.share, x.below
    covariance = (p * y.share).sum(0) - 1 / len(p)
    # Perfect negative dependence is perfect positive dependence on the places in reverse.
    q = torch.where(covariance < 0, y.share.flip(0), y.share)
    below_q = q.cumsum(0)

    joint = torch.minimum(below_p[:, None], below_q)
    # Hoeffding's formula for the covariance of the places under perfect dependence.
    largest = torch.addcmul(joint, below_p[:, None], below_q, value=-1).flatten(0, 1).sum(0)
    share = covariance.abs() * (x.spread * y.spread / (x.power * y.power)).sqrt() / largest
    share = share.nan_to_num_(0, 0, 0)  # one place holds all: nothing depends on anything

    joint.sub_(torch.maximum((below_p - p)[:, None], below_q - q)).clamp_(min=0)
    joint.mul_(share).addcmul_(p[:, None], q * (1 - share))
    entropies = x.entropy + y.entropy
    information = entropies + _x_log_x(joint).flatten(0, 1).sum(0)
    return (2 * information / entropies).nan_to_num_(0)


def _x_log_x(x: torch.Tensor) -> torch.Tensor:
    """x log |x|, 0 for 0.

    A share above 1 makes some of the joint negative; MATLAB's code takes the real part of the
    complex logarithm then.
    """
    return x.abs().clamp_(min=1e-37).log_().mul_(x)


def _pixels(x: torch.Tensor) -> torch.Tensor:
    return x


def _gradient(x: torch.Tensor) -> torch.Tensor:
    return torch.gradient(x, dim=-1)[0]


def _edges(x: torch.Tensor) -> torch.Tensor:
    """1 where the Sobel magnitude is above twice its root mean square, and largest across the edge.

    As MATLAB's `edge` with its own threshold and thinning: compared with the neighbours left and
    right where the slope is mostly horizontal, with those above and below where mostly vertical.
    """
    padded = pad(x, 1, "replicate")
    gx = separable(padded, [-1, 0, 1], [1, 2, 1])
    gy = separable(padded, [1, 2, 1], [-1, 0, 1])
    power = gx.square() + gy.square()
    around = pad(power, 1, "zeros")
    left, right = around[:, 1:-1, :-2], around[:, 1:-1, 2:]
    above, under = around[:, :-2, 1:-1], around[:, 2:, 1:-1]
    gx, gy = gx.abs(), gy.abs()
    horizontal = (gx >= gy) & (power >= left) & (power > right)
    vertical = (gy >= gx) & (power >= above) & (power > under)
    strong = power > 4 * power.mean((-2, -1), keepdim=True)
    return (strong & (horizontal | vertical)).to(x.dtype)


def _dct(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal DCT-II along both axes, as MATLAB's `dct2`."""
    rows, columns = (_dct_matrix(n).to(x.device) for n in x.shape[-2:])
    return _without_noise(rows @ x @ columns.mT)


def _without_noise(x: torch.Tensor) -> torch.Tensor:
    """Coefficients that differ by rounding alone made equal: a window would scale it to 0 to 1."""
    return x.round(decimals=9)


def _dct_matrix(n: int) -> torch.Tensor:
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * k[:, None] * (k + 0.5)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def _meyer_bands(x: torch.Tensor) -> torch.Tensor:
    """[A, H; V, D] of MATLAB's `dwt2(x, 'dmey')`: about 100 lines and columns more than x."""
    rows, columns = (_meyer_matrix(n).to(x.device) for n in x.shape[-2:])
    low, high = (part @ x for part in rows.chunk(2))
    (approximation, vertical), (horizontal, diagonal) = (
        (part @ columns.mT).chunk(2, dim=-1) for part in (low, high)
    )
    top, bottom = [approximation, horizontal], [vertical, diagonal]
    return _without_noise(torch.cat([torch.cat(top, -1), torch.cat(bottom, -1)], -2))


def _meyer_matrix(n: int, reach: int = 50) -> torch.Tensor:
    """One level of the transform of n values mirrored at both ends: low band, then high band.

    2 m × n with m = (n + 101) // 2, the length MATLAB's filters of 102 taps (one is 0) give.
    """
    shift = torch.arange(-reach, reach + 1)
    taps = _meyer_taps(reach)
    start = 2 * torch.arange((n + 2 * reach + 1) // 2)[:, None] - reach - shift
    index = torch.cat([start, start + 1]) % (2 * n)
    index = torch.where(index < n, index, 2 * n - 1 - index)
    low_high = torch.stack([taps, -taps * (1 - 2 * (shift % 2))])
    values = low_high.repeat_interleave(len(start), dim=0)
    return torch.zeros(len(index), n, dtype=taps.dtype).scatter_add_(1, index, values)


@cache
def _meyer_taps(reach: int, samples: int = 4096) -> torch.Tensor:
    """Taps -reach to reach of the low-pass filter of Meyer's wavelet.

    The inverse Fourier transform of √2 cos(π/2 ν(3|ω|/π - 1)), Daubechies, Ten Lectures on
    Wavelets, 1992, section 4.2.1, with her ν(t) = t⁴ (35 - 84 t + 70 t² - 20 t³).
    """
    frequency = (torch.arange(samples, dtype=torch.float64) + 0.5) * math.pi / samples
    t = (3 * frequency / math.pi - 1).clamp(0, 1)
    nu = t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)
    response = math.sqrt(2) * torch.cos(math.pi / 2 * nu)
    tap = torch.arange(-reach, reach + 1)[:, None]
    return (response * torch.cos(tap * frequency)).mean(1)
