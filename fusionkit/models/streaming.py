"""Networks with attention over channels on pictures of any size, exactly, in bounded memory.

Such attention sees the whole picture, but only through a few sums (`blocks.ChannelStatistics`).
So a stage needs two walks over the tiles of a picture: the first adds up the sums, the second
applies the stage with them. Only one map of features is held at full size, and each stage
overwrites it; everything wider lives as long as a tile. Small tiles also stay in the processor's
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from fusionkit.models.blocks import ChannelStatistics, RestormerBlock


class Tile(NamedTuple):
    """A tile in its picture, without and with its halo, and itself within that halo."""

    inner: tuple[slice, slice]
    outer: tuple[slice, slice]
    core: tuple[slice, slice]


class Walk:
    """Walks over the tiles of (B, C, H, W) feature maps; all of a walk's maps have one H and W.

    Args:
        tile: side of the tiles, without their halo.
    """

    def __init__(self, height: int, width: int, tile: int) -> None:
        self.height, self.width, self.tile = height, width, tile

    def rows(self, halo: int) -> Iterator[list[Tile]]:
        """The tiles, from left to right, row of tiles by row of tiles."""
        for y in _stretches(self.height, self.tile, halo):
            yield [Tile(*zip(y, x, strict=True)) for x in _stretches(self.width, self.tile, halo)]

    def read(self, function: Callable, features: torch.Tensor, out: torch.Tensor, halo: int):
        """out = function(features), tile by tile, where a pixel's result depends on `halo` more."""
        for tile in (tile for row in self.rows(halo) for tile in row):
            result = function(features[..., *tile.outer].to(torch.float32))
            out[..., *tile.inner] = result[..., *tile.core]

    def update(self, function: Callable, features: torch.Tensor, halo: int) -> None:
        """features = function(features), in place."""
        above = features[..., :0, :]
        for row in self.rows(halo):
            (inner, _), (outer, _), _ = row[0]
            # What is above was overwritten, so the last rows before that were put by.
            strip = torch.cat([above, features[..., inner.start : outer.stop, :]], dim=-2)
            above = features[..., max(0, inner.stop - halo) : inner.stop, :].clone()
            for tile in row:
                result = function(strip[..., tile.outer[1]].to(torch.float32))
                features[..., *tile.inner] = result[..., *tile.core].to(features.dtype)

    def statistics(
        self, function: Callable, features: torch.Tensor, halo: int, within: nn.Module
    ) -> dict[nn.Module, tuple]:
        """The sums over the picture of every `ChannelStatistics` in `within`, called by `function`.

        They are added in double precision.
        """
        sums: dict[nn.Module, tuple] = {}
        tiles = [tile for row in self.rows(halo) for tile in row]
        for tile in tiles:

            def add(module: nn.Module, inputs: tuple, output: tuple) -> None:
                inner = (z[..., *tile.core] for z in inputs)  # noqa: B023 (it lives as long as this tile)
                new = [s.double() for s in type(module).forward(module, *inner)]
                old = sums.get(module, (0,) * len(new))
                sums[module] = tuple(p + q for p, q in zip(old, new, strict=True))

            with _hooked(within, add):
                function(features[..., *tile.outer].to(torch.float32))
        return {module: tuple(s.float() for s in total) for module, total in sums.items()}

    def attend(
        self, function: Callable, attention: Callable, features: torch.Tensor, module: nn.Module
    ) -> None:
        """features = function(features) in place, with attention over the whole picture.

        `attention` is as much of `function` as it takes to call every `ChannelStatistics` of
        `module`, and depends on one pixel more; `function` on two.
        """
        sums = self.statistics(attention, features, 1, module)
        with _hooked(module, lambda called, inputs, output: sums[called]):
            self.update(function, features, 2)

    def block(self, block: RestormerBlock, features: torch.Tensor) -> None:
        """features = block(features), in place."""
        self.attend(block, lambda x: block.attention(block.norm1(x)), features, block)


def _stretches(length: int, tile: int, halo: int) -> list[tuple[slice, slice, slice]]:
    """0 to `length` in equal parts of at most `tile`: inner, outer, and inner within outer."""
    count = -(-length // tile)
    found = []
    for i in range(count):
        start, stop = i * length // count, (i + 1) * length // count
        left, right = max(0, start - halo), min(length, stop + halo)
        found.append((slice(start, stop), slice(left, right), slice(start - left, stop - left)))
    return found


@contextmanager
def _hooked(module: nn.Module, hook: Callable) -> Iterator[None]:
    handles = [
        m.register_forward_hook(hook) for m in module.modules() if isinstance(m, ChannelStatistics)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
