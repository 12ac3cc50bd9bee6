"""What methods guided by a perception task share: labelled batches, and training the task alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from fusionkit.color import to_rgb
from fusionkit.methods.base import Method, cosine
from fusionkit.tasks.base import PerceptionTask
from fusionkit.tasks.detection import resize_boxes

Size = tuple[int, int]


class TaskTraining(Method):
    """Trains a perception task on the pictures of a finished fusion network.

    The second stage of CAF's hierarchical training (section 3.4), and how TDFusion compares
    fusion methods (section 4.3).

    Args:
        task: the task, whose weights are trained.
        fusion: the fusion network; a frozen copy in evaluation mode is kept, which is no part of a
            checkpoint.
        lr: Adam's learning rate.
        task_size: (height, width) at which the task sees the fused picture; None keeps its size.
        anneal_steps: lower the learning rate to zero along half a cosine over so many steps; None
            keeps it constant.
    """

    def __init__(
        self,
        task: PerceptionTask,
        fusion: nn.Module,
        *,
        lr: float = 1e-4,
        task_size: Size | None = None,
        anneal_steps: int | None = None,
    ) -> None:
        super().__init__({"task": task}, {"task": torch.optim.Adam(task.parameters(), lr=lr)})
        self.task, self.task_size = task, task_size
        self.lr, self.anneal_steps = lr, anneal_steps
        self.fusion = copy.deepcopy(fusion).requires_grad_(False).eval().to(self.device)

    def prepare(self, accelerator: Accelerator) -> None:
        super().prepare(accelerator)
        self.fusion.to(accelerator.device, memory_format=torch.channels_last)

    def step(self, batch: dict) -> dict[str, float]:
        """One update of the task on a labelled batch."""
        self.task.train()
        if self.anneal_steps:
            self.set_lr({"task": self.lr * cosine(self.steps_taken / self.anneal_steps)})
        batch = on_device(batch, self.device)
        with torch.no_grad():
            fused = self.fusion(batch["a"], batch["b"])
        loss = self.task(*perceive(fused, batch, self.task_size))
        self.update("task", weight_gradients(loss, self.trained("task")))
        self.steps_taken += 1
        return {"task": loss.item()}


def weight_gradients(
    loss: torch.Tensor, weights: list[torch.Tensor], retain_graph: bool = False
) -> tuple[torch.Tensor, ...]:
    """The gradient of a loss by each weight, zeros where it has no part in the loss."""
    if not loss.requires_grad:  # such as a batch in which the task finds nothing to learn
        return tuple(torch.zeros_like(w) for w in weights)
    return torch.autograd.grad(loss, weights, retain_graph=retain_graph, materialize_grads=True)


def trained_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a module that are not frozen, by name, as leaves of their own."""
    return {
        name: p.detach().requires_grad_()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict:
    """The batch with its tensors on `device`; lists, such as boxes, stay as they are."""
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def halves(batch: Mapping[str, Any]) -> tuple[dict, dict]:
    """The even and the odd items of a batch, whose entries are tensors (B, ...) or lists of B.

    Raises:
        ValueError: fewer than two pairs.
    """
    if len(batch["a"]) < 2:
        raise ValueError(
            f"{len(batch['a'])} pair in a process's share of a batch; expected two or more, for "
            "two disjoint halves"
        )
    return {k: v[::2] for k, v in batch.items()}, {k: v[1::2] for k, v in batch.items()}


def swapped(batch: Mapping[str, Any]) -> dict:
    """The batch, followed by itself with a and b swapped: 2·B items."""
    doubled = {
        key: torch.cat([value, value]) if isinstance(value, torch.Tensor) else [*value, *value]
        for key, value in batch.items()
    }
    a, b = batch["a"], batch["b"]
    return doubled | {"a": torch.cat([a, b]), "b": torch.cat([b, a])}


def resize(image: torch.Tensor, size: Size | None) -> torch.Tensor:
    """(B, C, H, W) to `size`, bilinearly; itself if it has that size, or for None."""
    if size is None or tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image, size=tuple(size), mode="bilinear", align_corners=False)


def perceive(
    fused: torch.Tensor, batch: Mapping[str, Any], size: Size | None = None
) -> tuple[torch.Tensor, dict]:
    """What a task sees of a fused luminance, and the batch as its target.

    Args:
        fused: (B, 1, h, w), of the batch's pictures at any size; clipped to [0, 1].
        batch: with `cbcr` (B, 2, H, W) in it, the picture is in colour.
        size: of the picture; None keeps that of `fused`.

    Returns:
        The picture (B, 1 or 3, *size) and the batch; boxes, in pixels of `a`, are scaled to it.
        Label maps keep their size: a task resizes its logits to them.
    """
    if "cbcr" in batch:
        picture = to_rgb(fused, resize(batch["cbcr"], fused.shape[-2:]).to(fused.dtype))
    else:
        picture = fused.clamp(0, 1)
    picture, target = resize(picture, size), dict(batch)
    whole, seen = tuple(batch["a"].shape[-2:]), tuple(picture.shape[-2:])
    if "boxes" in batch and whole != seen:
        target["boxes"] = resize_boxes(batch["boxes"], whole, seen)
    return picture, target
