"""Q^AB/F's sums over a picture in one pass: edges of three pictures, compared and weighted.

The plain PyTorch reference is the metric itself, `metrics.edges.qabf`: it remembers the sources'
edges for the next fused picture, which a CPU gains more by.

Bytes moved for a float64 pixel (of a, b and fused together): eager 2586 (by `traffic.bytes_moved`),
compiled 152 (from the compiler's own schedule: rows and columns of the Sobel operator, then the
comparison), Triton 24. Not yet measured on a GPU. All is computed in float64, as in the metric:
where a card has few units for that, they, not the traffic, bound both.

Source: Xydeas and Petrovic, Objective image fusion performance measure, 2000.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusionkit.kernels._dispatch import compiled, twin, twin_takes
from fusionkit.kernels._tiles import BLOCK, place, tiles

tl = None  # triton.language, once the twin has run


def qabf_takes(*pictures: torch.Tensor) -> bool:
    """Whether the twin can do these float64 pictures: it has no gradient."""
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in pictures)
    return not recorded and twin_takes(*pictures, types=(torch.float64,))


def qabf_twin(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    sigmoids: Sequence[float],
    whole: float,
    matlab: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of Q · strength and of strength over both sources: (B, H, W) thrice -> (B,) twice.

    Args:
        sigmoids: Γ, κ and σ for the ratio of magnitudes, then for the angles.
        whole: levels this close to a whole one are taken as that.
        matlab: the ratio of two equal magnitudes is the magnitude, as in the code in circulation.
    """
    compiled(globals())
    batch, height, width = fused.shape
    programs = tiles(batch, height, width)
    sums = torch.empty(2, programs, dtype=torch.float64, device=fused.device)
    with torch.cuda.device_of(fused):
        _sums[(programs,)](
            *(a.contiguous(), b.contiguous(), fused.contiguous(), sums, height, width),
            SIGMOIDS=tuple(sigmoids),
            WHOLE=whole,
            MATLAB=matlab,
            **BLOCK,
        )
    return tuple(sums.view(2, batch, -1).sum(-1))


@twin
def _pixel(image, y, x, height, width, WHOLE: tl.constexpr):
    """The gray level, 0 beyond the picture; float32's deviations from a whole one are undone."""
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    value = tl.load(image + y * width + x, mask=inside, other=0)
    nearest = (value + 6755399441055744.0) - 6755399441055744.0  # above 2^52 there are no halves
    return tl.where(tl.abs(nearest - value) < WHOLE, nearest, value)


@twin
def _edges(image, y, x, height, width, WHOLE: tl.constexpr):
    """The Sobel gradient's magnitude, and its angle from above -π/2 to π/2."""
    nw = _pixel(image, y - 1, x - 1, height, width, WHOLE)
    n = _pixel(image, y - 1, x, height, width, WHOLE)
    ne = _pixel(image, y - 1, x + 1, height, width, WHOLE)
    w = _pixel(image, y, x - 1, height, width, WHOLE)
    e = _pixel(image, y, x + 1, height, width, WHOLE)
    sw = _pixel(image, y + 1, x - 1, height, width, WHOLE)
    s = _pixel(image, y + 1, x, height, width, WHOLE)
    se = _pixel(image, y + 1, x + 1, height, width, WHOLE)
    dx, dy = (ne - nw) + 2 * (e - w) + (se - sw), (sw + 2 * s + se) - (nw + 2 * n + ne)
    upright = dx == 0
    angle = _arctangent(-dy / tl.where(upright, 1.0, dx))
    return tl.sqrt(dx * dx + dy * dy), tl.where(upright, 1.5707963267948966, angle)


@twin
def _arctangent(t):
    """Triton has none: three times half the angle, atan t = 2 atan(t / (1 + √(1 + t²))), then the
    series, whose terms from t²³ on are below float64's rounding.
    """
    for _ in tl.static_range(3):
        t = t / (1 + tl.sqrt(1 + t * t))
    square = t * t
    total = tl.zeros_like(t)
    for k in tl.static_range(11):
        total = 1 / (21.0 - 2 * k) - square * total
    return 8 * t * total


@twin
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@twin
def _quality(strength, angle, f_strength, f_angle, SIGMOIDS: tl.constexpr, MATLAB: tl.constexpr):
    """Q at each pixel: how much of a source's edge the fused picture has."""
    larger = tl.maximum(strength, f_strength)
    ratio = tl.minimum(strength, f_strength) / tl.where(larger == 0, 1.0, larger)
    if MATLAB:
        ratio = tl.where(strength == f_strength, f_strength, ratio)
    alignment = 1 - tl.abs(angle - f_angle) * 0.6366197723675814
    gain = SIGMOIDS[0] * _sigmoid(SIGMOIDS[1] * (ratio - SIGMOIDS[2]))
    return gain * (SIGMOIDS[3] * _sigmoid(SIGMOIDS[4] * (alignment - SIGMOIDS[5])))


@twin
def _sums(
    a,
    b,
    fused,
    sums,
    height,
    width,
    SIGMOIDS: tl.constexpr,
    WHOLE: tl.constexpr,
    MATLAB: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    item, y, x, inside = place(height, width, BLOCK_HEIGHT, BLOCK_WIDTH)
    start = item * height * width
    strength_a, angle_a = _edges(a + start, y, x, height, width, WHOLE)
    strength_b, angle_b = _edges(b + start, y, x, height, width, WHOLE)
    strength, angle = _edges(fused + start, y, x, height, width, WHOLE)
    kept = strength_a * _quality(strength_a, angle_a, strength, angle, SIGMOIDS, MATLAB)
    kept += strength_b * _quality(strength_b, angle_b, strength, angle, SIGMOIDS, MATLAB)
    program = tl.program_id(0)
    tl.store(sums + program, tl.sum(tl.where(inside, kept, 0.0)))
    sums += tl.num_programs(0)
    tl.store(sums + program, tl.sum(tl.where(inside, strength_a + strength_b, 0.0)))
