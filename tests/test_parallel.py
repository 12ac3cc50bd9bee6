"""Threads keep order, grad mode and torch's number of threads, and pass errors on."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from fusionkit.parallel import in_parallel


@pytest.mark.parametrize("workers", [1, 3])
def test_results_keep_their_order(workers):
    def slow_first(i):
        time.sleep(0.02 if i == 0 else 0)
        return i * i

    assert list(in_parallel(slow_first, range(7), workers)) == [i * i for i in range(7)]
    assert list(in_parallel(slow_first, [], workers)) == []


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("workers", "share"), [(1, 4), (2, 2), (3, 1), (6, 1)])
def test_workers_divide_torchs_threads(workers, share, four_threads):
    meet = threading.Barrier(workers, timeout=10)
    found = in_parallel(
        lambda _: (meet.wait(), torch.get_num_threads())[1], range(workers), workers
    )
    assert list(found) == [share] * workers
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_grad_mode_is_the_callers(workers):
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not any(y.requires_grad for y in in_parallel(x.mul, [1, 2], workers))
    assert all(y.requires_grad for y in in_parallel(x.mul, [1, 2], workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_ends_it(workers):
    seen = []

    def fails(i):
        seen.append(i)
        if i == 3:
            raise ValueError("item 3")
        time.sleep(0.001)
        return i

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="item 3"):
        list(in_parallel(fails, range(500), workers))
    assert len(seen) < 400
    assert torch.get_num_threads() == before
