"""Pairs for every task without a download: real photographs and drawn scenes, made in memory.

They let every notebook run on a machine without data, and they carry what the public sets rarely
have: the true fused picture, or exact labels and boxes.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch.utils.data import Dataset

from fusionkit.datasets import medical, photographs, street
from fusionkit.datasets.street import STREET_CLASSES
from fusionkit.names import check_name, check_task

__all__ = ["STREET_CLASSES", "EmbeddedPairs"]

MIN_SIDE = 32
# Per task: the option it takes and the values of that option.
OPTIONS = {
    "ivif": ("time", street.TIMES),
    "mfif": (None, ()),
    "meif": (None, ()),
    "mif": ("kind", medical.KINDS),
}


class EmbeddedPairs(Dataset):
    """`count` seeded pairs of one task.

    Args:
        task: `ivif` (infrared, visible street scenes), `mfif` (near focus, far focus), `meif`
            (under-exposed, over-exposed) or `mif` (CT, PET or SPECT beside MRI).
        count: number of items.
        size: (height, width) in pixels, at least 32×32.
        seed: non-negative; another seed gives other pictures.
        options: for `ivif`, time = "day", "night", "glare" (facing headlights at night) or None,
            these in turn; for `mif`, kind = "ct", "pet", "spect" or None, these in turn.

    Item i depends on (task, seed, i, size, options) alone. It holds `a` and `b`, float32 in
    [0, 1], gray (1, H, W) or RGB (3, H, W), `name`, and

    - for `mfif` and `meif`, `target` (3, H, W): the picture in focus all over, well exposed;
    - for `ivif`, `labels` (H, W) int64 indices of STREET_CLASSES, `boxes` (N, 4) float32 (left,
      top, right, bottom) in pixels around what can be seen of each car, person and lamp, right
      and bottom exclusive, and `classes` (N,) int64.

    Raises:
        ValueError: unknown task, option or value, a size below 32×32, a negative count or seed.
        IndexError: an item past the last.
    """

    def __init__(
        self,
        task: str,
        count: int = 8,
        size: tuple[int, int] = (256, 256),
        seed: int = 0,
        **options: str | None,
    ) -> None:
        option, values = OPTIONS[check_task(task)]
        for name, value in options.items():
            if name != option:
                expected = f"expected {option!r}" if option else "it takes none"
                raise ValueError(f"unknown option {name!r} for task {task!r}; {expected}")
            if value is not None:
                check_name(value, values, name)
        size = tuple(size)
        if len(size) != 2 or min(size) < MIN_SIDE:
            raise ValueError(
                f"size {size}; expected (height, width), at least {MIN_SIDE}×{MIN_SIDE}"
            )
        if count < 0 or seed < 0:
            raise ValueError(f"count {count}, seed {seed}; expected neither to be negative")
        self.task, self.count, self.size, self.seed = task, count, size, seed
        self.kinds = (options[option],) if options.get(option) else values

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        index = range(self.count)[i]
        entropy = (zlib.crc32(self.task.encode()), self.seed, index)
        rng = np.random.default_rng(np.random.SeedSequence(entropy))
        kind = self.kinds[index % len(self.kinds)] if self.kinds else None
        if self.task == "ivif":
            item = street.scene(rng, self.size, kind)
        elif self.task == "mif":
            item = medical.scene(rng, self.size, kind)
        elif self.task == "mfif":
            item = photographs.multi_focus(rng, self.size)
        else:
            item = photographs.multi_exposure(rng, self.size)
        name = "_".join(filter(None, (self.task, kind, f"{self.seed}", f"{index:04d}")))
        return {"name": name} | {key: _tensor(key, value) for key, value in item.items()}


def _tensor(key: str, array: np.ndarray) -> torch.Tensor:
    if key in ("a", "b", "target"):
        array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return torch.from_numpy(np.ascontiguousarray(array))
