"""Blocks of the unfolding networks, from timm: a Swin V2 layer for any size, a ConvNeXt V2 block.

Sources: Liu et al., Swin Transformer V2, CVPR 2022; Woo et al., ConvNeXt V2, CVPR 2023.
"""

from __future__ import annotations

import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import nn


class NormedSwin(nn.Module):
    """LayerNorm, a Swin V2 layer of two blocks, LayerNorm; no residual goes around it.

    (B, dim, H, W) -> the same; H and W are multiples of `window`. The second block is shifted by
    half a window. Its mask and the tables of positions are computed: checkpoints have none.
    """

    def __init__(self, dim: int, heads: int, window: int, mlp_ratio: float = 3.0) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.blocks = nn.Sequential(
            *(
                SwinTransformerV2Block(
                    dim,
                    input_resolution=window,  # any, as the mask follows the input
                    num_heads=heads,
                    window_size=window,
                    shift_size=shift,
                    always_partition=True,
                    dynamic_mask=True,
                    mlp_ratio=mlp_ratio,
                )
                for shift in (0, window // 2)
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm_in(x.permute(0, 2, 3, 1))
        return self.norm_out(self.blocks(tokens)).permute(0, 3, 1, 2)


def convnext_block(dim: int) -> ConvNeXtBlock:
    """A ConvNeXt V2 block: 7×7 depth-wise, norm, 4·dim with GRN, back, plus identity."""
    return ConvNeXtBlock(dim, use_grn=True, ls_init_value=None)
