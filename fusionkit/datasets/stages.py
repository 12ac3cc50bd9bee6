"""Pairs for the three stages of gradient transfer, all made from one infrared-visible set."""

from __future__ import annotations

import os

from torch.utils.data import ConcatDataset, Dataset

from fusionkit.color import luminance
from fusionkit.datasets.catalogue import load_dataset
from fusionkit.datasets.embedded import EmbeddedPairs
from fusionkit.datasets.generated import GeneratedPairs


def stage_pairs(task: str, root: str | os.PathLike | None = None) -> Dataset:
    """RoadScene's training pairs for `ivif`; for `mfif` and `meif` pairs with a "target".

    Those are generated from RoadScene's visible training pictures, and 40 embedded ones.

    Raises:
        FileNotFoundError: RoadScene is not there.
        ValueError: another task.
    """
    road = load_dataset("roadscene", root, "train")
    if task == "ivif":
        return road
    made = GeneratedPairs(task, [visible for _, visible in road.paths])
    return ConcatDataset([made, EmbeddedPairs(task, count=40)])


def centre_crop(pair: dict, side: int = 256) -> dict:
    """A pair's name, and the centre of both luminances, (1, H, W), `side` pixels at most."""
    top, left = (max((n - side) // 2, 0) for n in pair["a"].shape[-2:])
    window = (..., slice(top, top + side), slice(left, left + side))
    return {"name": pair["name"], **{key: luminance(pair[key])[window] for key in "ab"}}
