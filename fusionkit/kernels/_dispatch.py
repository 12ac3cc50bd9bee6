"""When a Triton twin may take an operation, and how it comes to be without importing triton early.

A twin takes over on a GPU, for float32, bf16 and fp16; the metrics' for float64. It steps aside, so
that the reference runs, under `torch.compile` (which fuses the reference by itself), and under
`torch.func` and forward mode. Where a backward pass is recorded (`create_graph`), the gradient is
the reference's, which has derivatives of every order: see `recorded_gradients`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch
from torch.autograd import forward_ad

TYPES = (torch.float32, torch.bfloat16, torch.float16)
_compiling = Lock()
_only_references = False


@contextmanager
def references() -> Iterator[None]:
    """Within, in all threads, the references run on a GPU as well: their work can be counted."""
    global _only_references
    before, _only_references = _only_references, True
    try:
        yield
    finally:
        _only_references = before


@cache
def installed() -> bool:
    """Whether triton can be imported; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


def twin_takes(*tensors: torch.Tensor, types: Sequence[torch.dtype] = TYPES) -> bool:
    """Whether the Triton twin can do an operation on these tensors, of one of the types.

    First gradients included, if it has any.
    """
    first = tensors[0]
    return (
        not _only_references
        and all(x.is_cuda and x.device == first.device and x.dtype == first.dtype for x in tensors)
        and first.dtype in types
        and first.numel() > 0
        and installed()
        and not torch.compiler.is_compiling()
        and not transformed(*tensors)
    )


def transformed(*tensors: torch.Tensor) -> bool:
    """Whether a transform of `torch.func`, or forward mode, differentiates what comes next."""
    return torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def backward_is_recorded() -> bool:
    """Within a backward pass: whether it may be differentiated in turn (`create_graph`)."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def dot_precision(x: torch.Tensor, operation: str) -> str:
    """Triton's `input_precision` for products that torch has as an `operation`, "conv" or "matmul".

    TF32 where torch's settings allow it there, and for 16-bit tensors, which have no more digits.
    """
    if x.dtype != torch.float32:
        return "tf32"
    place = torch.backends.cudnn if operation == "conv" else torch.backends.cuda.matmul
    place = getattr(place, operation, place)
    if hasattr(place, "fp32_precision"):  # torch 2.9; it refuses to mix this with what follows
        return "tf32" if place.fp32_precision == "tf32" else "ieee"
    return "tf32" if place.allow_tf32 else "ieee"


def twin(function: Callable) -> Callable:
    """Mark a function as Triton code. It becomes a kernel when `compiled` is first called."""
    function.is_twin = True
    return function


def compiled(module: dict) -> None:
    """Make the marked functions of a module Triton kernels; `module` is its `globals()`.

    Their `tl` becomes `triton.language`. Triton is imported here and nowhere else, so a machine
    without it, or without a GPU, never misses it.
    """
    with _compiling:
        if module["tl"] is None:
            import triton

            for name, value in list(module.items()):
                if getattr(value, "is_twin", False):
                    value.__globals__["tl"] = triton.language
                    module[name] = triton.jit(value)


def recorded_gradients(
    reference: Callable[..., tuple[torch.Tensor, ...]],
    inputs: Sequence[torch.Tensor],
    needed: Sequence[bool],
    gradients: Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """The gradients of `reference(*inputs)` by the inputs marked in `needed`, with their graph.

    For the `backward` of an `autograd.Function` whose own kernel cannot be differentiated.
    """
    # Views, so that a path from one input to another outside this operation does not count.
    with torch.enable_grad():
        views = [x.view_as(x) for x in inputs]
        outputs = reference(*views)
        wanted = [x for x, need in zip(views, needed, strict=True) if need]
        found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True))
    return [next(found) if need else None for need in needed]
