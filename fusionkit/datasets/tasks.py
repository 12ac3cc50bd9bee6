"""The pairs of a task: every data set at hand, or the embedded scenes where there is none."""

from __future__ import annotations

import os
from contextlib import suppress

from torch.utils.data import ConcatDataset, Dataset

from fusionkit.datasets.catalogue import dataset_info, list_datasets, load_dataset
from fusionkit.datasets.embedded import EmbeddedPairs
from fusionkit.names import check_name

# The embedded test scenes are drawn from another seed than the training scenes.
EMBEDDED_SEEDS = {"train": 0, "test": 1}


def task_pairs(
    task: str,
    split: str = "test",
    root: str | os.PathLike | None = None,
    *,
    count: int = 8,
    size: tuple[int, int] = (256, 256),
    luminance: bool = False,
) -> tuple[Dataset, str]:
    """All pairs of a task and split that this machine has, and what they are, in words.

    Args:
        task: `ivif`, `mfif`, `meif` or `mif`.
        split: "train" or "test".
        root: folder of data sets; by default where `load_dataset` looks. Data sets that are not
            there are passed over; if none is, `count` embedded pairs of `size` stand in.

    Raises:
        ValueError: unknown task or split, or a data set that is there but broken.
        FileNotFoundError: `root` is given and is no folder.
    """
    check_name(split, EMBEDDED_SEEDS, "split")
    root = root or None
    if root is not None and not os.path.isdir(root):
        raise FileNotFoundError(f"{root}: no such folder of data sets")
    found = {}
    for name in list_datasets(task):
        if split not in dataset_info(name).splits:
            continue
        with suppress(FileNotFoundError):
            found[name] = load_dataset(name, root, split, luminance=luminance)
    if found:
        words = ", ".join(f"{name} ({len(pairs)} pairs)" for name, pairs in found.items())
        return ConcatDataset(list(found.values())), words
    scenes = EmbeddedPairs(task, count=count, size=size, seed=EMBEDDED_SEEDS[split])
    return scenes, f"embedded scenes ({count} pairs)"
