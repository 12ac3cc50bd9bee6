"""Labelled pairs: pictures with their label maps or boxes, crops of both, and batches of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from fusionkit.color import chroma, luminance
from fusionkit.datasets.folders import PairFolder, RandomCrops, _listed
from fusionkit.datasets.labels import read_boxes, read_label_map
from fusionkit.images import to_tensor
from fusionkit.names import check_name

READERS = {
    "maps": (read_label_map, (".png", ".bmp", ".tif")),
    "boxes": (read_boxes, (".xml", ".txt")),
}
LISTED = ("boxes", "classes", "name")  # what a batch holds as lists, since lengths differ


class LabelledFolder(Dataset):
    """A `PairFolder` whose items gain the labels of their pairs.

    Args:
        pairs: the pairs.
        folder: the label files, one a pair, of the pair's stem.
        kind: "maps" (see `labels.read_label_map`) or "boxes" (see `labels.read_boxes`).
        classes: their names by number.

    Item: that of `pairs`, with `labels` or with `boxes` and `classes`. `names` are the pairs'.

    Raises:
        FileNotFoundError: the folder, or the label file of a pair, is not there.
        ValueError: unknown kind; on reading, what the reader finds wrong with a file.
    """

    def __init__(
        self, pairs: PairFolder, folder: str | os.PathLike, kind: str, classes: Sequence[str]
    ) -> None:
        self.read, suffixes = READERS[check_name(kind, READERS, "kind of labels")]
        self.pairs, self.names, self.classes = pairs, pairs.names, tuple(classes)
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of labels")
        found = {p.stem: p for s in reversed(suffixes) for p in folder.glob(f"*{s}")}
        if missing := [name for name in self.names if name not in found]:
            raise FileNotFoundError(
                f"{folder}: no label file ({', '.join(suffixes)}) for {len(missing)} of "
                f"{len(self.names)} pairs: {_listed(missing)}"
            )
        self.label_paths = [found[name] for name in self.names]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        item = self.pairs[index]
        return item | self.read(self.label_paths[index], self.classes, item["a"].shape[-2:])


class PackedFolder(PairFolder):
    """Pairs in one folder of four-channel pictures, as MFNet's: RGB, and infrared as the fourth.

    Item: a is the fourth channel, (1, H, W), b the other three, (3, H, W) or, with `luminance`,
    (1, H, W).

    Raises:
        ValueError, on reading: a picture without four channels.
    """

    def __init__(self, folder: str | os.PathLike, names=None, luminance: bool = False) -> None:
        super().__init__(folder, folder, names, luminance)

    def __getitem__(self, index: int) -> dict:
        path, _ = self.paths[index]
        b = to_tensor(path)  # checks the file; the fourth channel is dropped as if it were alpha
        with Image.open(path) as picture:
            if picture.mode != "RGBA":
                raise ValueError(f"{path}: mode {picture.mode}; expected four channels (RGBA)")
            a = to_tensor(np.asarray(picture.getchannel(3)), str(path))
        return {"a": a, "b": luminance(b) if self.luminance else b, "name": self.names[index]}


class LabelledCrops(RandomCrops):
    """`RandomCrops` of a labelled data set, with its labels cut, flipped and turned in step.

    Crop k is cut where `RandomCrops` with the same options cuts it. Items of any labelled data set
    will do, `EmbeddedPairs` included. Pictures smaller than the crop are refused: an object that
    is reflected has no box.

    Args:
        dataset, size, count, seed, augment: as in `RandomCrops`.
        min_visible: a box is clipped to the crop, and dropped if less than this share of its area
            is left.
        color: add `cbcr` (2, size, size), the chroma of b (see `color.chroma`), for tasks that
            look at fused pictures in colour.

    Item: `a` and `b` (1, size, size), `name`, and what the data set has of `target` (1, size,
    size), `labels` (size, size) int64, `boxes` (N, 4) and `classes` (N,). N differs: collate with
    `collate_labelled`.

    Raises:
        ValueError: as `RandomCrops`; a share outside [0, 1]; on reading, a picture smaller than
            the crop, or labels of another size than it.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: int = 128,
        count: int | None = None,
        seed: int = 0,
        augment: bool = True,
        min_visible: float = 0.3,
        color: bool = False,
    ) -> None:
        super().__init__(dataset, size, count, seed, augment, cache_gb=0)
        if not 0 <= min_visible <= 1:
            raise ValueError(f"min_visible {min_visible}; expected a share in [0, 1]")
        self.min_visible, self.color = min_visible, color

    def __getitem__(self, k: int) -> dict:
        if not 0 <= k < self.count:
            raise IndexError(f"crop {k} of {self.count}")
        index = self.pair_index(k)
        item = self.dataset[index]
        name = item.get("name", f"item {index}")
        height, width = item["a"].shape[-2:]
        if min(height, width) < self.size:
            raise ValueError(
                f"{name}: {height}×{width}; expected at least the crop, {self.size}×{self.size}"
            )
        place = self._place(k, height, width)
        planes = {key: luminance(item[key]) for key in self.keys}
        if self.color:
            planes["cbcr"] = chroma(item["b"])
        if "labels" in item:
            planes["labels"] = item["labels"][None]
        sizes = {key: "×".join(map(str, plane.shape[-2:])) for key, plane in planes.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{name}: sizes differ: {sizes}")
        crop = {key: self._cut(plane, *place).clone() for key, plane in planes.items()}
        if "labels" in crop:
            crop["labels"] = crop["labels"][0]
        if "boxes" in item:
            crop["boxes"], kept = self._cut_boxes(item["boxes"], *place)
            crop["classes"] = item["classes"][kept]
        return crop | {"name": name}

    def _cut_boxes(
        self, boxes: torch.Tensor, top: int, left: int, flipped: bool, turns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The boxes (N, 4) that are left in a crop, in its pixels, and which of all they are."""
        moved = boxes - boxes.new_tensor([left, top, left, top])
        clipped = moved.clamp(0, self.size)
        share = _area(clipped) / _area(moved).clamp(min=1e-6)
        kept = (_area(clipped) > 0) & (share >= self.min_visible)
        left, top, right, bottom = clipped[kept].unbind(1)
        if flipped:
            left, right = self.size - right, self.size - left
        for _ in range(turns):  # a quarter turn takes (x, y) to (y, size - x)
            left, top, right, bottom = top, self.size - right, bottom, self.size - left
        return torch.stack([left, top, right, bottom], dim=1), kept


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def collate_labelled(items: Sequence[dict]) -> dict:
    """A batch of labelled items, for a DataLoader's `collate_fn`.

    `boxes`, `classes` and `name` become lists, since pictures hold different numbers of boxes;
    everything else is stacked.

    Raises:
        ValueError: items with different entries, or tensors of different shapes.
    """
    if any(item.keys() != items[0].keys() for item in items):
        held = sorted({", ".join(sorted(item)) for item in items})
        raise ValueError(f"items with different entries: {'; '.join(held)}")
    batch = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if key in LISTED:
            batch[key] = values
            continue
        shapes = sorted({tuple(value.shape) for value in values})
        if len(shapes) > 1:
            raise ValueError(
                f"{key!r} of shapes {shapes}; expected one in a batch: crop (LabelledCrops), or "
                "take a batch size of 1"
            )
        batch[key] = default_collate(values)
    return batch
