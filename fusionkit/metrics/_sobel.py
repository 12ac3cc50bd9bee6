"""Sobel gradients for the metrics, exact on 8-bit pictures and safe to differentiate."""

from __future__ import annotations

import torch

from fusionkit.metrics._filters import separable

WHOLE = 1e-4  # gray levels; float32 moves 8-bit levels by less than 2e-5


def whole_levels(x: torch.Tensor) -> torch.Tensor:
    """`x` with the levels that float32 moved off a whole one put back; gradients pass.

    Metrics that ask whether a gradient is 0, or equal to another, need this.
    """
    offset = (x.round() - x).detach()
    return x + offset.where(offset.abs() < WHOLE, 0)


def sobel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Horizontal and vertical Sobel gradients, to the right and downwards positive.

    The valid region only: (..., H, W) -> (..., H - 2, W - 2).
    """
    return separable(x, (-1, 0, 1), (1, 2, 1)), separable(x, (1, 2, 1), (-1, 0, 1))


def magnitude(gx: torch.Tensor, gy: torch.Tensor) -> torch.Tensor:
    """sqrt(gx² + gy²), with gradient 0 where both are 0."""
    return root(gx.square() + gy.square())


def root(x: torch.Tensor) -> torch.Tensor:
    """sqrt(x), with gradient 0 where x is 0."""
    flat = x == 0
    return x.masked_fill(flat, 1).sqrt().masked_fill(flat, 0)
