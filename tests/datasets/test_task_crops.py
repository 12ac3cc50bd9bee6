"""Crops of several tasks in one item."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from fusionkit.datasets import RandomCrops
from fusionkit.datasets.task_crops import TaskCrops


def crops(value: float, count: int = 5) -> RandomCrops:
    pairs = [{"a": torch.full((1, 20, 20), value), "b": torch.zeros(1, 20, 20)}]
    return RandomCrops(pairs, size=8, count=count)


def test_every_item_and_batch_holds_all_tasks():
    dataset = TaskCrops({"ivif": crops(0.1), "meif": crops(0.2), "mfif": crops(0.3)})
    assert len(dataset) == 5
    assert dataset[4].keys() == {"ivif", "meif", "mfif"}
    batch = next(iter(DataLoader(dataset, batch_size=3)))
    for task, value in (("ivif", 0.1), ("meif", 0.2), ("mfif", 0.3)):
        assert torch.equal(batch[task]["a"], torch.full((3, 1, 8, 8), value))
        assert batch[task]["b"].shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "crops of lengths {}; expected one length"),
        ({"ivif": crops(0.1), "meif": crops(0.1, 4)}, r"lengths {'ivif': 5, 'meif': 4}; expected"),
        ({"VIF": crops(0.1)}, "unknown task 'VIF'"),
    ],
)
def test_bad_crops(tasks, message):
    with pytest.raises(ValueError, match=message):
        TaskCrops(tasks)
