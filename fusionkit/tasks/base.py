"""What a perception network offers to the fusion network that it guides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class PerceptionTask(nn.Module):
    """A task network, its loss and its scores; the paper's T and 𝓛ᵗ (CAF, TDFusion).

    A subclass builds its network and implements `loss`, `predict` and `score`. Everywhere, `fused`
    is (B, 1 or 3, H, W) in [0, 1], and a target is a mapping with the entries of `keys`, such as
    a batch of a labelled data set; other entries are passed over, but "name", if there is one, is
    what error messages call the pictures.

    The module itself, called, is its loss: `functional_call(task, weights, (fused, target))` is the
    loss with other weights. Loss and gradients are defined in both modes; in training mode,
    statistics of batch norm follow every call of `loss`, so call `eval()` to leave them alone.

    Attributes:
        keys: the entries of a target.
        classes: the names of the classes, in the order of their numbers.
    """

    keys: tuple[str, ...] = ()

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = tuple(classes)
        if isinstance(classes, str) or not self.classes:
            raise ValueError(f"classes {classes!r}; expected the names of at least one class")

    def forward(self, fused: torch.Tensor, target: Mapping[str, Any]) -> torch.Tensor:
        return self.loss(fused, target)

    def loss(self, fused: torch.Tensor, target: Mapping[str, Any]) -> torch.Tensor:
        """The training loss, a scalar, differentiable by `fused` and by the weights."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def predict(self, fused: torch.Tensor) -> Any:
        """What the network sees in a batch, in evaluation mode and without gradients."""
        raise TypeError(f"{type(self).__name__} defines no predict")

    def score(
        self, predictions: Iterable[Any], targets: Iterable[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Scores by name of predictions against targets, one entry a batch in both.

        Both are read side by side and once, so generators will do for large data sets.
        """
        raise TypeError(f"{type(self).__name__} defines no score")


def as_rgb(fused: torch.Tensor) -> torch.Tensor:
    """Three channels: luminance is repeated.

    Raises:
        ValueError: not (B, 1 or 3, H, W).
    """
    if fused.ndim != 4 or fused.shape[1] not in (1, 3):
        raise ValueError(f"fused has shape {tuple(fused.shape)}; expected (B, 1 or 3, H, W)")
    return fused.expand(-1, 3, -1, -1)


def entry(target: Mapping[str, Any], key: str, count: int) -> Any:
    """What `target` holds under `key` for each of `count` pictures.

    Raises:
        ValueError: there is no such entry, or it is for another number of pictures.
    """
    if key not in target:
        raise ValueError(f"the target has no {key!r}, only {', '.join(target) or 'nothing'}")
    if len(target[key]) != count:
        raise ValueError(f"{key!r} for {len(target[key])} pictures, but {count} were fused")
    return target[key]


def picture_name(target: Mapping[str, Any], index: int) -> str:
    """What to call a picture of a batch in a message: its name, or its place in the batch."""
    names = target.get("name")
    return f"picture {index} of the batch" if names is None else str(names[index])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; then every part has its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training
