"""Two loss terms in one pass: |fused - max(a, b)| and |∇fused - max(∇a, ∇b)|, ∇ by Sobel.

Bytes moved for a float32 pixel, with a gradient for the fused picture alone:

| | eager | compiled | Triton |
| --- | --- | --- | --- |
| forward | 216 | 116 | 13 |
| backward | 124 | 60 | 5 |

Eager by `traffic.bytes_moved`; compiled from the compiler's own schedule: padding and convolutions
stay as they are, and what follows them is two operations. The twin reads three pictures and writes
one byte a pixel, which is all that its backward pass reads. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch

from fusionkit.kernels._dispatch import (
    backward_is_recorded,
    compiled,
    recorded_gradients,
    twin,
    twin_takes,
)
from fusionkit.kernels._tiles import BLOCK, place, tiles
from fusionkit.kernels.sobel import sobel

tl = None  # triton.language, once the twin has run


def maximum_terms(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, border: str = "replicate"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean |fused - max(a, b)| and mean |∇fused - max(∇a, ∇b)| of (B, 1, H, W); two scalars.

    Gradients of all orders by all three. `border`: as in `sobel.sobel_components`.
    """
    if a.shape == b.shape == fused.shape and twin_takes(a, b, fused):
        return maximum_terms_twin(a, b, fused, border)
    return maximum_terms_reference(a, b, fused, border)


def maximum_terms_reference(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, border: str = "replicate"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`maximum_terms` in plain PyTorch."""
    intensity = (fused - torch.maximum(a, b)).abs().mean()
    strongest = torch.maximum(sobel(a, border), sobel(b, border))
    return intensity, (sobel(fused, border) - strongest).abs().mean()


def maximum_terms_twin(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, border: str = "replicate"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`maximum_terms` by Triton, computed in float32."""
    compiled(globals())
    return _MaximumTerms.apply(a.contiguous(), b.contiguous(), fused.contiguous(), border)


class _MaximumTerms(torch.autograd.Function):
    """Both terms are piecewise linear. So each pixel's three slopes (of the intensity term by the
    pixel, of the gradient term by ∂x and ∂y there) are among -1, -½, 0, ½ and 1, and one byte a
    picture tells the backward pass all.
    """

    @staticmethod
    def forward(ctx, a, b, fused, border):
        height, width = fused.shape[-2:]
        needed = ctx.needs_input_grad[:3]
        slopes = [
            torch.empty(fused.shape if need else (1,), dtype=torch.uint8, device=fused.device)
            for need in needed
        ]
        programs = tiles(len(fused), height, width)
        sums = torch.empty(2, programs, device=fused.device)
        with torch.cuda.device_of(fused):
            _forward[(programs,)](
                *(a, b, fused, *slopes, sums, height, width),
                ZEROS=border == "zeros",
                NEED_A=needed[0],
                NEED_B=needed[1],
                NEED_F=needed[2],
                **BLOCK,
            )
        ctx.save_for_backward(a, b, fused, *slopes)
        ctx.border = border
        return tuple((term.sum() / fused.numel()).to(fused.dtype) for term in sums)

    @staticmethod
    def backward(ctx, *gradients):
        *inputs, slopes_a, slopes_b, slopes_f = ctx.saved_tensors
        needed, border = ctx.needs_input_grad[:3], ctx.border
        if backward_is_recorded():
            found = recorded_gradients(
                lambda a, b, fused: maximum_terms_reference(a, b, fused, border),
                *(inputs, needed, gradients),
            )
            return *found, None
        # Slopes are stored doubled.
        scales = torch.stack(gradients).float() / (2 * inputs[2].numel())
        found = []
        for x, slopes, need in zip(inputs, (slopes_a, slopes_b, slopes_f), needed, strict=True):
            found.append(torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None)
            if need:
                _backward[(tiles(len(x), *x.shape[-2:]),)](
                    *(slopes, scales, found[-1], *x.shape[-2:]),
                    ZEROS=border == "zeros",
                    **BLOCK,
                )
        return *found, None


@twin
def _pixel(image, y, x, height, width, ZEROS: tl.constexpr):
    if ZEROS:
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        value = tl.load(image + y * width + x, mask=inside, other=0)
    else:
        y = tl.minimum(tl.maximum(y, 0), height - 1)
        x = tl.minimum(tl.maximum(x, 0), width - 1)
        value = tl.load(image + y * width + x)
    return value.to(tl.float32)


@twin
def _sobel(image, y, x, height, width, ZEROS: tl.constexpr):
    """∂x and ∂y; differences come first, so that flat regions give exactly 0."""
    nw = _pixel(image, y - 1, x - 1, height, width, ZEROS)
    n = _pixel(image, y - 1, x, height, width, ZEROS)
    ne = _pixel(image, y - 1, x + 1, height, width, ZEROS)
    w = _pixel(image, y, x - 1, height, width, ZEROS)
    e = _pixel(image, y, x + 1, height, width, ZEROS)
    sw = _pixel(image, y + 1, x - 1, height, width, ZEROS)
    s = _pixel(image, y + 1, x, height, width, ZEROS)
    se = _pixel(image, y + 1, x + 1, height, width, ZEROS)
    return (ne - nw) + 2 * (e - w) + (se - sw), (sw - nw) + 2 * (s - n) + (se - ne)


@twin
def _sign(x):
    return (x > 0).to(tl.int32) - (x < 0).to(tl.int32)


@twin
def _twice_share(x, y):
    """Twice the share of x in the gradient of max(x, y): equal ones share it."""
    return (x > y).to(tl.int32) + (x >= y).to(tl.int32)


@twin
def _forward(
    a,
    b,
    fused,
    slopes_a,
    slopes_b,
    slopes_f,
    sums,
    height,
    width,
    ZEROS: tl.constexpr,
    NEED_A: tl.constexpr,
    NEED_B: tl.constexpr,
    NEED_F: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    item, y, x, inside = place(height, width, BLOCK_HEIGHT, BLOCK_WIDTH)
    start = item * height * width
    a, b, fused = a + start, b + start, fused + start
    pixel_a = _pixel(a, y, x, height, width, ZEROS)
    pixel_b = _pixel(b, y, x, height, width, ZEROS)
    distance = _pixel(fused, y, x, height, width, ZEROS) - tl.maximum(
        pixel_a, pixel_b, propagate_nan=tl.PropagateNan.ALL
    )
    a_dx, a_dy = _sobel(a, y, x, height, width, ZEROS)
    b_dx, b_dy = _sobel(b, y, x, height, width, ZEROS)
    f_dx, f_dy = _sobel(fused, y, x, height, width, ZEROS)
    edge_a, edge_b = tl.abs(a_dx) + tl.abs(a_dy), tl.abs(b_dx) + tl.abs(b_dy)
    strongest = tl.maximum(edge_a, edge_b, propagate_nan=tl.PropagateNan.ALL)
    lack = tl.abs(f_dx) + tl.abs(f_dy) - strongest
    program = tl.program_id(0)
    tl.store(sums + program, tl.sum(tl.where(inside, tl.abs(distance), 0.0)))
    sums += tl.num_programs(0)
    tl.store(sums + program, tl.sum(tl.where(inside, tl.abs(lack), 0.0)))

    at = start + y * width + x
    sign, edge_sign = _sign(distance), _sign(lack)
    if NEED_F:
        code = _packed(2 * sign, 2 * edge_sign * _sign(f_dx), 2 * edge_sign * _sign(f_dy))
        tl.store(slopes_f + at, code, mask=inside)
    if NEED_A:
        share = -edge_sign * _twice_share(edge_a, edge_b)
        slope = -sign * _twice_share(pixel_a, pixel_b)
        code = _packed(slope, share * _sign(a_dx), share * _sign(a_dy))
        tl.store(slopes_a + at, code, mask=inside)
    if NEED_B:
        share = -edge_sign * _twice_share(edge_b, edge_a)
        slope = -sign * _twice_share(pixel_b, pixel_a)
        code = _packed(slope, share * _sign(b_dx), share * _sign(b_dy))
        tl.store(slopes_b + at, code, mask=inside)


@twin
def _packed(intensity, dx, dy):
    """Three numbers from -2 to 2 as one byte."""
    return (25 * (intensity + 2) + 5 * (dx + 2) + dy + 2).to(tl.uint8)


@twin
def _backward(
    slopes,
    scales,
    gradient,
    height,
    width,
    ZEROS: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The transposed Sobel operator on the stored slopes: each pixel asks its nine neighbours."""
    item, y, x, inside = place(height, width, BLOCK_HEIGHT, BLOCK_WIDTH)
    slopes += item * height * width
    scale, edge_scale = tl.load(scales), tl.load(scales + 1)
    total = tl.zeros((BLOCK_HEIGHT, BLOCK_WIDTH), tl.float32)
    for down in tl.static_range(-1, 2):
        for right in tl.static_range(-1, 2):
            # What pixel (y - down, x - right) has of this one: taps `down` and `right`.
            row, column = y - down, x - right
            known = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            code = tl.load(slopes + row * width + column, mask=known, other=62).to(tl.int32)
            dx, dy = code // 5 % 5 - 2, code % 5 - 2
            smooth_y, smooth_x = 2 - down * down, 2 - right * right
            differ_y, differ_x = down, right
            if not ZEROS:  # pixels at the border also stand for those beyond it
                if down == 0:
                    smooth_y += (y == 0).to(tl.int32) + (y == height - 1).to(tl.int32)
                    differ_y += (y == height - 1).to(tl.int32) - (y == 0).to(tl.int32)
                if right == 0:
                    smooth_x += (x == 0).to(tl.int32) + (x == width - 1).to(tl.int32)
                    differ_x += (x == width - 1).to(tl.int32) - (x == 0).to(tl.int32)
            slope = dx * (smooth_y * differ_x) + dy * (differ_y * smooth_x)
            total += edge_scale * slope.to(tl.float32)
            if (down == 0) and (right == 0):
                total += scale * (code // 25 - 2).to(tl.float32)
    at = item * height * width + y * width + x
    tl.store(gradient + at, total, mask=inside)
