"""Large pictures in bounded memory: overlapping tiles, blended smoothly."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch


def fuse_tiled(
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    tile: int = 512,
    overlap: int = 64,
) -> torch.Tensor:
    """`network(a, b)` tile by tile, (B, C, H, W) -> (B, C, H, W) on the CPU.

    Neighbouring tiles share `overlap` pixels, across which one fades into the other linearly.
    Where attention sees the whole picture (ReFusion's does) each tile is fused by its own
    statistics, so that the result approximates that of the whole picture.

    Raises:
        ValueError: the overlap is not smaller than half a tile.
    """
    if not 0 <= 2 * overlap < tile:
        raise ValueError(f"overlap {overlap}; expected from 0 to less than half the tile, {tile}")
    height, width = a.shape[-2:]
    total = torch.zeros_like(a, device="cpu")
    weight = torch.zeros(1, 1, height, width)
    for top, bottom in spans(height, tile, overlap):
        for left, right in spans(width, tile, overlap):
            window = (..., slice(top, bottom), slice(left, right))
            fade = torch.outer(
                _fade(top, bottom, height, overlap), _fade(left, right, width, overlap)
            )
            total[window] += network(a[window], b[window]).cpu() * fade
            weight[window] += fade
    return total / weight


def spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Equal stretches of at most `tile` that cover 0 to `length`, sharing at least `overlap`."""
    if length <= tile:
        yield 0, length
        return
    count = -(-(length - overlap) // (tile - overlap))
    for i in range(count):
        start = round(i * (length - tile) / (count - 1))
        yield start, start + tile


def _fade(start: int, stop: int, length: int, overlap: int) -> torch.Tensor:
    """Weights of a stretch: rising over `overlap` pixels at inner edges, 1 at the picture's."""
    ramp = torch.arange(1, stop - start + 1, dtype=torch.float32) / (overlap + 1)
    fade = torch.ones(stop - start)
    if start > 0:
        fade = torch.minimum(fade, ramp)
    if stop < length:
        fade = torch.minimum(fade, ramp.flip(0))
    return fade
