"""The unfolding unit of FRUFN and EFRUFN: the transformation T and the mask generator G.

Source: Wang et al., the gradient-transfer paper, section 3.2 and figure 6; sizes are those of the
authors' release, with 8 heads in place of 6.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fusionkit.models.blocks import conv3x3
from fusionkit.models.swin import NormedSwin, convnext_block


class ResidualBlock(nn.Module):
    """x + conv(ReLU(conv(x))), 3×3 with bias. (B, width, H, W) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class GlobalLocalTransform(nn.Module):
    """The transformation T (GLT): convolutions for what is near, Swin attention for what is far."""

    def __init__(self, width: int, heads: int, window: int = 2) -> None:
        super().__init__()
        self.conv_in = conv3x3(width, width)
        self.attend = NormedSwin(width, heads, window)
        self.conv_out = conv3x3(width, width)

    def forward(self, difference: torch.Tensor) -> torch.Tensor:
        return self.conv_out(self.attend(self.conv_in(difference)))


class MaskGenerator(nn.Module):
    """The mask generator G (MSMG): the difference and the last mask -> the next mask.

    (B, width, H, W) and (B, 1, H, W) -> (B, 1, H, W) in (0, 1); H and W are multiples of 8.
    """

    def __init__(self, width: int, heads: int, window: int = 4) -> None:
        super().__init__()
        self.project = nn.Conv2d(width + 1, width, 3, padding=1)
        self.scales = nn.ModuleDict({scale: convnext_block(width) for scale in "248"})
        self.merge = nn.Conv2d(4 * width, width, 3, padding=1)
        self.attend = NormedSwin(width, heads, window)
        self.head = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, difference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        merged = self._all_scales(self.project(torch.cat([difference, mask], dim=1)))
        return self.head(self.attend(merged)).softmax(dim=1)[:, 1:]

    def _all_scales(self, features: torch.Tensor) -> torch.Tensor:
        pooled, coarser = features, []
        for block in self.scales.values():
            pooled = F.max_pool2d(F.pad(pooled, (1, 1, 1, 1), mode="reflect"), 3, stride=2)
            coarser.append(block(pooled))
        # `merge` sees all scales side by side, the coarsest first. A product for each, and their
        # sum, is the same, and holds one scale at a time in the picture's size.
        *weights, finest = self.merge.weight.split(features.shape[1], dim=1)
        merged = F.conv2d(features, finest, self.merge.bias, padding=1)
        for scale, weight in zip(reversed(coarser), weights, strict=True):
            enlarged = F.interpolate(scale, features.shape[-2:], mode="bilinear")
            merged += F.conv2d(enlarged, weight, padding=1)
        return merged


class UnfoldingUnit(nn.Module):
    """One iteration's update M ⊙ T(d) of the features, and its mask M = G(d, last M) (eq. 14).

    d = ReLU(guide - features); the paper has no ReLU. Without a mask, M = 1.
    """

    def __init__(self, width: int, heads: int, mask: bool = True) -> None:
        super().__init__()
        self.transform = GlobalLocalTransform(width, heads)
        self.mask = MaskGenerator(width, heads) if mask else None

    def first_mask(self, features: torch.Tensor) -> torch.Tensor:
        """M before the first iteration: 0, or 1 for good without a mask."""
        return torch.full_like(features[:, :1], 0.0 if self.mask else 1.0)

    def forward(
        self, features: torch.Tensor, guide: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        difference = F.relu(guide - features)
        if self.mask is not None:
            mask = self.mask(difference, mask)
        return mask * self.transform(difference), mask
