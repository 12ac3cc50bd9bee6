"""ColorNet: the colour of a fused picture, for multi-exposure pairs.

Source: Wang et al., the gradient-transfer paper (FRUFN, EFRUFN), stage 2b of the authors' release.
"""

from __future__ import annotations

import torch
from torch import nn

from fusionkit.models.blocks import conv3x3
from fusionkit.models.swin import convnext_block


class ColorNet(nn.Module):
    """Chroma of the fused picture from its luminance and both sources' chroma (132,336 parameters).

    New weights give the plain mean of both sources' chroma, exactly: no path leads around the
    network, and from random weights a short training is spent on learning to copy.

    Args:
        width: channels of the blocks.
        blocks: ConvNeXt V2 blocks.
    """

    def __init__(self, width: int = 48, blocks: int = 6) -> None:
        super().__init__()
        self.conv_in = conv3x3(5, width)
        self.blocks = nn.Sequential(*(convnext_block(width) for _ in range(blocks)))
        self.conv_out = conv3x3(width, 2)
        self._start_as_mean()

    def forward(
        self, fused: torch.Tensor, chroma_a: torch.Tensor, chroma_b: torch.Tensor
    ) -> torch.Tensor:
        """Luminance (B, 1, H, W) and twice CbCr (B, 2, H, W) -> CbCr (B, 2, H, W), not clamped.

        All in [0, 1], the neutral chroma is 0.5, as in `fusionkit.color`; a is the under-exposed
        source. Any H and W.

        Raises:
            ValueError: the channels are not 1, 2 and 2.
        """
        channels = [x.shape[1] for x in (fused, chroma_a, chroma_b)]
        if channels != [1, 2, 2]:
            raise ValueError(f"{channels} channels; expected luminance 1 and chroma 2 and 2")
        # The authors' weights know the order Cr, Cb.
        given = torch.cat([fused, chroma_a.flip(1), chroma_b.flip(1)], dim=1)
        return self.conv_out(self.blocks(self.conv_in(given))).flip(1)

    @torch.no_grad()
    def _start_as_mean(self) -> None:
        """The first two features carry the means of Cr and Cb; the others have no say yet."""
        self.conv_in.weight[:2] = 0
        self.conv_out.weight.zero_()
        for k in range(2):
            self.conv_in.weight[k, [1 + k, 3 + k], 1, 1] = 0.5
            self.conv_out.weight[k, k, 1, 1] = 1
        for block in self.blocks:  # what a block adds to them
            block.mlp.fc2.weight[:2] = 0
            block.mlp.fc2.bias[:2] = 0
