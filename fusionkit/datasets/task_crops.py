"""Crops of several tasks side by side, for training one network for all of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.data import Dataset

from fusionkit.names import TASKS, check_name


class TaskCrops(Dataset):
    """Item k holds item k of every task's crops: {"ivif": {"a": ..., "b": ...}, "meif": ...}.

    So every batch has equal shares of all tasks, and the default collate keeps the tasks apart.

    Args:
        crops: for each task a data set such as `RandomCrops`, all with one `count`.

    Raises:
        ValueError: no task, an unknown one, or data sets that differ in length.
    """

    def __init__(self, crops: Mapping[str, Dataset]) -> None:
        for task in crops:
            check_name(task, TASKS, "task")
        lengths = {task: len(dataset) for task, dataset in crops.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"crops of lengths {lengths}; expected one length for all tasks")
        self.crops = dict(crops)

    def __len__(self) -> int:
        return len(next(iter(self.crops.values())))

    def __getitem__(self, k: int) -> dict[str, dict]:
        return {task: dataset[k] for task, dataset in self.crops.items()}
