"""TDFusion's loss generator G, which weighs the two sources in the fusion loss.

Source: Bai et al., Task-driven Image Fusion with Learnable Fusion Loss, CVPR 2025, section 3.6;
the layer sizes are those of the authors' release.
"""

from __future__ import annotations

import torch
from torch import nn

from fusionkit.models.blocks import conv3x3, restormer_stage


class LossGenerator(nn.Module):
    """The loss generation module G: {w_a, w_b} = G(I_a, I_b).

    Args:
        dim: width of each source's encoder; the decoder is twice as wide.
        heads: attention heads everywhere.
        blocks: Restormer blocks a stage.
    """

    def __init__(self, dim: int = 16, heads: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.stem_a, self.stem_b = conv3x3(1, dim), conv3x3(1, dim)
        self.encoder_a = restormer_stage(dim, heads, blocks)
        self.encoder_b = restormer_stage(dim, heads, blocks)
        self.decoder = restormer_stage(2 * dim, heads, blocks)
        self.head = nn.Sequential(conv3x3(2 * dim, dim), nn.PReLU(), conv3x3(dim, 2))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Luminances a, b (B, 1, H, W) -> w (B, 2, H, W), positive; w_a + w_b = 1 at each pixel."""
        features = [self.encoder_a(self.stem_a(a)), self.encoder_b(self.stem_b(b))]
        return self.head(self.decoder(torch.cat(features, dim=1))).softmax(dim=1)


class WeightedAverage(nn.Module):
    """A fusion network that is nothing but weights: w_a·a + w_b·b (row V of TDFusion's Table 3).

    Args:
        generator: gives w; by default a `LossGenerator`.
    """

    def __init__(self, generator: nn.Module | None = None) -> None:
        super().__init__()
        self.generator = generator or LossGenerator()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Luminances a, b (B, 1, H, W) in [0, 1] -> fused (B, 1, H, W) in [0, 1]."""
        return (self.generator(a, b) * torch.cat([a, b], dim=1)).sum(dim=1, keepdim=True)
