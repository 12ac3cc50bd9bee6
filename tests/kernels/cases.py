"""Pictures to hold a Triton twin against its reference, and how to."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fusionkit

Function = Callable[..., tuple[torch.Tensor, ...]]

# The package without what its own __init__ imports: most of a process's time.
BARE = f"""
import sys
import types
package = types.ModuleType("fusionkit")
package.__path__ = [{str(Path(fusionkit.__file__).parent)!r}]
sys.modules["fusionkit"] = package
"""


def run_apart(program: str) -> str:
    """What a Python program prints in a process of its own, where Triton's interpreter is off."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BARE + textwrap.dedent(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pictures(
    shape: Sequence[int], device: str, count: int = 3, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Random ones in [0, 1], each with a gradient."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.rand(shape, generator=generator) for _ in range(count))
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def not_contiguous(shape: Sequence[int], device: str, count: int = 3) -> list[torch.Tensor]:
    """The same, transposed and with gaps."""
    *lead, height, width = shape
    whole = pictures((*lead, 2 * width, height + 1), device, count)
    return [x[..., ::2, 1:].mT for x in whole]


def gradients(function: Function, inputs: Sequence[torch.Tensor], **options) -> list[torch.Tensor]:
    """Of a weighted sum of the function's results, by each input."""
    total = sum(i * x.float().sum() for i, x in enumerate(function(*inputs), start=1))
    return list(torch.autograd.grad(total, inputs, **options))


def check(
    twin: Function, reference: Function, inputs: Sequence[torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Values and first gradients agree; the tolerance is relative to the largest number."""
    full = [x.detach().float().requires_grad_() for x in inputs]
    for found, expected in zip(twin(*inputs), reference(*full), strict=True):
        assert found.dtype == inputs[0].dtype
        assert close(found, expected, tolerance)
    for found, expected in zip(gradients(twin, inputs), gradients(reference, full), strict=True):
        assert found.dtype == inputs[0].dtype
        assert close(found, expected, tolerance)


def check_second_gradients(
    twin: Function, reference: Function, inputs: Sequence[torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Gradients of a function of the gradients agree."""

    def second(function: Function) -> list[torch.Tensor]:
        def squared(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(y.square() for y in function(*x))

        found = gradients(squared, inputs, create_graph=True)
        along = sum((g * x.detach()).sum() for g, x in zip(found, inputs, strict=True))
        return list(torch.autograd.grad(along, inputs))

    for found, expected in zip(second(twin), second(reference), strict=True):
        assert expected.abs().max() > 0
        assert close(found, expected, tolerance)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    error = (found.float() - expected.float()).abs().max()
    return bool(error <= tolerance * expected.float().abs().max().clamp_min(1e-30))
