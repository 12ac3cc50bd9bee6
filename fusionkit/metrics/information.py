"""Metrics from information theory."""

from __future__ import annotations

import torch

from fusionkit.metrics._common import gray_levels


def entropy(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """EN: Shannon entropy of the fused picture's 256 gray levels, in bits (0 to 8); (B,).

    Larger is better, though noise raises it as well. The sources do not enter.

    Source: Roberts et al., Assessment of image fusion procedures using entropy, 2008.
    """
    *_, f = gray_levels(a, b, fused)
    levels = f.round().long().flatten(1)
    counts = f.new_zeros(len(f), 256).scatter_add_(1, levels, torch.ones_like(f).flatten(1))
    share = counts / levels.shape[1]
    return -torch.xlogy(share, share).sum(1) / torch.log(share.new_tensor(2.0))
