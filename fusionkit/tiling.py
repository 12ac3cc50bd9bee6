"""Large pictures in bounded memory: overlapping tiles, blended smoothly."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def fuse_tiled(
    network: nn.Module, a: torch.Tensor, b: torch.Tensor, tile: int = 768, overlap: int = 96
) -> torch.Tensor:
    """`network(a, b)` tile by tile, (B, C, H, W) -> (B, C, H, W) on the CPU.

    Neighbouring tiles share `overlap` pixels, across which one fades into the other linearly.

    Exact for a network whose result at a pixel depends on less than `overlap` around it, but for
    the fading; a network that sees the whole picture offers `stream` instead.

    Raises:
        ValueError: the overlap is not smaller than half a tile.
    """
    if not 0 <= 2 * overlap < tile:
        raise ValueError(f"overlap {overlap}; expected from 0 to less than half the tile, {tile}")
    windows = list(_windows(a, tile, overlap))
    height, width = a.shape[-2:]
    total = torch.zeros_like(a, device="cpu")
    weight = torch.zeros(1, 1, height, width)
    for window in windows:
        rows, columns = window[1:]
        fade = torch.outer(_fade(rows, height, overlap), _fade(columns, width, overlap))
        total[window] += _run(network, a, b, window) * fade
        weight[window] += fade
    return total / weight


def _run(network: nn.Module, a: torch.Tensor, b: torch.Tensor, window: tuple) -> torch.Tensor:
    device = next((p.device for p in network.parameters()), a.device)
    return network(a[window].to(device), b[window].to(device)).cpu()


def _windows(image: torch.Tensor, tile: int, overlap: int) -> Iterator[tuple]:
    height, width = image.shape[-2:]
    for top, bottom in spans(height, tile, overlap):
        for left, right in spans(width, tile, overlap):
            yield ..., slice(top, bottom), slice(left, right)


def spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Equal stretches of at most `tile` that cover 0 to `length`, sharing at least `overlap`."""
    if length <= tile:
        yield 0, length
        return
    count = -(-(length - overlap) // (tile - overlap))
    for i in range(count):
        start = round(i * (length - tile) / (count - 1))
        yield start, start + tile


def _fade(span: slice, length: int, overlap: int) -> torch.Tensor:
    """Weights of a stretch: rising over `overlap` pixels at inner edges, 1 at the picture's."""
    size = span.stop - span.start
    ramp = torch.arange(1, size + 1, dtype=torch.float32) / (overlap + 1)
    fade = torch.ones(size)
    if span.start > 0:
        fade = torch.minimum(fade, ramp)
    if span.stop < length:
        fade = torch.minimum(fade, ramp.flip(0))
    return fade
