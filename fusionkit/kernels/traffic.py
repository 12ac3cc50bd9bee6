"""How many bytes an eager computation moves: what bounds it on a GPU, and what a twin saves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            # What an operation returns from among its arguments, it has written in place.
            tensors = tree_leaves((args, kwargs, result))
            self.bytes += sum(_size(x) for x in tensors if isinstance(x, torch.Tensor))
        return result


def bytes_moved(function: Callable[[], object]) -> int:
    """Bytes that `function()` reads and writes, each operation's tensors once; caches unseen.

    A broadcast tensor counts as large as it is in memory. A backward pass counts if `function` runs
    it.
    """
    with _Count() as count:
        function()
    return count.bytes


def _size(x: torch.Tensor) -> int:
    numbers = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers * x.element_size()
