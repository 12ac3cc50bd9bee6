"""The Triton side of `ssim`: its five kernels, and what they share.

Maps lie one after another, (maps, planes, H, W), the planes being the channels of all pictures.
"""

from __future__ import annotations

from fusionkit.kernels._dispatch import twin
from fusionkit.kernels._tiles import place

tl = None  # triton.language, once the twin has run


@twin
def blur_rows(
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
def compare(
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
def slopes(
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
def blur_columns_back(
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
def gather(
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
