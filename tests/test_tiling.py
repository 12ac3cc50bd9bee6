"""Tiles: they cover the picture, overlap, and leave no trace where the network is local."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from fusionkit.tiling import fuse_tiled, spans


class Function(nn.Module):
    """A network without weights."""

    def __init__(self, function) -> None:
        super().__init__()
        self.forward = function


def pair(height: int, width: int, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 1, channels, height, width, generator=generator))


@pytest.mark.parametrize(("tile", "overlap"), [(16, 0), (16, 3), (16, 7), (32, 4), (9, 4)])
def test_spans_cover_and_overlap(tile, overlap):
    for length in range(1, 150):
        found = list(spans(length, tile, overlap))
        assert found[0][0] == 0
        assert found[-1][1] == length
        assert {stop - start for start, stop in found} == {min(tile, length)}
        for (_, stop), (start, _) in pairwise(found):
            assert stop - start >= overlap
        # No tile could be left out.
        assert len(found) == 1 or (len(found) - 1) * (tile - overlap) + overlap < length


@pytest.mark.parametrize("size", [(64, 64), (131, 157), (33, 500), (65, 32), (31, 32), (9, 8)])
@pytest.mark.parametrize("overlap", [0, 5, 15])
@pytest.mark.parametrize(
    "network",
    [lambda a, b: a, torch.maximum, lambda a, b: torch.sigmoid(a - 2 * b)],
    ids=["identity", "maximum", "pointwise"],
)
def test_a_pointwise_network_is_reproduced(size, overlap, network):
    a, b = pair(*size)
    fused = fuse_tiled(Function(network), a, b, tile=32, overlap=overlap)
    torch.testing.assert_close(fused, network(a, b), rtol=0, atol=1e-6)


def test_the_network_sees_whole_tiles_and_little_more_than_needed():
    seen = []

    def network(a, b):
        assert a.shape == b.shape
        seen.append(tuple(a.shape[-2:]))
        return a

    fuse_tiled(Function(network), *pair(50, 90), tile=32, overlap=4)
    assert seen == [(32, 32)] * (2 * 4)
    seen.clear()
    fuse_tiled(Function(network), *pair(20, 90), tile=32, overlap=4)
    assert seen == [(20, 32)] * 4
    seen.clear()
    fuse_tiled(Function(network), *pair(32, 32), tile=32, overlap=4)
    assert seen == [(32, 32)]


def test_batches_and_colour_pass():
    a = torch.rand(2, 3, 40, 50)
    torch.testing.assert_close(fuse_tiled(Function(lambda a, b: (a + b) / 2), a, a, 16, 4), a)


def test_neighbouring_tiles_fade_into_each_other():
    """Tiles that disagree, by their own mean, meet in a ramp and not in a step."""
    a = torch.linspace(0, 1, 112).expand(1, 1, 40, 112)
    fused = fuse_tiled(Function(lambda a, b: a.mean().expand_as(a)), a, a, tile=64, overlap=16)
    steps = fused.diff(dim=-1)
    rise = fused.max() - fused.min()
    assert rise > 0.3
    assert (steps >= -1e-6).all()
    assert steps.max() < 1.2 * rise / 17  # 16 shared columns: 17 equal steps
    torch.testing.assert_close(fused[0, 0], fused[0, 0, :1].expand(40, 112))


@pytest.mark.parametrize(("tile", "overlap"), [(32, 16), (32, -1), (8, 5), (0, 0)])
def test_too_much_overlap_is_refused(tile, overlap):
    with pytest.raises(ValueError, match=f"overlap {overlap}; expected.*{tile}"):
        fuse_tiled(Function(lambda a, b: a), *pair(64, 64), tile=tile, overlap=overlap)
