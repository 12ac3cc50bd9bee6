"""Weights on disk: read, checked against a network, filled in, written."""

from __future__ import annotations

import os
import pickle
from collections.abc import Collection
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fusionkit.images import write_atomically
from fusionkit.models.official import to_ours

# What safetensors and torch raise for a file that is cut short or is something else.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError)
# In place of torch's advice, which is to run the code in the file.
_PICKLED = (
    "it holds pickled Python objects, which run code when loaded, and fusionkit never loads them; "
    "if you trust the file, load it with its authors' code, such as net = torch.load(path, "
    'weights_only=False)["fuse"] for CAF, and give fusionkit what '
    'torch.save(net.state_dict(), "weights.pth") writes'
)


def fill(
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
