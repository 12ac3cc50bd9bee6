"""CAF's fusion network: two encoders, three densely connected steps and a head.

Source: Liu et al., Where Elegance Meets Precision: Towards a Compact, Automatic, and Flexible
Framework for Multi-modality Image Fusion and Applications, IJCAI 2024. The paper's subject is how
it is trained; the layer sizes are those of the released weights.
"""

from __future__ import annotations

import torch
from torch import nn

from fusionkit.models.streaming import Walk


class CAF(nn.Module):
    """Densely connected convolutions (148,321 parameters at its defaults).

    Every convolution has a bias and zero padding. Batch norm makes the output depend on the mode:
    `eval()` before fusing.

    Args:
        dim: width of each source's encoder; a dense step adds 2·dim channels.
        steps: dense steps.

    Attributes:
        cpu_tile: side of the tiles in which it streams on a CPU.
    """

    cpu_tile = 512

    def __init__(self, dim: int = 16, steps: int = 3) -> None:
        super().__init__()
        growth = 2 * dim
        self.encoder_a, self.encoder_b = _conv_norm(1, dim), _conv_norm(1, dim)
        self.dense = nn.ModuleList(_conv_norm(growth * (i + 1), growth) for i in range(steps))
        self.head = nn.Sequential(
            nn.Conv2d(growth * (steps + 1), 4 * dim, 3, padding=1),
            nn.ReLU(),
            _conv_norm(4 * dim, 2 * dim),
            nn.Conv2d(2 * dim, 1, 1),
            nn.Tanh(),
        )

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Infrared a and visible b, luminances (B, 1, H, W) in [0, 1] -> fused, in (-1, 1).

        The hyperbolic tangent does go below 0 on real pictures: clip to [0, 1], as `fuse` does.
        Any H and W.
        """
        features = torch.cat([self.encoder_a(a), self.encoder_b(b)], dim=1)
        for step in self.dense:
            features = torch.cat([features, step(features)], dim=1)
        return self.head(features)

    @torch.no_grad()
    def stream(self, a: torch.Tensor, b: torch.Tensor, tile: int = 512) -> torch.Tensor:
        """`forward`'s result in evaluation, in tiles with all that a pixel depends on around them.

        No gradients, any size; wide features live as long as a tile.
        """
        halo = len(self.dense) + 3  # a 3×3 convolution each: encoder, dense steps, two in the head
        out = torch.empty_like(a)
        walk = Walk(*a.shape[-2:], tile)
        walk.read(lambda x: self(*x.chunk(2, dim=1)), torch.cat([a, b], dim=1), out, halo)
        return out


def _conv_norm(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_dim, out_dim, 3, padding=1), nn.BatchNorm2d(out_dim), nn.ReLU()
    )
