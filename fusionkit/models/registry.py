"""Models by name, as in timm: `create_model`, `list_models`, and weights on disk."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from fusionkit.images import write_atomically
from fusionkit.models.caf import CAF
from fusionkit.models.colornet import ColorNet
from fusionkit.models.frufn import EFRUFN, FRUFN
from fusionkit.models.official import release_options, to_ours
from fusionkit.models.refusion import ReFusion
from fusionkit.models.tcmoa import tcmoa_base, tcmoa_large, tcmoa_small, tcmoa_tiny
from fusionkit.names import TASKS, check_name, check_task

# What safetensors and torch raise for a file that is cut short or is something else.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError)
# In place of torch's advice, which is to run the code in the file.
_PICKLED = (
    "it holds pickled Python objects, which run code when loaded, and fusionkit never loads them; "
    "if you trust the file, load it with its authors' code, such as net = torch.load(path, "
    'weights_only=False)["fuse"] for CAF, and give fusionkit what '
    'torch.save(net.state_dict(), "weights.pth") writes'
)
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
        _fill(model, name, state, Path(checkpoint), assign=True)
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
    return _fill(model, name, read_state(path), path)


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


def _fill(
    model: nn.Module, name: str, state: dict[str, torch.Tensor], path: Path, assign: bool = False
) -> nn.Module:
    """Copy `state` into the model's weights, or let its tensors take their place (`assign`)."""
    try:
        state = to_ours(name, state)
    except ValueError as error:
        raise ValueError(f"{path}: not a checkpoint of {name}: {error}") from error
    expected = model.state_dict()
    if complaint := mismatch(expected, state):
        raise ValueError(f"{path}: not a checkpoint of {name}: {complaint}")
    if assign:
        state = _owned(state, expected)
    model.load_state_dict(state, assign=assign)
    return model


def _owned(
    state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`state` with the types and devices of `expected`, each tensor in memory of its own."""
    owned, taken = {}, set()
    for key, value in state.items():
        value = value.detach().to(expected[key])
        memory = value.untyped_storage()
        if memory.nbytes() != value.nbytes or memory.data_ptr() in taken:
            value = value.clone(memory_format=torch.contiguous_format)
        taken.add(memory.data_ptr())
        owned[key] = value
    return owned


def mismatch(expected: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> str:
    """What is wrong with the keys and shapes of `state`, in words; empty if nothing is."""
    complaints = []
    for kind, keys in (
        ("missing keys", expected.keys() - state.keys()),
        ("unknown keys", state.keys() - expected.keys()),
    ):
        if keys:
            rest = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            complaints.append(f"{kind} {', '.join(sorted(keys)[:3])}{rest}")
    complaints = complaints or [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if state[key].shape != value.shape
    ]
    return "; ".join(complaints[:3])


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file by name; nothing in it is executed.

    Of a training run's `checkpoint.pt`, the fusion network's; a `module.` prefix is dropped.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            reason = _PICKLED
        raise ValueError(f"{path}: not a readable file of weights ({reason})") from error
    run = state.get("method") if isinstance(state, dict) else None
    if isinstance(run, dict) and isinstance(run.get("modules"), dict):
        trained = run["modules"].items()
        state = {k.removeprefix("fusion."): v for k, v in trained if k.startswith("fusion.")}
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{path}: expected a dictionary of tensors by name")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    # Some tensors at a time: what has been read of a mapped file counts as memory until it closes.
    found = path.stat()
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    state = {}
    for start in range(0, len(keys), 16):
        with safe_open(path, "pt") as file:
            state |= {key: file.get_tensor(key).clone() for key in keys[start : start + 16]}
    now = path.stat()
    if (now.st_ino, now.st_mtime_ns) != (found.st_ino, found.st_mtime_ns):
        raise ValueError("it was replaced while it was read; load it again")
    return state


def save_weights(
    model: nn.Module,
    path: str | os.PathLike,
    metadata: dict[str, str] | None = None,
    half: Collection[str] = (),
) -> Path:
    """Write a network's weights as safetensors, atomically.

    `metadata` goes into the file's header. Tensors named in `half`, such as those of a frozen part,
    are stored in half precision; loading turns them into the network's own.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    state |= {key: state[key].half() for key in half}
    payload = safetensors.torch.save(state, metadata)
    return write_atomically(path, lambda file: file.write(payload))
