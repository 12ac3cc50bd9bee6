"""SSIM as a loss: of two pictures, and of the fused picture against both sources at once.

Bytes moved for a float32 pixel and channel by SSIM of fused against a and b, with a gradient for
the fused picture alone, in an 11×11 window:

| | eager | compiled | Triton |
| --- | --- | --- | --- |
| forward | 640 | 204 | 76 |
| backward | 1152 | 224 | 112 |

Eager by `traffic.bytes_moved`; compiled by hand: the two convolutions of eight maps stay as they
are, and all before and after them is one operation each. The twin blurs the rows of eight products
as it forms them (three maps read, eight written), and the columns as it compares (eight read); its
backward pass does the transposed blurs in the same way. Not yet measured on a GPU.

Source: Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from fusionkit.kernels._dispatch import (
    backward_is_recorded,
    compiled,
    recorded_gradients,
    twin,
    twin_takes,
)
from fusionkit.kernels._tiles import BLOCK, place, tiles

C1, C2 = 0.01**2, 0.03**2  # for pictures in [0, 1]
LARGEST_WINDOW = 11
tl = None  # triton.language, once the twin has run


def ssim_terms(
    mean_x: torch.Tensor,
    mean_y: torch.Tensor,
    variance_x: torch.Tensor,
    variance_y: torch.Tensor,
    covariance: torch.Tensor,
    c1: float = C1,
    c2: float = C2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SSIM's two maps from the moments in each window: luminance; contrast times structure.

    Losses and metrics share it: they differ in window, range and precision.
    """
    luminance = (2 * (mean_x * mean_y) + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance, (2 * covariance + c2) / (variance_x + variance_y + c2)


def gaussian_taps(window: int, sigma: float = 1.5) -> list[float]:
    """One axis of a Gaussian window of odd side, sum 1."""
    taps = [math.exp(-((i - window // 2) ** 2) / (2 * sigma**2)) for i in range(window)]
    return [tap / sum(taps) for tap in taps]


def ssim(x: torch.Tensor, y: torch.Tensor, border: str = "valid", window: int = 11) -> torch.Tensor:
    """Mean structural similarity of (B, C, H, W) pictures in [0, 1], for use in a loss; a scalar.

    Gaussian window of odd side `window` with σ 1.5, C1 = 1e-4, C2 = 9e-4. `border`: "valid" leaves
    windows out that reach beyond the picture; "zeros" pads with black, as the releases of TC-MoA
    and FRUFN do in most of their terms.

    Raises:
        ValueError: an even window, or with "valid" one that is larger than the pictures.
    """
    return ssim_reference(x, y, border=border, window=window)[0]


def ssim_of_both(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    border: str = "valid",
    window: int = 11,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ssim(fused, a)` and `ssim(fused, b)`, with eight blurs in place of ten; two scalars.

    Gradients of all orders by all three.

    Raises:
        ValueError: as `ssim`.
    """
    alike = a.shape == b.shape == fused.shape
    if alike and window <= LARGEST_WINDOW and twin_takes(a, b, fused):
        return ssim_of_both_twin(a, b, fused, border, window)
    return ssim_reference(fused, a, b, border=border, window=window)


def ssim_reference(
    fused: torch.Tensor, *sources: torch.Tensor, border: str = "valid", window: int = 11
) -> tuple[torch.Tensor, ...]:
    """Mean SSIM of the fused picture with each source, in plain PyTorch."""
    _check_window(fused, border, window)
    padding = window // 2 if border == "zeros" else 0
    weights = fused.new_tensor(gaussian_taps(window))
    pictures = [fused, *sources]
    products = [x * x for x in pictures] + [fused * x for x in sources]
    planes = torch.stack(pictures + products).flatten(0, 2)[:, None]
    planes = F.conv2d(planes, weights.view(1, 1, 1, window), padding=(0, padding))
    planes = F.conv2d(planes, weights.view(1, 1, window, 1), padding=(padding, 0))
    blurred = planes.chunk(len(pictures + products))
    mean_f, *means = blurred[: len(pictures)]
    squares, crosses = blurred[len(pictures) : 2 * len(pictures)], blurred[2 * len(pictures) :]
    variance_f, *variances = (
        square - mean.square() for square, mean in zip(squares, (mean_f, *means), strict=True)
    )
    found = []
    for mean, variance, cross in zip(means, variances, crosses, strict=True):
        covariance = cross - mean_f * mean
        luminance, structure = ssim_terms(mean_f, mean, variance_f, variance, covariance)
        found.append((luminance * structure).mean())
    return tuple(found)


def _check_window(image: torch.Tensor, border: str, window: int) -> None:
    if window % 2 == 0:
        raise ValueError(f"SSIM's window is {window} wide; expected an odd number")
    height, width = image.shape[-2:]
    if border != "zeros" and min(height, width) < window:
        raise ValueError(f"SSIM's window is {window} wide; got {height}×{width} pixels")


def ssim_of_both_twin(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, border: str = "valid", window: int = 11
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ssim_of_both` by Triton, computed in float32."""
    _check_window(fused, border, window)
    compiled(globals())
    return _SSIMOfBoth.apply(a.contiguous(), b.contiguous(), fused.contiguous(), border, window)


class _SSIMOfBoth(torch.autograd.Function):
    """Maps lie in one tensor (maps, B·C, H, W). The eight moments are those of a, b, f, a², b², f²,
    af and bf; their blurred rows are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, a, b, fused, border, window):
        batch, channels, height, width = fused.shape
        planes, reach = batch * channels, window // 2
        pad = reach if border == "zeros" else 0
        out_height, out_width = height + 2 * (pad - reach), width + 2 * (pad - reach)
        taps = torch.tensor(gaussian_taps(window), device=fused.device)
        rows = torch.empty(8, planes, height, out_width, device=fused.device)
        sizes = {"PAD": pad, "WINDOW": window, **BLOCK}
        programs = tiles(planes, out_height, out_width)
        sums = torch.empty(2, programs, device=fused.device)
        with torch.cuda.device_of(fused):
            _blur_rows[(tiles(planes, height, out_width),)](
                *(a, b, fused, taps, rows, planes, height, width, out_width), **sizes
            )
            _compare[(programs,)](
                *(rows, taps, sums, planes, height, out_height, out_width, C1, C2), **sizes
            )
        ctx.save_for_backward(a, b, fused, taps, rows)
        ctx.border, ctx.window, ctx.sizes = border, window, sizes
        ctx.out_size = out_height, out_width
        windows = planes * out_height * out_width
        return tuple((total.sum() / windows).to(fused.dtype) for total in sums)

    @staticmethod
    def backward(ctx, *gradients):
        a, b, fused, taps, rows = ctx.saved_tensors
        needed, border, window = ctx.needs_input_grad[:3], ctx.border, ctx.window
        if backward_is_recorded():
            found = recorded_gradients(
                lambda a, b, fused: ssim_reference(fused, a, b, border=border, window=window),
                *((a, b, fused), needed, gradients),
            )
            return *found, None, None
        batch, channels, height, width = fused.shape
        planes, (out_height, out_width) = batch * channels, ctx.out_size
        scales = torch.stack(gradients).float() / (planes * out_height * out_width)
        # Slopes by the blurred f, f², af, bf; then a, a², b, b² if a source has a gradient.
        count = 8 if needed[0] or needed[1] else 4
        slopes = rows.new_empty(count, planes, out_height, out_width)
        _slopes[(tiles(planes, out_height, out_width),)](
            *(rows, taps, scales, slopes, planes, height, out_height, out_width, C1, C2),
            SOURCES=count == 8,
            **ctx.sizes,
        )
        columns = rows.new_empty(count, planes, height, out_width)
        _blur_columns_back[(tiles(count * planes, height, out_width),)](
            *(slopes, taps, columns, height, out_height, out_width), **ctx.sizes
        )
        found = [
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
            for x, need in zip((a, b, fused), needed, strict=True)
        ]
        _gather[(tiles(planes, height, width),)](
            *(a, b, fused, taps, columns),
            *(columns if gradient is None else gradient for gradient in found),
            *(planes, height, width, out_width),
            NEED_A=needed[0],
            NEED_B=needed[1],
            NEED_F=needed[2],
            **ctx.sizes,
        )
        return *found, None, None


@twin
def _blur_rows(
    a,
    b,
    fused,
    taps,
    rows,
    planes,
    height,
    width,
    out_width,
    PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The eight products along the rows: (planes, H, W) -> (8, planes, H, W')."""
    plane, y, x, inside = place(height, out_width, BLOCK_HEIGHT, BLOCK_WIDTH)
    line = plane * height * width + y * width
    zero = tl.zeros((BLOCK_HEIGHT, BLOCK_WIDTH), tl.float32)
    m_a, m_b, m_f, aa, bb, ff, af, bf = zero, zero, zero, zero, zero, zero, zero, zero
    for k in tl.static_range(WINDOW):
        at = x + k - PAD
        known = inside & (at >= 0) & (at < width)
        tap = tl.load(taps + k)
        pixel_a = tl.load(a + line + at, mask=known, other=0).to(tl.float32)
        pixel_b = tl.load(b + line + at, mask=known, other=0).to(tl.float32)
        pixel_f = tl.load(fused + line + at, mask=known, other=0).to(tl.float32)
        m_a += tap * pixel_a
        m_b += tap * pixel_b
        m_f += tap * pixel_f
        aa += tap * (pixel_a * pixel_a)
        bb += tap * (pixel_b * pixel_b)
        ff += tap * (pixel_f * pixel_f)
        af += tap * (pixel_a * pixel_f)
        bf += tap * (pixel_b * pixel_f)
    size = height * out_width
    out = rows + plane * size + y * out_width + x
    step = planes * tl.full((), size, tl.int64)
    tl.store(out, m_a, mask=inside)
    tl.store(out + step, m_b, mask=inside)
    tl.store(out + 2 * step, m_f, mask=inside)
    tl.store(out + 3 * step, aa, mask=inside)
    tl.store(out + 4 * step, bb, mask=inside)
    tl.store(out + 5 * step, ff, mask=inside)
    tl.store(out + 6 * step, af, mask=inside)
    tl.store(out + 7 * step, bf, mask=inside)


@twin
def _moments(rows, taps, planes, plane, y, x, inside, height, out_width, PAD, WINDOW: tl.constexpr):
    """Means of a, b and f, their variances, and the covariances of a and of b with f."""
    size = height * out_width
    step = planes * tl.full((), size, tl.int64)
    zero = tl.zeros(inside.shape, tl.float32)
    m_a, m_b, m_f, aa, bb, ff, af, bf = zero, zero, zero, zero, zero, zero, zero, zero
    for k in tl.static_range(WINDOW):
        row = y + k - PAD
        known = inside & (row >= 0) & (row < height)
        at = rows + plane * size + row * out_width + x
        tap = tl.load(taps + k)
        m_a += tap * tl.load(at, mask=known, other=0)
        m_b += tap * tl.load(at + step, mask=known, other=0)
        m_f += tap * tl.load(at + 2 * step, mask=known, other=0)
        aa += tap * tl.load(at + 3 * step, mask=known, other=0)
        bb += tap * tl.load(at + 4 * step, mask=known, other=0)
        ff += tap * tl.load(at + 5 * step, mask=known, other=0)
        af += tap * tl.load(at + 6 * step, mask=known, other=0)
        bf += tap * tl.load(at + 7 * step, mask=known, other=0)
    aa, bb, ff = aa - m_a * m_a, bb - m_b * m_b, ff - m_f * m_f
    return m_a, m_b, m_f, aa, bb, ff, af - m_a * m_f, bf - m_b * m_f


@twin
def _terms(mean_x, mean_f, var_x, var_f, covariance, c1, c2):
    """Luminance, contrast times structure, and their denominators."""
    squares = mean_x * mean_x + mean_f * mean_f + c1
    variances = var_x + var_f + c2
    return (
        (2 * mean_x * mean_f + c1) / squares,
        (2 * covariance + c2) / variances,
        squares,
        variances,
    )


@twin
def _compare(
    rows,
    taps,
    sums,
    planes,
    height,
    out_height,
    out_width,
    c1,
    c2,
    PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """SSIM with a and with b, summed over a tile."""
    plane, y, x, inside = place(out_height, out_width, BLOCK_HEIGHT, BLOCK_WIDTH)
    m_a, m_b, m_f, v_a, v_b, v_f, c_a, c_b = _moments(
        rows, taps, planes, plane, y, x, inside, height, out_width, PAD, WINDOW
    )
    light_a, form_a, _, _ = _terms(m_a, m_f, v_a, v_f, c_a, c1, c2)
    light_b, form_b, _, _ = _terms(m_b, m_f, v_b, v_f, c_b, c1, c2)
    program = tl.program_id(0)
    tl.store(sums + program, tl.sum(tl.where(inside, light_a * form_a, 0.0)))
    sums += tl.num_programs(0)
    tl.store(sums + program, tl.sum(tl.where(inside, light_b * form_b, 0.0)))


@twin
def _partials(mean_x, mean_f, light, form, squares, variances):
    """Slopes of SSIM by the blurred f, x, f² (and x²), and xf."""
    by_f = 2 * form * (mean_x - light * mean_f) / squares
    by_f += 2 * light * (form * mean_f - mean_x) / variances
    by_x = 2 * form * (mean_f - light * mean_x) / squares
    by_x += 2 * light * (form * mean_x - mean_f) / variances
    return by_f, by_x, -light * form / variances, 2 * light / variances


@twin
def _slopes(
    rows,
    taps,
    scales,
    slopes,
    planes,
    height,
    out_height,
    out_width,
    c1,
    c2,
    SOURCES: tl.constexpr,
    PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The loss's slope by each blurred map that matters, in every window."""
    plane, y, x, inside = place(out_height, out_width, BLOCK_HEIGHT, BLOCK_WIDTH)
    m_a, m_b, m_f, v_a, v_b, v_f, c_a, c_b = _moments(
        rows, taps, planes, plane, y, x, inside, height, out_width, PAD, WINDOW
    )
    light_a, form_a, squares_a, variances_a = _terms(m_a, m_f, v_a, v_f, c_a, c1, c2)
    light_b, form_b, squares_b, variances_b = _terms(m_b, m_f, v_b, v_f, c_b, c1, c2)
    f_a, a_f, ff_a, af = _partials(m_a, m_f, light_a, form_a, squares_a, variances_a)
    f_b, b_f, ff_b, bf = _partials(m_b, m_f, light_b, form_b, squares_b, variances_b)
    scale_a, scale_b = tl.load(scales), tl.load(scales + 1)
    size = out_height * out_width
    out = slopes + plane * size + y * out_width + x
    step = planes * tl.full((), size, tl.int64)
    tl.store(out, scale_a * f_a + scale_b * f_b, mask=inside)
    tl.store(out + step, scale_a * ff_a + scale_b * ff_b, mask=inside)
    tl.store(out + 2 * step, scale_a * af, mask=inside)
    tl.store(out + 3 * step, scale_b * bf, mask=inside)
    if SOURCES:
        tl.store(out + 4 * step, scale_a * a_f, mask=inside)
        tl.store(out + 5 * step, scale_a * ff_a, mask=inside)
        tl.store(out + 6 * step, scale_b * b_f, mask=inside)
        tl.store(out + 7 * step, scale_b * ff_b, mask=inside)


@twin
def _blur_columns_back(
    slopes,
    taps,
    columns,
    height,
    out_height,
    out_width,
    PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The transposed blur along the columns: (n, H', W') -> (n, H, W')."""
    plane, y, x, inside = place(height, out_width, BLOCK_HEIGHT, BLOCK_WIDTH)
    total = tl.zeros((BLOCK_HEIGHT, BLOCK_WIDTH), tl.float32)
    for k in tl.static_range(WINDOW):
        row = y - k + PAD
        known = inside & (row >= 0) & (row < out_height)
        at = slopes + plane * out_height * out_width + row * out_width + x
        total += tl.load(taps + k) * tl.load(at, mask=known, other=0)
    tl.store(columns + plane * height * out_width + y * out_width + x, total, mask=inside)


@twin
def _blur_row_back(
    columns, taps, plane, y, x, inside, height, out_width, PAD, WINDOW: tl.constexpr
):
    total = tl.zeros(inside.shape, tl.float32)
    for k in tl.static_range(WINDOW):
        at = x - k + PAD
        known = inside & (at >= 0) & (at < out_width)
        row = columns + plane * height * out_width + y * out_width
        total += tl.load(taps + k) * tl.load(row + at, mask=known, other=0)
    return total


@twin
def _gather(
    a,
    b,
    fused,
    taps,
    columns,
    gradient_a,
    gradient_b,
    gradient_f,
    planes,
    height,
    width,
    out_width,
    NEED_A: tl.constexpr,
    NEED_B: tl.constexpr,
    NEED_F: tl.constexpr,
    PAD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The transposed blur along the rows, and through the products to the pictures."""
    plane, y, x, inside = place(height, width, BLOCK_HEIGHT, BLOCK_WIDTH)
    at = plane * height * width + y * width + x
    pixel_a = tl.load(a + at, mask=inside, other=0).to(tl.float32)
    pixel_b = tl.load(b + at, mask=inside, other=0).to(tl.float32)
    pixel_f = tl.load(fused + at, mask=inside, other=0).to(tl.float32)
    af = _blur_row_back(
        columns, taps, plane + 2 * planes, y, x, inside, height, out_width, PAD, WINDOW
    )
    bf = _blur_row_back(
        columns, taps, plane + 3 * planes, y, x, inside, height, out_width, PAD, WINDOW
    )
    if NEED_F:
        f = _blur_row_back(columns, taps, plane, y, x, inside, height, out_width, PAD, WINDOW)
        ff = _blur_row_back(
            columns, taps, plane + planes, y, x, inside, height, out_width, PAD, WINDOW
        )
        slope = f + 2 * pixel_f * ff + pixel_a * af + pixel_b * bf
        tl.store(gradient_f + at, slope, mask=inside)
    if NEED_A:
        mean = _blur_row_back(
            columns, taps, plane + 4 * planes, y, x, inside, height, out_width, PAD, WINDOW
        )
        square = _blur_row_back(
            columns, taps, plane + 5 * planes, y, x, inside, height, out_width, PAD, WINDOW
        )
        slope = mean + 2 * pixel_a * square + pixel_f * af
        tl.store(gradient_a + at, slope, mask=inside)
    if NEED_B:
        mean = _blur_row_back(
            columns, taps, plane + 6 * planes, y, x, inside, height, out_width, PAD, WINDOW
        )
        square = _blur_row_back(
            columns, taps, plane + 7 * planes, y, x, inside, height, out_width, PAD, WINDOW
        )
        slope = mean + 2 * pixel_b * square + pixel_f * bf
        tl.store(gradient_b + at, slope, mask=inside)
