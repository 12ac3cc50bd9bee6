"""What bilevel methods share: passes that leave no trace, and derivatives along a direction."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import jvp
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def statistics_kept(*modules: nn.Module) -> Iterator[None]:
    """Batch norm as in training, by the batch's own statistics, but the running ones stay.

    For passes with weights that no network will keep: virtual, perturbed and differentiated ones.
    Taking the running statistics instead would give another function than the one that is trained.
    """
    norms = [
        part
        for module in modules
        for part in module.modules()
        if isinstance(part, _BatchNorm) and part.training and part.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def directional_derivative(
    function: Callable[..., torch.Tensor],
    point: Sequence[torch.Tensor],
    direction: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`function(*point)` and its derivative along `direction`, both without a graph.

    A network that was compiled runs as it was before: compiled code has no second derivative.

    One pass in forward mode. Where an operation has no forward-mode rule, two backward passes,
    which need its second derivative instead.
    """
    point = [p.detach() for p in point]
    with torch.compiler.set_stance("force_eager"):
        return _directional_derivative(function, point, direction)


def _directional_derivative(
    function: Callable[..., torch.Tensor],
    point: Sequence[torch.Tensor],
    direction: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            # The first call makes torch load its forward-mode rules by a call it has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            value, slope = jvp(function, tuple(point), tuple(direction))
        return value.detach(), slope.detach()
    except (NotImplementedError, RuntimeError):
        # No rule. Any other trouble comes again below, with its own message.
        return _twice_backward(function, point, direction)


def _twice_backward(
    function: Callable[..., torch.Tensor],
    point: Sequence[torch.Tensor],
    direction: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """J d as the derivative of u ↦ (Jᵀ u)·d, which is linear in u."""
    with torch.enable_grad():
        point = [p.detach().requires_grad_() for p in point]
        value = function(*point)
        u = torch.zeros_like(value, requires_grad=True)
        rows = torch.autograd.grad(value, point, u, create_graph=True, allow_unused=True)
        used = [(r, d) for r, d in zip(rows, direction, strict=True) if r is not None]
        total = sum(((r * d).sum() for r, d in used), start=0 * u.sum())
        (slope,) = torch.autograd.grad(total, u)
    return value.detach(), slope.detach()
