"""What is remembered is used again, and changes no value."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from fusionkit.metrics import METRICS, remember
from fusionkit.metrics.evaluate import measure
from fusionkit.metrics.remember import remembered, remembering
from fusionkit.parallel import in_parallel

from .reference import related


@pytest.fixture
def calls() -> list:
    return []


@pytest.fixture
def double(calls):
    @remembered
    def double(x, y=None, factor=2):
        calls.append(1)
        return x * factor

    return double


def test_all_metrics_are_the_same_remembered(monkeypatch):
    a, b, fused = ((x * 255).round().div(255) for x in related(1))
    others = [fused, (a + b) / 2, torch.maximum(a, b)]
    levels = [(x * 255).round() / 255 for x in others]
    expected = [{n: m(a, b, f).item() for n, m in METRICS.items()} for f in levels]
    with remembering(a[0], b[0]):
        found = [measure(0, a[0], b[0], f[0], METRICS) for f in others]
    assert found == expected
    # Sums by other numbers of threads differ in the last digits.
    side_by_side = measure(0, a[0], b[0], fused[0], METRICS, workers=3)
    assert side_by_side == pytest.approx(expected[0], rel=1e-9)
    monkeypatch.setattr(remember, "ROOM", 100_000)  # some steps are kept, and others are not
    with remembering(a[0], b[0]):
        assert measure(0, a[0], b[0], fused[0], METRICS) == expected[0]


def test_once_while_remembering(calls, double):
    x, other = torch.ones(2), torch.ones(2)
    double(x)
    double(x)
    assert len(calls) == 2
    with remembering(x):
        first = double(x)
        assert double(x) is first
        assert double(first) is double(first)  # of what was computed of x
        assert len(calls) == 4
        double(x, None, 3)
        double(other)
        double(other)  # a picture of nobody's
        double(x, other)
        assert len(calls) == 8
    double(x)
    assert len(calls) == 9


def test_an_inner_scope_forgets_what_is_its_own(calls, double):
    sources, fused = torch.ones(2), torch.ones(2)
    with remembering(sources):
        for _ in range(3):
            with remembering(sources, fused):
                double(sources)
                double(fused)
                double(sources, fused)
    assert len(calls) == 1 + 3 * 2


def test_threads_and_full_scopes_remember_nothing_of_others(calls, double, monkeypatch):
    x = torch.ones(2)
    with remembering(x):
        double(x)
        thread = threading.Thread(target=double, args=(x,))
        thread.start()
        thread.join()
        assert len(calls) == 2
    monkeypatch.setattr(remember, "ROOM", x.nbytes)
    with remembering(x):
        for _ in range(2):
            double(x)  # fills it
            double(x, None, 3)
    assert len(calls) == 2 + 1 + 2


def test_threads_side_by_side_wait_for_the_one_that_computes(calls):
    @remembered
    def slow(x):
        calls.append(1)
        time.sleep(0.05)
        return x + 1

    x = torch.ones(2)
    with remembering(x):
        first, *others = in_parallel(lambda _: slow(x), range(4), 4)
    assert len(calls) == 1
    assert all(other is first for other in others)


def test_threads_do_not_wait_for_what_is_too_large_to_keep(monkeypatch):
    meet = threading.Barrier(3, timeout=10)

    @remembered
    def large(x):
        if meet_all:
            meet.wait()  # would break if they came one after another
        return x + 1

    x = torch.ones(2)
    monkeypatch.setattr(remember, "ROOM", 0)
    with remembering(x):
        meet_all = False
        large(x)
        meet_all = True
        for found in in_parallel(lambda _: large(x), range(3), 3):
            assert torch.equal(found, x + 1)


def test_an_error_ends_the_scope(calls, double):
    x = torch.ones(2)
    with pytest.raises(ZeroDivisionError), remembering(x):
        1 / 0  # noqa: B018
    double(x)
    double(x)
    assert len(calls) == 2


def test_what_is_bulky_is_kept_in_outer_scopes_and_leaves_half_their_room(calls, monkeypatch):
    def double(x):
        calls.append(1)
        return 2 * x

    double = remembered(double, bulky=True)
    x, y = torch.ones(2), torch.ones(2)
    monkeypatch.setattr(remember, "ROOM", 3 * x.nbytes)
    with remembering(x, y):
        double(x)
        double(x)  # no other scope could use it
        assert len(calls) == 2
        with remembering():
            double(x)
            double(x)
            assert len(calls) == 3
            double(y)  # would take more than half
            double(y)
            assert len(calls) == 5
