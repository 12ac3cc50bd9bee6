"""Phase congruency: where a picture's frequencies agree in phase, whatever the contrast."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from fusionkit.metrics.remember import remembered

# Kovesi's defaults.
SCALES = 4
ORIENTATIONS = 6
MIN_WAVELENGTH = 3
SCALE_RATIO = 2.1
BANDWIDTH = 0.55  # σ of the log-Gabor filter over its centre frequency
ANGULAR_RATIO = 1.2  # distance of the orientations over the σ of their Gaussian
NOISE_SIGMAS = 2.0
NOISE_DIVISOR = 1.7  # Kovesi's empirical correction of the noise estimate
CUT_OFF, GAIN = 0.5, 10  # of the sigmoid that favours broad frequency spread
LOWPASS_CUT_OFF, LOWPASS_ORDER = 0.45, 15
EPSILON = 1e-4  # of the amplitudes, for gray levels


class PhaseCongruency(NamedTuple):
    """Maps (..., H, W): congruency 0 to 1, its maximum moment (edges) and minimum one (corners)."""

    congruency: torch.Tensor
    maximum_moment: torch.Tensor
    minimum_moment: torch.Tensor


@remembered
def phase_congruency(x: torch.Tensor) -> PhaseCongruency:
    """Phase congruency of (B, H, W) pictures, float64, and the principal moments of its
    orientations.

    Log-Gabor filters at 4 scales and 6 orientations; the expected response to noise, estimated
    from the finest scale, is taken off. The filters work in single precision, which moves the maps
    by less than 1e-5; the result is float64.

    Source: Kovesi, Image features from phase congruency, 1999; Phase congruency detects corners
    and edges, 2003.
    """
    radial, angular, noise_gains = _filters(*x.shape[-2:], x.device)
    spectrum = torch.fft.fft2(x).to(torch.complex64)
    banded = spectrum[:, None] * radial
    energy = amplitude = xx = yy = xy = 0
    for index in range(ORIENTATIONS):
        responses = torch.fft.ifft2(banded * angular[index])  # (B, scales, H, W)
        squares = responses.real.square().addcmul_(responses.imag, responses.imag)
        amplitudes = squares.sqrt()
        total = amplitudes.sum(1)
        power = squares[:, 0].flatten(1).median(1).values / math.log(2)
        strength = _energy(responses) - _noise(power * noise_gains[index])
        spread = total / (amplitudes.amax(1) + EPSILON) / SCALES
        strength = strength.clamp_min(0) * torch.sigmoid(GAIN * (spread - CUT_OFF))
        energy, amplitude = energy + strength, amplitude + total

        congruency = strength / (total + EPSILON)
        angle = index * math.pi / ORIENTATIONS
        x_part, y_part = congruency * math.cos(angle), congruency * math.sin(angle)
        xx, yy, xy = xx + x_part.square(), yy + y_part.square(), xy + x_part * y_part

    xx, yy = xx * (2 / ORIENTATIONS), yy * (2 / ORIENTATIONS)
    # Twice the covariance would have the factor 4; the MATLAB values of Q_P need 1.
    xy = xy / ORIENTATIONS
    difference = torch.hypot(xy, xx - yy)
    maps = energy / (amplitude + EPSILON), (xx + yy + difference) / 2, (xx + yy - difference) / 2
    return PhaseCongruency(*(x.double() for x in maps))


def _energy(responses: torch.Tensor) -> torch.Tensor:
    """Σ over scales of A (cos Δφ - |sin Δφ|), Δφ the distance to the mean phase."""
    mean = responses.sum(1, keepdim=True)
    length = mean.abs()
    cosine, sine = mean.real / (length + EPSILON), mean.imag / (length + EPSILON)
    # The aligned parts add up to the length of the sum.
    across = responses.imag * cosine - responses.real * sine
    return length[:, 0] - across.abs_().sum(1)


def _noise(variance: torch.Tensor) -> torch.Tensor:
    """Mean and 2 σ of a Rayleigh-distributed energy of noise, (B,) -> (B, 1, 1)."""
    threshold = math.sqrt(math.pi / 2) + NOISE_SIGMAS * math.sqrt(2 - math.pi / 2)
    return (variance.sqrt() * threshold / NOISE_DIVISOR)[:, None, None]


@lru_cache(maxsize=4)
def _filters(
    height: int, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Radial (scales, H, W) and angular (orientations, H, W) factors of the filters, and by how
    much each orientation's energy of noise exceeds that of its finest scale."""
    y = torch.fft.fftfreq(height, dtype=torch.float64, device=device)[:, None]
    x = torch.fft.fftfreq(width, dtype=torch.float64, device=device)[None, :]
    radius = torch.hypot(x, y)
    lowpass = 1 / (1 + (radius / LOWPASS_CUT_OFF) ** (2 * LOWPASS_ORDER))
    log_radius = radius.where(radius > 0, 1).log()
    centres = [1 / (MIN_WAVELENGTH * SCALE_RATIO**scale) for scale in range(SCALES)]
    width_term = 2 * math.log(BANDWIDTH) ** 2
    radial = torch.stack(
        [lowpass * torch.exp(-((log_radius - math.log(c)) ** 2) / width_term) for c in centres]
    )
    radial[:, 0, 0] = 0

    direction = torch.atan2(-y, x)
    sigma = math.pi / ORIENTATIONS / ANGULAR_RATIO
    angular, gains = [], []
    for index in range(ORIENTATIONS):
        distance = (direction - index * math.pi / ORIENTATIONS + math.pi) % (2 * math.pi) - math.pi
        spread = torch.exp(-distance.square() / (2 * sigma**2))
        # The even part of a filter is the real part of its impulse response.
        even = (spread + spread.flip(0, 1).roll((1, 1), (0, 1))) / 2
        angular.append(spread)
        gains.append((radial.sum(0) * even).square().sum() / (radial[0] * spread).square().sum())
    return radial.float(), torch.stack(angular).float(), torch.stack(gains).float()
