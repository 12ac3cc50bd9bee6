"""Activation checkpointing: a block keeps its input and computes the rest again when needed.

Source: Chen et al., Training deep nets with sublinear memory cost, 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fusionkit.kernels._dispatch import transformed


@contextmanager
def recomputed(network: nn.Module) -> Iterator[None]:
    """Within it, each of `network`'s `blocks` keeps only its input for the backward pass.

    Gradients of any order are as without; also of weights that `functional_call` puts in place of
    the block's own. Forward mode and passes without gradients keep nothing anyway.
    """
    found = blocks(network)
    for block in found:
        block.forward = _recomputing(block)
    try:
        yield
    finally:
        for block in found:
            del block.forward  # the class's own appears again


def blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost modules with parts of their own in the lists and sequences of a network.

    Such as Restormer's and transformer blocks and unfolding units. Those with batch norm are left
    out: computing them again would move their running statistics twice.
    """
    found: list[nn.Module] = []
    for name, module in network.named_children():
        listed = isinstance(network, nn.Sequential | nn.ModuleList) and name.isdecimal()
        whole = any(module.children()) and not isinstance(module, nn.ModuleList)
        norms = any(isinstance(m, _BatchNorm) for m in module.modules())
        found += [module] if listed and whole and not norms else blocks(module)
    return found


def _recomputing(block: nn.Module) -> Callable:
    forward = type(block).forward

    class Again(nn.Module):
        """Calls the block's own forward with given weights, whichever are in place by then."""

        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, *inputs, **options):
            return forward(self.block, *inputs, **options)

    again = Again()

    def recompute(*inputs, **options):
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        if not torch.is_grad_enabled() or transformed(*tensors):
            return forward(block, *inputs, **options)
        # The backward pass runs outside a `functional_call` that this may be part of.
        weights = {f"block.{name}": weight for name, weight in block.named_parameters()}
        return checkpoint(
            lambda *x: functional_call(again, weights, x, options), *inputs, use_reentrant=False
        )

    return recompute
