"""Metrics of how well the sources' edges, in strength and orientation, arrive in the fused picture.

All three compare Sobel gradients: the smaller magnitude over the larger, and the angle between
them, each through a sigmoid. They differ in constants, weights and the treatment of flat regions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from fusionkit.kernels.qabf import qabf_takes, qabf_twin
from fusionkit.metrics._common import by_picture
from fusionkit.metrics._filters import pad
from fusionkit.metrics._sobel import WHOLE, magnitude, sobel, whole_levels
from fusionkit.metrics.remember import remembered
from fusionkit.names import check_name

QABF_CONVENTIONS = ("matlab", "paper")


class Edges(NamedTuple):
    """Gradient magnitude and angle, -π/2 to π/2, at each pixel."""

    strength: torch.Tensor
    angle: torch.Tensor


class Sigmoids(NamedTuple):
    """Γ / (1 + exp(-κ (x - σ))) for the ratio of magnitudes (g) and for the angles (α)."""

    gamma_g: float
    kappa_g: float
    sigma_g: float
    gamma_angle: float
    kappa_angle: float
    sigma_angle: float

    def __call__(self, ratio: torch.Tensor, alignment: torch.Tensor) -> torch.Tensor:
        strength = self.gamma_g * torch.sigmoid(self.kappa_g * (ratio - self.sigma_g))
        angle = self.gamma_angle * torch.sigmoid(self.kappa_angle * (alignment - self.sigma_angle))
        return strength * angle


XYDEAS = Sigmoids(0.9994, 15, 0.5, 0.9879, 22, 0.8)
PETROVIC = Sigmoids(0.9999, 19, 0.5, 0.9995, 22, 0.5)
LIU = Sigmoids(1, 10, 0.5, 1, 20, 0.75)

NABF_EXPONENT = 1.5
NABF_THRESHOLD = 2.0  # gray levels a pixel; weaker source gradients get the weight below
NABF_WEAK_WEIGHT = 0.001
LIU_STEP = 1e-5  # horizontal gradient where there is none


def qabf(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, convention: str = "matlab"
) -> torch.Tensor:
    """Q^AB/F: edge information of the sources that the fused picture preserves, 0 to 0.975; (B,).

    Larger is better. Zeros beyond the border; the weights are the sources' gradient magnitudes.
    NaN where neither source has a gradient (black ones; single pixels). Differentiable.

    Args:
        convention: what the ratio of two equal magnitudes is. "matlab": the magnitude itself in
            gray levels, as the code in circulation has it: on 0 to 255 that differs from the
            paper by up to 0.06 %, but the same code on 0 to 1 takes pixels copied from a source
            as badly preserved (0.51 for 0.94 on a multi-focus result). "paper": 1.

    Raises:
        ValueError: unknown `convention`.

    Source: Xydeas and Petrovic, Objective image fusion performance measure, 2000.
    """
    check_name(convention, QABF_CONVENTIONS, "convention")

    def value(a, b, f):
        if qabf_takes(a, b, f):
            kept, total = qabf_twin(a, b, f, XYDEAS, WHOLE, convention == "matlab")
            return kept / total
        a, b, f = (_qabf_edges(x) for x in (a, b, f))
        kept = total = 0
        for source in (a, b):
            ratio = _ratio(source.strength, f.strength)
            if convention == "matlab":
                ratio = torch.where(source.strength == f.strength, f.strength, ratio)
            alignment = 1 - (source.angle - f.angle).abs() * (2 / math.pi)
            kept = kept + (XYDEAS(ratio, alignment) * source.strength).sum((-2, -1))
            total = total + source.strength.sum((-2, -1))
        return kept / total

    return by_picture(value, a, b, fused)


def nabf(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """N^AB/F: share of artefacts, edges in the fused picture which neither source has; (B,).

    0 to 1, smaller is better; 0 for identical and for constant pictures. Pixels count where the
    fused gradient is larger than both sources', by the loss of the sources' edges there, weighted
    by the source gradient to the power of 1.5.

    Raises:
        ValueError: pictures smaller than 2×2.

    Source: Petrovic and Xydeas, Objective image fusion performance characterisation, 2005, with
    the changes and constants of Shreyamsha Kumar, Multifocus and multispectral image fusion based
    on pixel significance using discrete cosine harmonic wavelet transform, 2013.
    """

    def value(a, b, f):
        if min(f.shape[-2:]) < 2:
            raise ValueError(f"N^AB/F needs 2×2 pixels at least; got {f.shape[-2]}×{f.shape[-1]}")
        a, b, f = (_nabf_edges(x) for x in (a, b, f))
        artefact = (f.strength > a.strength) & (f.strength > b.strength)
        lost = total = 0
        for source in (a, b):
            kept = PETROVIC(_ratio(source.strength, f.strength), _alignment(source, f)).sqrt()
            weight = (source.strength**NABF_EXPONENT).where(
                source.strength >= NABF_THRESHOLD, NABF_WEAK_WEIGHT
            )
            lost = lost + (artefact * (1 - kept) * weight).sum((-2, -1))
            total = total + weight.sum((-2, -1))
        return lost / total

    return by_picture(value, a, b, fused)


def qg(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Q_G: Q^AB/F as a mean of local values, so that flat regions count as much; (B,).

    0 to 0.987, larger is better. At each pixel the sources' parts are weighted by their gradient
    magnitudes there; a magnitude of 0 is taken as 1e-5, so that where all is flat all is
    preserved, and constant pictures have a value. Other constants than Q^AB/F.

    Source: Liu et al., Objective assessment of multiresolution image fusion algorithms for context
    enhancement in night vision, 2012, and its MATLAB collection.
    """

    def value(a, b, f):
        a, b, f = (_qg_edges(x) for x in (a, b, f))
        kept_a, kept_b = (
            LIU(_ratio(source.strength, f.strength), _alignment(source, f)) for source in (a, b)
        )
        local = (kept_a * a.strength + kept_b * b.strength) / (a.strength + b.strength)
        return local.mean((-2, -1))

    return by_picture(value, a, b, fused)


@remembered
def _qabf_edges(x: torch.Tensor) -> Edges:
    gx, gy = sobel(pad(whole_levels(x), 1, "zeros"))
    # The angle counts upwards, and no horizontal gradient is π/2 whatever the vertical one.
    upright = gx == 0
    angle = torch.atan(-gy / gx.masked_fill(upright, 1)).masked_fill(upright, math.pi / 2)
    return Edges(magnitude(gx, gy), angle)


@remembered
def _nabf_edges(x: torch.Tensor) -> Edges:
    mirrored = F.pad(whole_levels(x)[:, None], (1, 1, 1, 1), mode="reflect")[:, 0]
    gx, gy = (g / 8 for g in sobel(mirrored))
    # Right angles, whose sign does not matter, and 0 where there is no gradient.
    level = gy == 0
    angle = torch.where(level, gx.sign() * (math.pi / 2), torch.atan(gx / gy.masked_fill(level, 1)))
    return Edges(magnitude(gx, gy), angle)


@remembered
def _qg_edges(x: torch.Tensor) -> Edges:
    gx, gy = sobel(pad(whole_levels(x), 1, "zeros"))
    gx = gx.masked_fill(gx == 0, LIU_STEP)
    return Edges(magnitude(gx, gy), torch.atan(gy / gx))


def _ratio(g: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The smaller over the larger; 0 where both are 0."""
    larger = torch.maximum(g, h)
    return torch.minimum(g, h) / larger.masked_fill(larger == 0, 1)


def _alignment(x: Edges, y: Edges) -> torch.Tensor:
    """1 for one direction, 0 for perpendicular ones, and 1 again for opposite angles."""
    return ((x.angle - y.angle).abs() * (2 / math.pi) - 1).abs()
