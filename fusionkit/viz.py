"""The figures that the notebooks share."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure


def picture_grid(
    rows: Sequence[dict[str, torch.Tensor]],
    width: float = 2.6,
    limits: dict[str, tuple[float, float]] | None = None,
    cmaps: dict[str, str] | None = None,
) -> Figure:
    """A grid of pictures: one row a dictionary from titles to (C, H, W) or (H, W) tensors.

    Args:
        rows: titles may differ from row to row; an empty title is not drawn.
        width: inches a picture.
        limits, cmaps: value range and colour map of one-channel pictures, by title; by default
            0 to 1 in gray.
    """
    columns = max(len(row) for row in rows)
    heights = [_aspect(next(iter(row.values()))) * width + 0.3 for row in rows]
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(width * columns, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for line, row in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, (title, image) in zip(line, row.items(), strict=False):
            low, high = (limits or {}).get(title, (0, 1))
            cmap = (cmaps or {}).get(title, "gray")
            axis.imshow(_for_imshow(image), vmin=low, vmax=high, cmap=cmap)
            axis.set_title(title, fontsize=9)
    plt.close(figure)  # a notebook shows the figure it is given, once
    return figure


def _aspect(image: torch.Tensor) -> float:
    return image.shape[-2] / image.shape[-1]


def _for_imshow(image: torch.Tensor):
    image = image.detach().cpu()
    if image.ndim == 3:
        image = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    return image.numpy()
