"""Histograms of whole gray levels, picture by picture in one call."""

from __future__ import annotations

import math

import torch

from fusionkit.kernels.joint_histogram import counts, joint_counts
from fusionkit.metrics.remember import remembered


@remembered
def histogram(x: torch.Tensor, bins: int = 256) -> torch.Tensor:
    """Shares of the levels 0 to bins - 1, rounded: (B, H, W) -> (B, bins), rows sum to 1."""
    return counts(x.round().long().flatten(1), bins).double() / x[0].numel()


@remembered
def joint_histogram(x: torch.Tensor, y: torch.Tensor, bins: int = 256) -> torch.Tensor:
    """Shares of pairs of levels: (B, H, W) twice -> (B, bins, bins), x along the rows."""
    return joint_counts(x, y, bins).double() / x[0].numel()


def entropy_of(shares: torch.Tensor, base: float = 2.0) -> torch.Tensor:
    """-Σ p log p over all axes but the first, in units of `base`; 0 log 0 counts 0."""
    return (0 - torch.xlogy(shares, shares).flatten(1).sum(1)) / math.log(base)
