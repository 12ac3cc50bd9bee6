"""Small operations on many pictures: several pictures at once, which share torch's threads.

Metrics and small networks are chains of many operations on one picture. Pictures side by side use
several cores better than the threads of each operation do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context

import torch
from tqdm.auto import tqdm


def in_parallel(
    function: Callable,
    items: Sequence,
    workers: int | None = None,
    *,
    progress: bool = False,
    unit: str = "picture",
) -> Iterator:
    """`function(item)` for each item, in order, in `workers` threads (by default one a CPU).

    Torch's threads are divided among them. They see the caller's context variables. The first error
    is raised, and what has not begun by then never does.
    """
    workers = max(1, min(workers or os.cpu_count() or 1, len(items)))
    share = max(1, torch.get_num_threads() // workers)
    grad = torch.is_grad_enabled()  # every thread has a mode of its own

    context = copy_context()

    def run(item):
        with torch.set_grad_enabled(grad):
            return context.copy().run(function, item)

    with tqdm(total=len(items), unit=unit, disable=not progress) as bar, _torch_threads(share):
        if workers == 1:
            for item in items:
                yield function(item)
                bar.update()
            return
        with ThreadPoolExecutor(
            workers, initializer=torch.set_num_threads, initargs=(share,)
        ) as pool:
            try:
                for result in pool.map(run, items):
                    yield result
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
