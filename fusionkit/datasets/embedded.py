"""Embedded pairs for every task: made in memory from a seed, no file and no network needed."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from fusionkit.datasets import medical, photographs, street
from fusionkit.datasets.street import STREET_CLASSES
from fusionkit.names import TASKS, check_name, check_task

__all__ = ["STREET_CLASSES", "EmbeddedPairs"]

TIMES = street.TIMES
KINDS = ("ct", "pet", "spect")
MIN_SIDE = 32


class EmbeddedPairs(Dataset):
    """`count` pairs of a task, with ground truth where there is one.

    `ivif` are drawn street scenes by day, by night and in glare; `mfif` and `meif` are photographs
    (those in scikit-image's wheel) blurred by depth and exposed through a camera's response; `mif`
    is a synthetic head as CT, PET or SPECT, and MRI. Item i depends on the task, `size`, `seed`,
    the options and i alone, on any machine.

    Args:
        task: `ivif`, `mfif`, `meif` or `mif`.
        count: how many.
        size: height and width, 32 or more each.
        seed: a non-negative integer.
        time: for `ivif`, "day", "night" or "glare"; by default in turn.
        kind: for `mif`, "ct", "pet" or "spect"; by default in turn.

    Item: "a" and "b", float32 (1 or 3, H, W) in [0, 1]; "name"; "target" (the ground truth) for
    `mfif` and `meif`; for `ivif` "labels" (H, W) int64 ids into `STREET_CLASSES`, "boxes" (N, 4)
    float32 left, top, right, bottom in pixels, and "classes" (N,) int64.

    Raises:
        ValueError: an unknown task, time or kind, an option of another task, or a number out of
            range.
    """

    def __init__(
        self,
        task: str,
        count: int = 8,
        size: tuple[int, int] = (256, 256),
        seed: int = 0,
        *,
        time: str | None = None,
        kind: str | None = None,
    ) -> None:
        check_task(task)
        for name, value, owner, known in (("time", time, "ivif", TIMES), ("kind", kind, "mif", KINDS)):
            if value is not None and task != owner:
                raise ValueError(f"{name}={value!r} is an option of {owner!r}, not of {task!r}")
            if value is not None:
                check_name(value, known, name)
        if min(size) < MIN_SIDE or count < 1 or seed < 0:
            raise ValueError(
                f"size {size}, count {count}, seed {seed}; expected sides of at least {MIN_SIDE}, "
                "a count of at least 1 and a seed of at least 0"
            )
        self.task, self.count, self.size, self.seed = task, count, tuple(size), seed
        self.time, self.kind = time, kind

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.count:
            raise IndexError(f"pair {index} of {self.count}")
        rng = np.random.default_rng((self.seed, TASKS.index(self.task), index))
        word = ""
        if self.task == "ivif":
            word = self.time or TIMES[index % len(TIMES)]
            scene = street.scene(rng, self.size, word)
        elif self.task == "mfif":
            scene = photographs.multi_focus(rng, self.size)
        elif self.task == "meif":
            scene = photographs.multi_exposure(rng, self.size)
        else:
            word = self.kind or KINDS[index % len(KINDS)]
            scene = medical.scene(rng, self.size, word)
        item = {key: _to_tensor(key, value) for key, value in scene.items()}
        return item | {"name": "_".join(filter(None, (self.task, word, f"{index:03d}")))}


def _to_tensor(key: str, value: np.ndarray) -> torch.Tensor:
    if key not in ("a", "b", "target"):
        return torch.from_numpy(np.ascontiguousarray(value))
    picture = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
    return picture[None] if picture.ndim == 2 else picture.movedim(-1, 0).contiguous()
