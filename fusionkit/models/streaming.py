"""Networks with attention over channels on pictures of any size, exactly, in bounded memory.

Such attention sees the whole picture, but only through a few sums (`kernels.channel_statistics`).
So a stage needs two walks over the tiles of a picture: the first adds up the sums, the second
applies the stage with them. Only one map of features is held at full size, and each stage
overwrites it; everything wider lives as long as a tile. Small tiles also stay in the processor's
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fusionkit.kernels.channel_statistics import channel_statistics


class Tile(NamedTuple):
    """A tile in its picture, without and with its halo, and itself within that halo."""

    inner: tuple[slice, slice]
    outer: tuple[slice, slice]
    core: tuple[slice, slice]


class Walk:
    """Walks over the tiles of (B, C, H, W) feature maps; all of a walk's maps have one H and W.

    Args:
        tile: side of the tiles, without their halo.

    Raises:
        ValueError: the tile is smaller than one pixel.
    """

    def __init__(self, height: int, width: int, tile: int) -> None:
        if tile < 1:
            raise ValueError(f"tile {tile}; expected 1 pixel or more")
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
            last = slice(max(0, inner.stop - halo) - outer.start, inner.stop - outer.start)
            above = strip[..., last, :].clone()
            for tile in row:
                result = function(strip[..., tile.outer[1]].to(torch.float32))
                features[..., *tile.inner] = result[..., *tile.core].to(features.dtype)

    def attend(self, features: torch.Tensor, queries_keys: Callable, finish: Callable) -> None:
        """A stage with attention over the whole picture, in place.

        Args:
            queries_keys: features -> what each of the stage's attentions compares, a list of pairs
                (B, C, H, W); a pixel's depend on one more.
            finish: features and the list of the pairs' `channel_statistics` -> the stage's result,
                where a pixel's depends on two more.
        """
        sums: list[list[torch.Tensor]] = []
        for tile in (tile for row in self.rows(1) for tile in row):
            pairs = queries_keys(features[..., *tile.outer].to(torch.float32))
            inner = [[z[..., *tile.core] for z in pair] for pair in pairs]
            # Added in double precision.
            new = [[s.double() for s in channel_statistics(*pair)] for pair in inner]
            for i, found in enumerate(new):
                if i == len(sums):
                    sums.append(found)
                else:
                    sums[i] = [p + q for p, q in zip(sums[i], found, strict=True)]
        given = [tuple(s.float() for s in each) for each in sums]
        self.update(lambda x: finish(x, given), features, 2)


def _stretches(length: int, tile: int, halo: int) -> list[tuple[slice, slice, slice]]:
    """0 to `length` in equal parts of at most `tile`: inner, outer, and inner within outer."""
    count = -(-length // tile)
    found = []
    for i in range(count):
        start, stop = i * length // count, (i + 1) * length // count
        left, right = max(0, start - halo), min(length, stop + halo)
        found.append((slice(start, stop), slice(left, right), slice(start - left, stop - left)))
    return found
