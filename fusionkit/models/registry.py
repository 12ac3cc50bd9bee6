"""Models by name, as in timm: `create_model`, `list_models`, and the weights that ship."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fusionkit.models.caf import CAF
from fusionkit.models.colornet import ColorNet
from fusionkit.models.frufn import EFRUFN, FRUFN
from fusionkit.models.official import release_options
from fusionkit.models.refusion import ReFusion
from fusionkit.models.tcmoa import tcmoa_base, tcmoa_large, tcmoa_small, tcmoa_tiny
from fusionkit.models.weight_files import fill, read_state
from fusionkit.names import TASKS, check_name, check_task

WEIGHTS = Path(__file__).parents[1] / "weights"


@dataclass(frozen=True)
class ModelEntry:
    """A model that `create_model` knows.

    Attributes:
        build: the network's class.
        stretch: whether the recipe of its paper stretches the output to its own minimum and
            maximum.
        paper: where it comes from.
        routed: whether one network serves several tasks, and is told which.
        shipped: options that the weights which ship were trained with, where they differ from the
            defaults.
        fuses: whether it is a fusion network; ColorNet only gives chroma to a fused luminance.
    """

    build: Callable[..., nn.Module]
    stretch: bool
    paper: str
    routed: bool = False
    shipped: dict[str, object] = field(default_factory=dict)
    fuses: bool = True


_UNFOLDING = "Wang et al., gradient transfer learning and fusion rule unfolding"
_TCMOA = "Zhu et al., TC-MoA, CVPR 2024"
MODELS = {
    "refusion": ModelEntry(ReFusion, stretch=True, paper="Bai et al., ReFusion, IJCV 2024"),
    "caf": ModelEntry(CAF, stretch=False, paper="Liu et al., CAF, IJCAI 2024"),
    "tcmoa_tiny": ModelEntry(
        tcmoa_tiny, stretch=False, paper=_TCMOA, routed=True, shipped={"reduction": "area"}
    ),
    "tcmoa_small": ModelEntry(
        tcmoa_small, stretch=False, paper=_TCMOA, routed=True, shipped={"reduction": "area"}
    ),
    "tcmoa_base": ModelEntry(tcmoa_base, stretch=False, paper=_TCMOA, routed=True),
    "tcmoa_large": ModelEntry(tcmoa_large, stretch=False, paper=_TCMOA, routed=True),
    "frufn": ModelEntry(FRUFN, stretch=False, paper=_UNFOLDING),
    "efrufn": ModelEntry(EFRUFN, stretch=False, paper=_UNFOLDING),
    "colornet": ModelEntry(ColorNet, stretch=False, paper=_UNFOLDING, fuses=False),
}


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """Names of models that match the shell `pattern`; with `pretrained`, of weights that ship.

    Weights are named `name_task`, or `name` where one network serves all tasks.
    """
    names = MODELS
    if pretrained:
        stems = {_stem(name, task) for name in MODELS for task in TASKS}
        names = [stem for stem in stems if (WEIGHTS / f"{stem}.safetensors").exists()]
    return sorted(name for name in names if fnmatch(name, pattern))


def model_entry(name: str) -> ModelEntry:
    """The registry's entry of a model.

    Raises:
        ValueError: there is no such model; the message lists those there are.
    """
    return MODELS[check_name(name, MODELS, "model")]


def create_model(
    name: str,
    task: str | None = None,
    pretrained: bool = False,
    checkpoint: str | os.PathLike | None = None,
    compile: bool = False,
    **options,
) -> nn.Module:
    """Build a fusion network: `forward(a, b) -> fused` on (B, 1, H, W) in [0, 1].

    For the authors' weights it is built to behave as their release does, unless `options` differ.

    Args:
        name: one of `list_models()`.
        task: `ivif`, `mfif`, `meif` or `mif`; chooses the pretrained weights, and in TC-MoA the
            router that `forward` takes by default.
        pretrained: load the weights that ship with fusionkit for this task; where one network
            serves all tasks, the task may be left out.
        checkpoint: weights from a file instead: ours (`.safetensors`, or a training run's
            `checkpoint.pt`) or the authors' (`.pth` or safetensors; recognised by their keys).
        compile: calls of the network go through `torch.compile`, once for pictures of all sizes,
            from the first call on. Class, weights and other methods (`stream`, `stem`, `trace`)
            stay as they are, so where `fuse` streams it gains nothing. Copies are not compiled, and
            neither are derivatives along a direction, which meta-learning takes.
        options: passed to the network's class.

    Raises:
        ValueError: unknown model or task; pretrained weights without a task or together with
            `checkpoint`; a file that is broken or holds another network.
        FileNotFoundError: no such file, or no weights ship for this task.
    """
    entry = model_entry(name)
    if task is not None:
        check_task(task)
    if pretrained and checkpoint is not None:
        raise ValueError("give either pretrained=True or a checkpoint, not both")
    if entry.routed and task is not None:
        options = {"task": task, **options}
    if pretrained:
        checkpoint = pretrained_path(name, task)
        options = {**entry.shipped, **options}
    if checkpoint is None:
        model = entry.build(**options)
    else:
        state = read_state(Path(checkpoint))
        with _Undrawn():
            model = entry.build(**{**release_options(name, state), **options})
        fill(model, name, state, Path(checkpoint), assign=True)
    if compile:
        model.compile(dynamic=True)  # in place: the keys of the weights keep their names
    return model


def pretrained_path(name: str, task: str | None) -> Path:
    """Where the weights of ours for a model and task lie; of a routed model, for all tasks."""
    routed = model_entry(name).routed
    if task is not None:
        check_task(task)
    elif not routed:
        raise ValueError(f"pretrained weights of {name} need a task: {', '.join(TASKS)}")
    path = WEIGHTS / f"{_stem(name, task)}.safetensors"
    if not path.exists():
        kind = "" if routed else f" for task {task!r}"
        raise FileNotFoundError(f"{path}: no weights of {name}{kind} ship yet")
    return path


def _stem(name: str, task: str | None) -> str:
    """The name of a model's file of weights for a task."""
    return name if MODELS[name].routed else f"{name}_{task}"


def load_checkpoint(model: nn.Module, name: str, path: str | os.PathLike) -> nn.Module:
    """Fill `model`, built as `name`, from a file: every key must be there, and no other.

    The model's options stay: for the authors' weights, `create_model` also chooses those.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of tensors, or one of another network; the message names the keys.
    """
    path = Path(path)
    return fill(model, name, read_state(path), path)


_DRAWS = (
    *(nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_),
    *(torch.Tensor.uniform_, torch.Tensor.normal_),
)


class _Undrawn(TorchFunctionMode):
    """Weights of networks built here are not drawn, so memory is theirs only once it is filled."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
