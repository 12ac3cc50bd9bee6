"""How much memory training needs: what autograd keeps for the backward pass, and the peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


def peak_bytes(function: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Most bytes in tensors made by `function()` that exist at one time.

    On a GPU by torch's own count. On a CPU every operation's results are counted from when they are
    made until they are freed, those of a backward pass within `function` too; what an operation
    needs only for itself is not seen, and the call takes longer.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Living() as living:
        function()
    return living.peak


class _Living(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[int, weakref.ref]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        given = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and _address(x) not in given | self.storages.keys():
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        gone = weakref.ref(storage, lambda _: self._remove(address))
        self.storages[address] = storage.nbytes(), gone
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _remove(self, address: int) -> None:
        self.now -= self.storages.pop(address)[0]


def _address(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata
