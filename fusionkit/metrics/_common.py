"""Checks and small operations that the metrics share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusionkit.metrics.remember import remembered
from fusionkit.parallel import in_parallel


def gray_levels(*images: torch.Tensor) -> list[torch.Tensor]:
    """(B, 1, H, W) pictures in [0, 1] as float64 on the scale 0 to 255, (B, H, W).

    The field's MATLAB files work on this scale, and sums over a picture need more than float32.

    Raises:
        ValueError: not (B, 1, H, W), sizes that differ, NaN, or values outside [0, 1].
    """
    _check(*images)
    return [_levels(image) for image in images]


def by_picture(value: Callable[..., torch.Tensor], *images: torch.Tensor) -> torch.Tensor:
    """`value(*gray_levels(*images))`, (B,); on a CPU picture by picture, in torch's threads.

    There a picture's maps stay in the cache, which makes filters several times as fast as over
    the batch. Other devices take the batch at once.

    Raises:
        ValueError: as `gray_levels`.
    """
    if images[0].device.type != "cpu":
        return value(*gray_levels(*images))
    _check(*images)
    one = len(images[0]) == 1  # itself, then, which may be remembered
    pictures = [images] if one else list(zip(*(x.split(1) for x in images), strict=True))
    values = in_parallel(
        lambda picture: value(*map(_levels, picture)), pictures, torch.get_num_threads()
    )
    return torch.cat(list(values))


def correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of (B, H, W) and (B, H, W) by picture: (B,); NaN for a constant one."""
    x, y = (z - z.mean((-2, -1), keepdim=True) for z in (x, y))
    norm = (x.square().sum((-2, -1)) * y.square().sum((-2, -1))).sqrt()
    return (x * y).sum((-2, -1)) / norm


def _check(*images: torch.Tensor) -> None:
    first = images[0]
    for image in images:
        if image.ndim != 4 or image.shape[1] != 1:
            raise ValueError(
                f"expected gray pictures (B, 1, H, W), got shape {tuple(image.shape)}; "
                "take the luminance of colour pictures first"
            )
        if image.shape != first.shape:
            raise ValueError(
                f"a, b and fused must have one shape, got {tuple(first.shape)} "
                f"and {tuple(image.shape)}"
            )
        low, high = _range(image)
        if not (low >= 0 and high <= 1):  # NaN fails both comparisons
            raise ValueError(f"expected values in [0, 1], got {low:g} to {high:g}")


@remembered
def _range(image: torch.Tensor) -> tuple[float, float]:
    return image.min().item(), image.max().item()


@remembered
def _levels(image: torch.Tensor) -> torch.Tensor:
    return image[:, 0].double() * 255
