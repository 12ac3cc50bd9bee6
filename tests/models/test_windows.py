"""Shifted windows, relative positions and MAE's position embedding."""

from __future__ import annotations

import pytest
import torch

from fusionkit.models.windows import (
    RelativePositionBias,
    WindowedBlocks,
    from_windows,
    mirrored,
    sine_cosine_grid,
    to_windows,
)


def test_windows_are_squares_of_the_grid_in_reading_order():
    grid = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    windows = to_windows(grid, 2)
    assert windows.shape == (12, 4, 1)
    assert windows[0].flatten().tolist() == [0, 1, 6, 7]
    assert windows[1].flatten().tolist() == [2, 3, 8, 9]
    assert windows[3].flatten().tolist() == [12, 13, 18, 19]
    assert windows[6].flatten().tolist() == [24, 25, 30, 31]
    torch.testing.assert_close(from_windows(windows, 4, 6, 2), grid)


def test_relative_position_bias_depends_on_the_offset_only():
    bias = RelativePositionBias(3, window=4)
    with torch.no_grad():
        bias.table.copy_(torch.randn(49, 3))
    table, out = bias.table.view(7, 7, 3), bias()
    assert out.shape == (1, 3, 16, 16)
    for query, key in ((0, 0), (5, 2), (15, 0), (3, 12)):
        rows, columns = query // 4 - key // 4, query % 4 - key % 4
        torch.testing.assert_close(out[0, :, query, key], table[rows + 3, columns + 3])


def blocks_touched(blocks: range) -> torch.Tensor:
    """Which tokens of 28×28 change when the top left one does, after these blocks."""
    torch.manual_seed(0)
    network, x = WindowedBlocks(8, 2, 2), torch.randn(1, 28, 28, 8)
    changed = x.clone()
    changed[0, 0, 0, 0] += 9  # not in all channels: the norm would take it out
    with torch.no_grad():
        return (network.run(x, blocks) != network.run(changed, blocks)).any(-1)[0]


def test_even_blocks_see_their_window_and_odd_ones_a_shifted_one():
    inside = torch.zeros(28, 28, dtype=torch.bool)
    inside[:14, :14] = True
    torch.testing.assert_close(blocks_touched(range(1)), inside)
    # Rolled by 7, and wrapped around without a mask.
    torch.testing.assert_close(blocks_touched(range(1, 2)), inside.roll((-7, -7), (0, 1)))
    assert blocks_touched(range(2)).all()


def test_groups_of_windows_give_what_all_give_at_once(monkeypatch):
    torch.manual_seed(0)
    network, x = WindowedBlocks(8, 2, 2), torch.randn(2, 42, 28, 8)  # 12 windows
    kept = x.clone()
    sizes = []
    network.blocks[0].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    network.run(x, range(2))  # with gradients: all at once
    with torch.no_grad():
        whole = network.run(x, range(2))
        monkeypatch.setattr("fusionkit.models.windows.WINDOWS_AT_ONCE", 5)
        grouped = network.run(x, range(2))
    assert sizes == [12, 12, 5, 5, 2]
    torch.testing.assert_close(grouped, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(x, kept, rtol=0, atol=0)


def test_first_block_is_a_transformer_block_in_one_window():
    torch.manual_seed(0)
    network, x = WindowedBlocks(8, 2, 2), torch.randn(2, 14, 14, 8)
    block, tokens = network.blocks[0], x.flatten(1, 2)
    q, k, v = block.attn.qkv(block.norm1(tokens)).view(2, 196, 3, 2, 4).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) / 2 + network.relative_position[0]()
    attended = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    tokens = tokens + block.attn.proj(attended)
    tokens = tokens + block.mlp(block.norm2(tokens))
    torch.testing.assert_close(network.run(x, range(1)).flatten(1, 2), tokens)


def test_two_blocks_share_a_table():
    network = WindowedBlocks(8, 5, 2)
    assert [m.table.shape for m in network.relative_position] == [(27 * 27, 2)] * 3


def test_position_embedding():
    grid = sine_cosine_grid(8, 3)
    assert grid.shape == (1, 8, 3, 3)
    row, column = 2.0, 1.0
    waves = [torch.tensor([x, x / 100]) for x in (column, row)]
    expected = torch.cat([f(x) for x in waves for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(grid[0, :, 2, 1], expected)


def test_second_gradients_through_windows():
    torch.manual_seed(0)
    network = WindowedBlocks(4, 1, 2).double()
    x = torch.randn(1, 14, 14, 4, dtype=torch.float64, requires_grad=True)
    table = network.relative_position[0].table
    first = torch.autograd.grad(network.run(x, range(1)).square().mean(), table, create_graph=True)
    second = torch.autograd.grad(first[0].square().sum(), x)[0]
    assert torch.isfinite(second).all()
    assert second.abs().max() > 0


@pytest.mark.parametrize("rows", [14, 28])
def test_pictures_of_a_batch_do_not_mix(rows):
    torch.manual_seed(0)
    network, x = WindowedBlocks(8, 2, 2), torch.randn(2, rows, 14, 8)
    alone = torch.cat([network.run(x[i : i + 1], range(2)) for i in range(2)])
    torch.testing.assert_close(network.run(x, range(2)), alone)


def test_mirroring_goes_on_as_long_as_needed():
    x = torch.tensor([[[0.0, 1, 2], [3, 4, 5]]])
    assert mirrored(x, 7)[0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2]
    assert mirrored(x, 7)[0, :, 0].tolist() == [0, 3, 0, 3, 0, 3, 0]
    assert mirrored(x[:, :1, :1].expand(1, 4, 4), 4).shape == (1, 4, 4)
