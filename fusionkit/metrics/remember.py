"""What several metrics, or several fused pictures, need of the same pictures: computed once.

Half of the metrics' work is on the sources alone, and metrics of one family begin alike. Metrics
stay functions of three pictures; the steps they share are marked `remembered`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

import torch

_TOO_LARGE = object()
ROOM = 2**28  # bytes that a scope keeps; of pictures up to a megapixel, it is nearly everything


class _Scope:
    def __init__(self):
        self.results: dict[tuple, object] = {}
        self.tensors: dict[int, torch.Tensor] = {}  # held, so that no id is given twice
        self.room = ROOM
        self.locks: dict[tuple, Lock] = {}  # threads share a scope, and wait for each other
        self.lock = Lock()

    def keep(self, key: tuple, result: object, least: int) -> None:
        """Keep a result, if at least `least` bytes of room are left then."""
        parts = result if isinstance(result, tuple) else (result,)
        found = {id(x): x for x in parts if isinstance(x, torch.Tensor)}
        size = sum(x.nbytes for x in found.values())
        with self.lock:
            if size > self.room - least:
                self.results[key] = _TOO_LARGE
            else:
                self.room -= size
                self.tensors.update(found)
                self.results[key] = result


_scopes: ContextVar[tuple[_Scope, ...]] = ContextVar("scopes", default=())


@contextmanager
def remembering(*pictures: torch.Tensor) -> Iterator[None]:
    """Within, `remembered` functions keep what they compute of these tensors, and of tensors
    computed of them, until the end: in this thread, and in those that `in_parallel` starts.

    Scopes may be nested: what follows from an outer scope's pictures alone is kept until its end.
    Pictures must not be changed within.
    """
    scope = _Scope()
    scope.tensors.update((id(x), x) for x in pictures)
    token = _scopes.set((*_scopes.get(), scope))
    try:
        yield
    finally:
        _scopes.reset(token)


def remembered(function: Callable, bulky: bool = False) -> Callable:
    """Mark `function(*tensors_and_hashable_values)` to be computed once where `remembering`.

    It gives a tensor, or a tuple of tensors or numbers, which its callers must not change.

    Args:
        bulky: its results take much room and are of use to other fused pictures only: they are
            kept in an outer scope alone, and leave half of its room to others.
    """

    @functools.wraps(function)
    def once(*args):
        scope = _scope_of([x for x in args if isinstance(x, torch.Tensor)])
        if scope is None or (bulky and scope is _scopes.get()[-1]):
            return function(*args)
        key = (function, *(id(x) if isinstance(x, torch.Tensor) else x for x in args))
        with scope.locks.setdefault(key, Lock()):
            if key not in scope.results:
                result = function(*args)
                scope.keep(key, result, ROOM // 2 if bulky else 0)
                return result
        result = scope.results[key]
        return function(*args) if result is _TOO_LARGE else result

    return once


def _scope_of(tensors: list[torch.Tensor]) -> _Scope | None:
    """The innermost of the scopes that these tensors belong to, each to its outermost one."""
    scopes = _scopes.get()
    depth = 0
    for tensor in tensors:
        owners = (i for i, scope in enumerate(scopes) if id(tensor) in scope.tensors)
        owner = next(owners, None)
        if owner is None:
            return None
        depth = max(depth, owner)
    return scopes[depth] if scopes else None
