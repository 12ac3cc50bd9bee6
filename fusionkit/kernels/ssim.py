"""SSIM as a loss: of two pictures, and of the fused picture against both sources at once.

Bytes moved for a float32 pixel and channel by SSIM of fused against a and b, with a gradient for
the fused picture alone, in an 11×11 window:

| | eager | compiled | Triton |
| --- | --- | --- | --- |
| forward | 640 | 204 | 76 |
| backward | 1152 | 288 | 112 |

Eager by `traffic.bytes_moved`; compiled from the compiler's own schedule: the two convolutions of
eight maps stay as they are, and all before and after them is one operation each. The twin blurs the
rows of eight products as it forms them (three maps read, eight written), and the columns as it
compares (eight read); its backward pass does the transposed blurs in the same way. Not yet measured
on a GPU.

Source: Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from fusionkit.kernels import _ssim_triton as kernels
from fusionkit.kernels._dispatch import (
    backward_is_recorded,
    compiled,
    recorded_gradients,
    twin_takes,
)
from fusionkit.kernels._tiles import BLOCK, tiles

C1, C2 = 0.01**2, 0.03**2  # for pictures in [0, 1]
LARGEST_WINDOW = 11


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
    compiled(vars(kernels))
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
            kernels.blur_rows[(tiles(planes, height, out_width),)](
                *(a, b, fused, taps, rows, planes, height, width, out_width), **sizes
            )
            kernels.compare[(programs,)](
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
        kernels.slopes[(tiles(planes, out_height, out_width),)](
            *(rows, taps, scales, slopes, planes, height, out_height, out_width, C1, C2),
            SOURCES=count == 8,
            **ctx.sizes,
        )
        columns = rows.new_empty(count, planes, height, out_width)
        kernels.blur_columns_back[(tiles(count * planes, height, out_width),)](
            *(slopes, taps, columns, height, out_height, out_width), **ctx.sizes
        )
        found = [
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else None
            for x, need in zip((a, b, fused), needed, strict=True)
        ]
        kernels.gather[(tiles(planes, height, width),)](
            *(a, b, fused, taps, columns),
            *(columns if gradient is None else gradient for gradient in found),
            *(planes, height, width, out_width),
            NEED_A=needed[0],
            NEED_B=needed[1],
            NEED_F=needed[2],
            **ctx.sizes,
        )
        return *found, None, None
