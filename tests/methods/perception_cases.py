"""Small networks, tasks and batches for the tests of methods that a perception task guides."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from fusionkit.tasks.base import PerceptionTask, as_rgb


class TwoLayers(nn.Module):
    """A smooth fusion network; with `norm`, one of batch norm."""

    def __init__(self, width: int = 4, norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
            nn.Tanh(),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([a, b], dim=1)).sigmoid()


class TinySegmentation(PerceptionTask):
    """Two convolutions and cross-entropy; the labels may be of another size."""

    keys = ("labels",)

    def __init__(self, classes=("road", "car", "sky"), width: int = 4, norm: bool = False) -> None:
        super().__init__(classes)
        self.network = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
            nn.Tanh(),
            nn.Conv2d(width, len(self.classes), 3, padding=1),
        )

    def loss(self, fused: torch.Tensor, target) -> torch.Tensor:
        logits = self.network(as_rgb(fused))
        logits = F.interpolate(logits, size=target["labels"].shape[-2:], mode="bilinear")
        return F.cross_entropy(logits, target["labels"])


def make_batch(items: int = 4, size=(9, 10), dtype=torch.float64, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, items, 1, *size, generator=generator, dtype=dtype)
    labels = torch.randint(3, (items, *size), generator=generator)
    return {"a": a, "b": b, "labels": labels, "name": [f"p{i}" for i in range(items)]}


class LabelledPairs(Dataset):
    """Ten random labelled pairs, flipped at random as augmentations do."""

    def __init__(self) -> None:
        self.batch = make_batch(10, size=(12, 12))

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict:
        item = {key: self.batch[key][index] for key in ("a", "b", "labels")}
        return {k: v.flip(-1) for k, v in item.items()} if torch.rand(()) < 0.5 else item


def boxed_batch(boxes: bool, side: int = 64, items: int = 4) -> dict:
    """float32 pairs for a detector, with a box in each or in none."""
    batch = make_batch(items, size=(side, side), dtype=torch.float32)
    del batch["labels"]
    one = torch.tensor([[8.0, 10.0, 40.0, 50.0]])
    count = 1 if boxes else 0
    return batch | {
        "boxes": [one[:count] for _ in range(items)],
        "classes": [torch.zeros(count, dtype=torch.int64) for _ in range(items)],
    }


def vector(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in module.named_buffers()}
