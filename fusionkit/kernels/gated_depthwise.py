"""Depth-wise 3×3 convolution with a GELU gate: the heart of Restormer's feed-forward, GDFN.

Bytes moved for a float32 pixel and hidden channel, forward: eager 36 (by `traffic.bytes_moved`: the
convolution reads and writes two maps, GELU one each, the product reads two and writes one),
compiled 28 (its schedule: the convolution, then all else at once), Triton 12 (two maps read, one
written). Not yet measured on a GPU.

The twin has no backward pass, and steps aside where one may be asked for: training reads and writes
the same maps again for the convolution's two gradients, so it would gain nothing.

Source: Zamir et al., Restormer, CVPR 2022, equation 3.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fusionkit.kernels._dispatch import compiled, twin, twin_takes

BLOCK = 512
tl = None  # triton.language, once the twin has run


def gated_depthwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """GELU(gate) · value of the depth-wise convolved x: (B, 2·C, H, W) -> (B, C, H, W).

    Zero-padded, without bias; the first C channels are the gate.

    Args:
        weight: of the convolution, (2·C, 1, 3, 3).
    """
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not recorded and twin_takes(x, weight):
        return gated_depthwise_twin(x, weight)
    return gated_depthwise_reference(x, weight)


def gated_depthwise_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`gated_depthwise` in plain PyTorch."""
    gate, value = F.conv2d(x, weight, padding=1, groups=len(weight)).chunk(2, dim=1)
    return F.gelu(gate) * value


def gated_depthwise_twin(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`gated_depthwise` by Triton, computed in float32; the memory format is kept, no gradient."""
    compiled(globals())
    batch, channels, height, width = x.shape[0], x.shape[1] // 2, *x.shape[2:]
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(
        (batch, channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format,
    )
    # Neighbours in memory belong to one program: channels of a pixel, or pixels of a channel.
    block_channels = min(1 << (channels - 1).bit_length(), 32) if channels_last else 1
    block_pixels = BLOCK // block_channels
    programs = batch * -(-channels // block_channels) * -(-(height * width) // block_pixels)
    with torch.cuda.device_of(x), torch.no_grad():
        _forward[(programs,)](
            *(x, weight.contiguous(), out, *x.stride(), *out.stride(), channels, height, width),
            BLOCK_PIXELS=block_pixels,
            BLOCK_CHANNELS=block_channels,
        )
    return out


@twin
def _convolved(
    x, weight, channel, y, column, known, stride_c, stride_y, stride_x, height, width, zero
):
    """The convolution at (pixels, channels)."""
    total = zero
    for down in tl.static_range(-1, 2):
        for right in tl.static_range(-1, 2):
            row, at = y + down, column + right
            inside = known & (row >= 0) & (row < height) & (at >= 0) & (at < width)
            place = x + channel * stride_c + row * stride_y + at * stride_x
            tap = tl.load(weight + channel * 9 + (down + 1) * 3 + right + 1, mask=known, other=0)
            total += tap.to(tl.float32) * tl.load(place, mask=inside, other=0).to(tl.float32)
    return total


@twin
def _forward(
    x,
    weight,
    out,
    x_b,
    x_c,
    x_y,
    x_x,
    out_b,
    out_c,
    out_y,
    out_x,
    channels,
    height,
    width,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    pixel_blocks = tl.cdiv(height * width, BLOCK_PIXELS)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    pixel = (program % pixel_blocks) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[:, None]
    channel = (program // pixel_blocks) % channel_blocks * BLOCK_CHANNELS
    channel += tl.arange(0, BLOCK_CHANNELS)[None, :]
    item = (program // pixel_blocks // channel_blocks).to(tl.int64)
    y, column = pixel // width, pixel % width
    known = (pixel < height * width) & (channel < channels)
    channel = channel.to(tl.int64)  # a map of all channels may pass 2^31 numbers
    zero = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    x += item * x_b
    gate = _convolved(x, weight, channel, y, column, known, x_c, x_y, x_x, height, width, zero)
    value = _convolved(
        x, weight, channel + channels, y, column, known, x_c, x_y, x_x, height, width, zero
    )
    gated = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * value
    tl.store(out + item * out_b + channel * out_c + y * out_y + column * out_x, gated, mask=known)
