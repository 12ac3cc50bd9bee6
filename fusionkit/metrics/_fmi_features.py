"""The features whose mutual information FMI measures, of gray levels (B, H, W) in float64.

Those of whole or half levels are exact in float32, and given so.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from fusionkit.metrics._filters import pad, separable


def pixels(x: torch.Tensor) -> torch.Tensor:
    return x.float()


def gradient(x: torch.Tensor) -> torch.Tensor:
    return torch.gradient(x, dim=-1)[0].float()


def edges(x: torch.Tensor) -> torch.Tensor:
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
    return (strong & (horizontal | vertical)).float()


def dct(x: torch.Tensor) -> torch.Tensor:
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


def meyer_bands(x: torch.Tensor) -> torch.Tensor:
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
