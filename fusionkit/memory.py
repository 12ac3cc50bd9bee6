"""How much memory training needs: what autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch


def saved_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of all tensors that autograd keeps for the backward pass of `forward()`.

    Tensors that share memory count once; weights that are kept are among them. On a CPU, which
    has no counter of allocations, it stands for the peak of a training step.
    """
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # holds the graph, so that no address is used again
    del result
    return sum(kept.values())
