"""What transposed attention takes from the picture: q kᵀ, ‖q‖² and ‖k‖² over the pixels.

Bytes moved for a float32 pixel and channel (q and k have one each):

| | eager | compiled | Triton |
| --- | --- | --- | --- |
| forward | 32 | 16 | 8 |
| backward | 88 | 48 | 16 |

Eager by `traffic.bytes_moved`, compiled from the compiler's own schedule: the products stay library
calls, and squares and sums are operations of their own, so that q and k are read twice. The twin
reads each once and writes next to nothing; backward it also writes the two gradients. Not yet
measured on a GPU.

Source: Zamir et al., Restormer, CVPR 2022, equation 2; the lengths by which q and k are divided
there come from the squares.
"""

from __future__ import annotations

import torch

from fusionkit.kernels._dispatch import (
    backward_is_recorded,
    compiled,
    dot_precision,
    recorded_gradients,
    twin,
    twin_takes,
)

WIDEST = 32  # channels; a program holds them all, and more would not fit its registers
BLOCK_PIXELS = 32
RUN = 2048  # pixels a program adds up
tl = None  # triton.language, once the twin has run


def channel_statistics(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q kᵀ, ‖q‖² and ‖k‖² of (B, C, H, W) twice: (B, C, C), (B, C, 1), (B, C, 1).

    Gradients of all orders by both.
    """
    if q.shape == k.shape and q.shape[1] <= WIDEST and twin_takes(q, k):
        return channel_statistics_twin(q, k)
    return channel_statistics_reference(q, k)


def channel_statistics_reference(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`channel_statistics` in plain PyTorch."""
    q, k = q.flatten(2), k.flatten(2)
    return (
        q @ k.transpose(-1, -2),
        q.square().sum(-1, keepdim=True),
        k.square().sum(-1, keepdim=True),
    )


def channel_statistics_twin(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`channel_statistics` by Triton.

    Computed in float32, the products in TF32 where torch's matrix products may be.
    """
    compiled(globals())
    return _ChannelStatistics.apply(q, k)


class _ChannelStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k):
        batch, channels, height, width = q.shape
        runs = -(-height * width // RUN)
        products = torch.empty(batch, runs, channels, channels, device=q.device)
        squares = torch.empty(2, batch, runs, channels, device=q.device)
        with torch.cuda.device_of(q):
            _forward[(batch * runs,)](
                *(q, k, products, *squares, *q.stride(), *k.stride()),
                *(channels, height, width),
                PRECISION=dot_precision(q, "matmul"),
                RUN=RUN,
                **_blocks(channels),
            )
        ctx.save_for_backward(q, k)
        sums = products.sum(1), *(x.sum(1)[..., None] for x in squares)
        return tuple(x.to(q.dtype) for x in sums)

    @staticmethod
    def backward(ctx, *gradients):
        q, k = ctx.saved_tensors
        if backward_is_recorded():
            return tuple(
                recorded_gradients(
                    channel_statistics_reference, (q, k), ctx.needs_input_grad, gradients
                )
            )
        batch, channels, height, width = q.shape
        found = torch.empty_like(q), torch.empty_like(k)
        blocks = -(-height * width // BLOCK_PIXELS)
        _backward[(batch * blocks,)](
            *(q, k, *(x.contiguous() for x in gradients), *found),
            *(stride for x in (q, k, *found) for stride in x.stride()),
            *(channels, height, width),
            PRECISION=dot_precision(q, "matmul"),
            **_blocks(channels),
        )
        return tuple(
            x if need else None for x, need in zip(found, ctx.needs_input_grad, strict=True)
        )


def _blocks(channels: int) -> dict[str, int]:
    block = max(16, 1 << (channels - 1).bit_length())  # products want 16 at least
    return {"BLOCK_PIXELS": BLOCK_PIXELS, "BLOCK_CHANNELS": block, "num_warps": block // 4}


@twin
def _pixels(pixel, width, stride_y, stride_x):
    """Where the pixels lie in a map."""
    return (pixel // width).to(tl.int64) * stride_y + pixel % width * stride_x


@twin
def _forward(
    q,
    k,
    products,
    q_squares,
    k_squares,
    q_b,
    q_c,
    q_y,
    q_x,
    k_b,
    k_c,
    k_y,
    k_x,
    channels,
    height,
    width,
    PRECISION: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The sums over a run of pixels."""
    program = tl.program_id(0).to(tl.int64)
    runs = tl.cdiv(height * width, RUN)
    item, start = program // runs, (program % runs).to(tl.int32) * RUN
    channel = tl.arange(0, BLOCK_CHANNELS)
    real = channel < channels
    q += item * q_b + channel[:, None].to(tl.int64) * q_c
    k += item * k_b + channel[None, :].to(tl.int64) * k_c
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_CHANNELS), tl.float32)
    q_total = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    k_total = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    for first in range(start, tl.minimum(start + RUN, height * width), BLOCK_PIXELS):
        pixel = first + tl.arange(0, BLOCK_PIXELS)
        known = pixel < height * width
        at = q + _pixels(pixel, width, q_y, q_x)[None, :]
        rows = tl.load(at, mask=real[:, None] & known[None, :], other=0).to(tl.float32)
        at = k + _pixels(pixel, width, k_y, k_x)[:, None]
        columns = tl.load(at, mask=known[:, None] & real[None, :], other=0).to(tl.float32)
        total += tl.dot(rows, columns, input_precision=PRECISION)
        q_total += tl.sum(rows * rows, axis=1)
        k_total += tl.sum(columns * columns, axis=0)
    at = products + (program * channels + channel[:, None]) * channels + channel[None, :]
    tl.store(at, total, mask=real[:, None] & real[None, :])
    tl.store(q_squares + program * channels + channel, q_total, mask=real)
    tl.store(k_squares + program * channels + channel, k_total, mask=real)


@twin
def _backward(
    q,
    k,
    slopes,
    q_slopes,
    k_slopes,
    gradient_q,
    gradient_k,
    q_b,
    q_c,
    q_y,
    q_x,
    k_b,
    k_c,
    k_y,
    k_x,
    gq_b,
    gq_c,
    gq_y,
    gq_x,
    gk_b,
    gk_c,
    gk_y,
    gk_x,
    channels,
    height,
    width,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """∂q = G k + 2 g_q q and ∂k = Gᵀ q + 2 g_k k; G, g_q and g_k are the slopes of the results."""
    program = tl.program_id(0)
    blocks = tl.cdiv(height * width, BLOCK_PIXELS)
    item = (program // blocks).to(tl.int64)
    pixel = program % blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[None, :]
    channel = tl.arange(0, BLOCK_CHANNELS)[:, None]
    real = channel < channels
    known = real & (pixel < height * width)
    wide = channel.to(tl.int64)
    at = q + item * q_b + wide * q_c + _pixels(pixel, width, q_y, q_x)
    q_tile = tl.load(at, mask=known, other=0).to(tl.float32)
    at = k + item * k_b + wide * k_c + _pixels(pixel, width, k_y, k_x)
    k_tile = tl.load(at, mask=known, other=0).to(tl.float32)
    across = tl.trans(channel)
    at = slopes + (item * channels + channel) * channels + across
    slope = tl.load(at, mask=real & (across < channels), other=0).to(tl.float32)
    q_slope = tl.load(q_slopes + item * channels + channel, mask=real, other=0).to(tl.float32)
    k_slope = tl.load(k_slopes + item * channels + channel, mask=real, other=0).to(tl.float32)
    by_q = tl.dot(slope, k_tile, input_precision=PRECISION) + 2 * q_slope * q_tile
    by_k = tl.dot(tl.trans(slope), q_tile, input_precision=PRECISION) + 2 * k_slope * k_tile
    at = gradient_q + item * gq_b + wide * gq_c + _pixels(pixel, width, gq_y, gq_x)
    tl.store(at, by_q, mask=known)
    at = gradient_k + item * gk_b + wide * gk_c + _pixels(pixel, width, gk_y, gk_x)
    tl.store(at, by_k, mask=known)
