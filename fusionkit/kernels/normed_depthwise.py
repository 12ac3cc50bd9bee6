"""Layer norm over channels, 1×1 and depth-wise 3×3 convolution: the start of Restormer's halves.

`normed_depthwise` gives attention its queries, keys and values, C to 3·C channels;
`normed_gated_depthwise` is the feed-forward through its gate, C to 4·C and gated to 2·C.

Bytes moved for a float32 pixel and channel of x, forward, channels last:

| | eager | compiled | Triton |
| --- | --- | --- | --- |
| normed_depthwise | 48 | 48 | 16 |
| normed_gated_depthwise | 100 | 84 | 12 |

Eager by `traffic.bytes_moved`, compiled from the compiler's own schedule: it makes the norm, each
convolution, and the gate one operation each. The twin reads x and writes the result. Not yet
measured on a GPU.

The twin has no backward pass, and steps aside where one may be asked for: the gradients of the
weights read all maps between, which would have to be computed again, and training would gain less
than 1.5 times. Nor has the norm a twin of its own: forward there is nothing to gain, and with its
backward pass less than 1.5 times (`traffic.table`).

Source: Zamir et al., Restormer, CVPR 2022, equations 1 and 3.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fusionkit.kernels._dispatch import compiled, dot_precision, twin, twin_takes

WIDEST = 32  # channels of x; a program holds them all, and more would not fit its registers
BLOCK = {"BLOCK_ROWS": 16, "BLOCK_WIDTH": 64}
tl = None  # triton.language, once the twin has run


def normed_depthwise_takes(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether the twins can do x with these weights: they have no gradient.

    Where not, the modules that own the weights do it one by one, as on a CPU.
    """
    recorded = torch.is_grad_enabled() and any(z.requires_grad for z in (x, *weights))
    mixed = torch.is_autocast_enabled(x.device.type)  # the norm in float32, all else in bf16
    return not recorded and not mixed and x.shape[1] <= WIDEST and twin_takes(x, *weights)


def normed_depthwise_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    taps: torch.Tensor,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Depth-wise 3×3 of 1×1 of layer norm: (B, C, H, W) -> (B, D, H, W), zero-padded.

    Args:
        norm_weight, norm_bias: of the norm over the C channels of each pixel, (C,).
        weight: of the 1×1 convolution, (D, C, 1, 1).
        taps: of the depth-wise convolution, (D, 1, 3, 3).
    """
    x = F.layer_norm(x.permute(0, 2, 3, 1), norm_weight.shape, norm_weight, norm_bias, eps)
    mixed = F.conv2d(x.permute(0, 3, 1, 2), weight)
    return F.conv2d(mixed, taps, padding=1, groups=len(taps))


def normed_gated_depthwise_reference(
    x, norm_weight, norm_bias, weight, taps, eps=1e-5
) -> torch.Tensor:
    """The same, (B, D / 2, H, W): GELU of the first half of the channels times the second."""
    maps = normed_depthwise_reference(x, norm_weight, norm_bias, weight, taps, eps)
    gate, value = maps.chunk(2, dim=1)
    return F.gelu(gate) * value


def normed_depthwise_twin(x, norm_weight, norm_bias, weight, taps, eps=1e-5) -> torch.Tensor:
    """`normed_depthwise_reference` by Triton; see `_launched`."""
    return _launched(x, norm_weight, norm_bias, weight, taps, eps, gated=False)


def normed_gated_depthwise_twin(x, norm_weight, norm_bias, weight, taps, eps=1e-5) -> torch.Tensor:
    """`normed_gated_depthwise_reference` by Triton; see `_launched`."""
    return _launched(x, norm_weight, norm_bias, weight, taps, eps, gated=True)


def _launched(x, norm_weight, norm_bias, weight, taps, eps, gated: bool) -> torch.Tensor:
    """Computed in float32, or in TF32 where torch's convolutions may be; the memory format is kept.

    No gradient.
    """
    compiled(globals())
    batch, channels, height, width = x.shape
    out_channels = len(weight) // 2 if gated else len(weight)
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    out = torch.empty(
        (batch, out_channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    block = max(16, 1 << (channels - 1).bit_length())  # products want 16 at least
    strips = -(-width // (BLOCK["BLOCK_WIDTH"] - 2))
    programs = batch * -(-height // BLOCK["BLOCK_ROWS"]) * strips * -(-out_channels // block)
    with torch.cuda.device_of(x), torch.no_grad():
        _forward[(programs,)](
            *(x, norm_weight.contiguous(), norm_bias.contiguous(), weight.flatten(1).contiguous()),
            *(taps.contiguous(), out, *x.stride(), *out.stride()),
            *(eps, channels, out_channels, height, width),
            GATED=gated,
            PRECISION=dot_precision(x, "conv"),
            BLOCK_CHANNELS=block,
            num_warps=block // 4,
            **BLOCK,
        )
    return out


@twin
def _normed(x, weight, bias, eps, channel, channels, inside):
    """Layer norm over the rows, which are the channels, of a (channels, pixels) tile."""
    known = channel < channels
    value = tl.load(x, mask=inside & known, other=0).to(tl.float32)
    value = tl.where(known, value - tl.sum(value, axis=0, keep_dims=True) / channels, 0.0)
    variance = tl.sum(value * value, axis=0, keep_dims=True) / channels
    scale = tl.load(weight + channel, mask=known, other=0).to(tl.float32)
    shift = tl.load(bias + channel, mask=known, other=0).to(tl.float32)
    return value / tl.sqrt(variance + eps) * scale + shift


@twin
def _mixed(normed, weight, channel, channels, out, known, inside, PRECISION: tl.constexpr):
    """The 1×1 convolution to the channels `out` (n, 1); 0 beyond the picture, as the padding."""
    at = weight + out * channels + tl.trans(channel)
    matrix = tl.load(at, mask=known & (tl.trans(channel) < channels), other=0).to(tl.float32)
    return tl.where(inside, tl.dot(matrix, normed, input_precision=PRECISION), 0.0)


@twin
def _across(left, here, right, taps, out, known, row: tl.constexpr):
    """One row of the depth-wise convolution's taps."""
    at = taps + out * 9 + row * 3
    total = tl.load(at, mask=known, other=0).to(tl.float32) * left
    total += tl.load(at + 1, mask=known, other=0).to(tl.float32) * here
    return total + tl.load(at + 2, mask=known, other=0).to(tl.float32) * right


@twin
def _rows(
    normed,
    weight,
    taps,
    channel,
    channels,
    out,
    known,
    inside,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What a row of the picture gives to the rows of the result below it, at it and above it."""
    here = _mixed(normed, weight, channel, channels, out, known, inside, PRECISION)
    at = tl.arange(0, WIDTH)[None, :] + tl.zeros(here.shape, tl.int32)
    left = tl.gather(here, tl.maximum(at - 1, 0), 1)
    right = tl.gather(here, tl.minimum(at + 1, WIDTH - 1), 1)
    return (
        _across(left, here, right, taps, out, known, 0),
        _across(left, here, right, taps, out, known, 1),
        _across(left, here, right, taps, out, known, 2),
    )


@twin
def _forward(
    x,
    norm_weight,
    norm_bias,
    weight,
    taps,
    out,
    x_b,
    x_c,
    x_y,
    x_x,
    out_b,
    out_c,
    out_y,
    out_x,
    eps,
    channels,
    out_channels,
    height,
    width,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """A strip of pixels with one more at each end, walked down from one row above to one below.

    So every pixel is normed and mixed once for a block of output channels, which is what a program
    has; programs for the other blocks are its neighbours, and find x in the cache.
    """
    program = tl.program_id(0)
    blocks, strips = tl.cdiv(out_channels, BLOCK_CHANNELS), tl.cdiv(width, BLOCK_WIDTH - 2)
    bands = tl.cdiv(height, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_CHANNELS)[:, None]
    wanted = program % blocks * BLOCK_CHANNELS + channel
    known = wanted < out_channels
    strip = tl.arange(0, BLOCK_WIDTH)[None, :]
    column = (program // blocks) % strips * (BLOCK_WIDTH - 2) - 1 + strip
    within = (column >= 0) & (column < width)
    own = known & (strip > 0) & (strip < BLOCK_WIDTH - 1) & (column < width)
    top = (program // blocks // strips) % bands * BLOCK_ROWS
    item = (program // blocks // strips // bands).to(tl.int64)
    x += item * x_b + channel.to(tl.int64) * x_c + column * x_x
    out += item * out_b + wanted.to(tl.int64) * out_c + column * out_x
    zero = tl.zeros((BLOCK_CHANNELS, BLOCK_WIDTH), tl.float32)
    above, middle, above_value, middle_value = zero, zero, zero, zero
    for row in range(top - 1, tl.minimum(top + BLOCK_ROWS, height) + 1):
        line = row + tl.zeros(column.shape, tl.int64)  # a map may have more than 2^31 numbers
        inside = within & (line >= 0) & (line < height)
        normed = _normed(x + line * x_y, norm_weight, norm_bias, eps, channel, channels, inside)
        below, at, up = _rows(
            normed, weight, taps, channel, channels, wanted, known, inside, PRECISION, BLOCK_WIDTH
        )
        result = above + up
        above, middle = middle + at, below
        if GATED:
            second = wanted + out_channels
            below, at, up = _rows(
                *(normed, weight, taps, channel, channels, second, known, inside),
                *(PRECISION, BLOCK_WIDTH),
            )
            gate = 0.5 * result * (1 + tl.erf(result * 0.7071067811865476))
            result = gate * (above_value + up)
            above_value, middle_value = middle_value + at, below
        tl.store(out + (line - 1) * out_y, result, mask=own & (line > top))
