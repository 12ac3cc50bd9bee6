"""Multi-focus and multi-exposure pairs with ground truth, made from any sharp photographs."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from fusionkit.datasets.noise import smooth_noise
from fusionkit.datasets.photographs import (
    crop,
    exposure_pair,
    focus_pair,
    guided_filter,
    has_depth,
    scene_radiance,
)
from fusionkit.images import list_images, to_tensor
from fusionkit.names import check_name

MIN_SIDE = 32
MAX_OBJECTS = 3


class GeneratedPairs(Dataset):
    """Pairs of one task whose true fused picture is a photograph.

    Args:
        task: `mfif` (near focus, far focus) or `meif` (under-exposed, over-exposed).
        pictures: a folder, or files: sharp all over for `mfif`, well exposed for `meif`.
        count: number of items; by default one a picture. Item i is made from picture i, counted
            round and round, with another window, depth or exposure each time.
        size: (height, width) of the window that is cut from a picture, at least 32×32. The window
            has this shape, spans 62 to 100 % of what the picture allows, and is resized.
        seed: non-negative; another seed gives other pairs.

    Item i depends on (task, seed, i, size) and its picture alone: `a`, `b` and `target`, float32
    (3, H, W) in [0, 1] in 8-bit steps, and `name`. A gray file gives three equal channels.

    For `mfif` the depth is invented: a slanted ground with smooth hills, and nearer things whose
    outlines are drawn to the edges of the picture. It has nothing to do with the true scene; the
    blur, its spreading over depth edges included, is that of a thin lens for such a scene. For
    `meif` the long exposure clips 3 to 50 % of the picture, and the short one is 3.5 to 6 stops
    below it: about what real pairs (MEFB) have.

    Raises:
        ValueError: unknown task, no picture, a size below 32×32, a negative count or seed; on
            reading, a broken file.
        FileNotFoundError: a folder or file is not there.
        IndexError: an item past the last.
    """

    def __init__(
        self,
        task: str,
        pictures: str | os.PathLike | Iterable[str | os.PathLike],
        count: int | None = None,
        size: tuple[int, int] = (256, 256),
        seed: int = 0,
    ) -> None:
        self.task = check_name(task, ("mfif", "meif"), "task")
        if isinstance(pictures, str | os.PathLike):
            pictures = list_images(pictures).values()
        self.pictures = [Path(path) for path in pictures]
        if not self.pictures:
            raise ValueError("pictures is empty; expected at least one file")
        size = tuple(size)
        if len(size) != 2 or min(size) < MIN_SIDE:
            raise ValueError(
                f"size {size}; expected (height, width), at least {MIN_SIDE}×{MIN_SIDE}"
            )
        self.count = len(self.pictures) if count is None else count
        if self.count < 0 or seed < 0:
            raise ValueError(f"count {count}, seed {seed}; expected neither to be negative")
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        index = range(self.count)[i]
        path = self.pictures[index % len(self.pictures)]
        rng = np.random.default_rng((zlib.crc32(self.task.encode()), self.seed, index))
        picture = np.ascontiguousarray(to_tensor(path).expand(3, -1, -1).permute(1, 2, 0).numpy())
        (target,) = crop(rng, [picture], self.size)
        if self.task == "mfif":
            item = focus_pair(rng, target, _depth(rng, target))
        else:
            radiance = scene_radiance(rng, target)
            item = exposure_pair(rng, radiance, _stops(rng, radiance)) | {"target": target}
        images = {key: torch.from_numpy(np.moveaxis(x, -1, 0).copy()) for key, x in item.items()}
        return {"name": f"{self.task}_{path.stem}_{self.seed}_{index:04d}"} | images


def _depth(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """An invented disparity map (H, W) in [0, 1], 1 = nearest, for a picture (H, W, 3)."""
    shape = image.shape[:2]
    guide = image.mean(axis=-1)
    down, across = np.meshgrid(*(np.linspace(0, 1, side) for side in shape), indexing="ij")
    while True:
        # As a rule the bottom of a photograph is nearer than its top.
        slant = rng.uniform(0, 0.6) * down + rng.uniform(-0.3, 0.3) * across
        depth = slant + rng.uniform(0.02, 0.1) * smooth_noise(rng, shape, (2, 2))
        for _ in range(rng.integers(MAX_OBJECTS + 1)):
            blob = smooth_noise(rng, shape, (3, 3)) > rng.uniform(0.4, 1.0)
            inside = guided_filter(blob.astype(np.float32), guide) > 0.5
            depth = np.where(inside, depth + rng.uniform(0.25, 0.7), depth)
        depth = (depth - depth.min()) / max(np.ptp(depth), 1e-6)
        if has_depth(depth):
            return depth.astype(np.float32)


def _stops(rng: np.random.Generator, radiance: np.ndarray) -> tuple[float, float]:
    """An under- and an over-exposure for linear light (H, W, 3), metered as a camera would."""
    clipped = np.quantile(radiance.mean(axis=-1), 1 - rng.uniform(0.03, 0.5))
    over = max(-np.log2(max(clipped, 1e-3)), 0.5)  # the photograph itself lies between the two
    return min(over - rng.uniform(3.5, 6.0), -1.0), over
