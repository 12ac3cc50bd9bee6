"""A plain vision transformer whose attention runs in shifted windows, as TC-MoA runs MAE's.

Tokens are grids (B, rows, columns, C); the blocks are timm's. Source: Zhu et al., TC-MoA, CVPR
2024, and its release; windows and relative positions as in Liu et al., Swin Transformer, ICCV 2021.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import nn

from fusionkit.models.onednn import with_onednn

WINDOW = 14
WINDOWS_AT_ONCE = 16  # 3136 tokens; from here on, two CPU cores gain nothing by more


class RelativePositionBias(nn.Module):
    """What attention adds for each pair of tokens in a window, by their offset. Learned.

    () -> (1, heads, window², window²), to be added to the logits. The table has a row for each of
    the (2·window - 1)² offsets, query minus key, rows first.
    """

    def __init__(self, heads: int, window: int = WINDOW) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.normal_(self.table, std=0.02)
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        places = torch.stack([rows, columns]).flatten(1)
        offsets = places[:, :, None] - places[:, None, :] + window - 1
        index = offsets[0] * (2 * window - 1) + offsets[1]
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> torch.Tensor:
        return self.table[self.index].permute(2, 0, 1)[None]


def to_windows(x: torch.Tensor, window: int = WINDOW) -> torch.Tensor:
    """(B, rows, columns, C) -> (B·windows, window², C); rows and columns multiples of window."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x: torch.Tensor, rows: int, columns: int, window: int = WINDOW) -> torch.Tensor:
    """(B·windows, window², C) -> (B, rows, columns, C): undoes `to_windows`."""
    x = x.unflatten(1, (window, window))
    x = x.unflatten(0, (-1, rows // window, columns // window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def transformer_blocks(
    width: int, depth: int, heads: int, mlp_layer: type[nn.Module] = Mlp
) -> nn.ModuleList:
    """`depth` pre-norm transformer blocks with MLP ratio 4, as MAE's."""
    norm = partial(nn.LayerNorm, eps=1e-6)
    blocks = nn.ModuleList(
        Block(width, heads, qkv_bias=True, norm_layer=norm, mlp_layer=mlp_layer)
        for _ in range(depth)
    )
    return with_onednn(blocks)


def start_as_mae(module: nn.Module) -> None:
    """Draw the weights of all linear layers in `module` anew, as MAE does."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class WindowedBlocks(nn.Module):
    """`depth` transformer blocks with MLP ratio 4, attention in windows of 14×14 tokens.

    Every second block rolls the grid by half a window before and back after, so that tokens meet
    across windows. No mask separates what the roll wraps around, as in the release. Blocks 2i and
    2i + 1 share a table of relative positions.
    """

    def __init__(
        self, width: int, depth: int, heads: int, mlp_layer: type[nn.Module] = Mlp
    ) -> None:
        super().__init__()
        self.blocks = transformer_blocks(width, depth, heads, mlp_layer)
        self.relative_position = nn.ModuleList(
            RelativePositionBias(heads) for _ in range((depth + 1) // 2)
        )
        start_as_mae(self.blocks)

    def run(self, x: torch.Tensor, blocks: range) -> torch.Tensor:
        """Pass (B, rows, columns, C) through these blocks; both sides are multiples of 14."""
        rows, columns = x.shape[1:3]
        for i in blocks:
            shift = WINDOW // 2 if i % 2 else 0
            if shift:
                x = x.roll((-shift, -shift), (1, 2))
            # Norms, MLP and residuals work token by token, so the whole block may see windows.
            bias = self.relative_position[i // 2]()
            x = from_windows(_through(self.blocks[i], to_windows(x), bias), rows, columns)
            if shift:
                x = x.roll((shift, shift), (1, 2))
        return x


def _through(block: nn.Module, windows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`block(windows)`; on a CPU some windows at a time if nothing is kept for a gradient."""
    # The MLP's hidden tokens are the largest of all tensors, and no faster to compute at once.
    at_once = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if at_once or windows.device.type != "cpu":
        return block(windows, attn_mask=bias)
    return torch.cat([block(group, attn_mask=bias) for group in windows.split(WINDOWS_AT_ONCE)])


def sine_cosine_grid(width: int, side: int = 14) -> torch.Tensor:
    """MAE's fixed position embedding, (1, width, side, side).

    The first half of the channels encodes the column and the second the row: sines, then cosines,
    of the index times 10000^(-4k / width) for k = 0 ... width/4 - 1.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[None] * frequencies[:, None]
    waves = torch.cat([angles.sin(), angles.cos()]).float()
    along_columns = waves[:, None, :].expand(-1, side, -1)
    along_rows = waves[:, :, None].expand(-1, -1, side)
    return torch.cat([along_columns, along_rows])[None]


def mirrored(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """(..., H, W) continued by mirroring, at the bottom and right, to multiples of `multiple`.

    Unlike reflection padding it goes on mirroring where more is needed than there is.
    """
    for dim in (-2, -1):
        side = x.shape[dim]
        wanted = -(-side // multiple) * multiple
        if wanted > side:
            index = torch.arange(wanted, device=x.device) % (2 * side - 2)
            x = x.index_select(dim, torch.where(index < side, index, 2 * side - 2 - index))
    return x
