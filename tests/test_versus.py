"""Another implementation beside ours, in this process and apart."""

import sys

import numpy as np
import pytest
import torch

from fusionkit.versus import Apart, compare, load_callable

THEIRS = """
import numpy as np

calls = []

def average(a, b):
    calls.append(1)
    print("chatter on standard output")
    return (a + b) / 2 + 0.25

def array(a, b):
    return np.asarray((a + b) / 2)

def taller(a, b):
    return a[..., :-1, :]

def broken(a, b):
    raise ValueError("no such kernel")

def growing(a, b):
    calls.append(1)
    np.ones(len(calls) * 10_000_000)
    return a

constant = 3
"""


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Half:
    weight: float = 0.5

def f(a, b):
    return Half().weight * (a + b)
"""


@pytest.fixture
def theirs(tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text(THEIRS)
    return path


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 1, 8, 9, generator=generator))


def average(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a + b) / 2


def test_both_are_timed_and_their_outputs_compared(theirs):
    row = compare(f"{theirs}:average", average, pictures())
    assert row["difference"] == pytest.approx(0.25)
    assert row["speedup"] == pytest.approx(row["other"] / row["ours"])
    assert min(row["ours"], row["other"]) > 0


def test_arrays_count_as_pictures(theirs):
    row = compare(f"{theirs}:array", lambda a, b: np.asarray(average(a, b)), pictures(), repeats=1)
    assert row["difference"] == 0


def test_each_is_called_once_to_warm_up_and_then_in_turn(theirs):
    order = []

    def ours(a, b):
        order.append("ours")
        return average(a, b)

    row = compare(f"{theirs}:average", ours, pictures(), repeats=3)
    assert len(order) == 4
    assert row["calls"] == 3
    assert compare(f"{theirs}:average", ours, pictures(), repeats=3, limit=0)["calls"] == 1


def test_outputs_of_another_shape_are_an_error(theirs):
    with pytest.raises(ValueError, match=r"ours gives \(1, 8, 9\), the other \(1, 7, 9\)"):
        compare(f"{theirs}:taller", average, pictures(), repeats=1)


def test_a_folder_is_where_modules_are_found_first(tmp_path):
    """Two versions of one package cannot both be imported here; apart they can."""
    package = tmp_path / "fusionkit"
    package.mkdir()
    code = 'def f(a, b):\n    print("chatter")\n    return (a + b) / 2 + 0.5\n'
    (package / "__init__.py").write_text(code)
    row = compare("fusionkit:f", average, pictures(), folder=tmp_path, repeats=2)
    assert row["difference"] == pytest.approx(0.5)
    assert row["speedup"] == pytest.approx(row["other"] / row["ours"])


def test_a_file_is_a_module_as_any_other(tmp_path):
    (tmp_path / "torch.py").write_text(DATACLASS)  # nor does it take another's place
    row = compare(f"{tmp_path / 'torch.py'}:f", average, pictures(), repeats=1)
    assert row["difference"] == 0
    assert sys.modules["torch"] is torch


def test_a_failure_apart_says_why(theirs):
    with pytest.raises(RuntimeError, match=r"(?s)broken failed: .*no such kernel"):
        compare(f"{theirs}:broken", average, pictures(), folder=theirs.parent, repeats=1)


def test_a_peak_of_its_own(theirs):
    """The process counts its own memory, whatever this one has needed before."""
    ballast = torch.ones(2**28)  # a gibibyte
    with Apart(f"{theirs}:growing", pictures()) as apart:
        peaks = []
        for _ in range(3):
            apart()
            peaks.append(apart.peak)
        assert apart.output().equal(pictures()[0])
    assert peaks[0] < ballast.nbytes
    assert peaks[1] - peaks[0] > 40e6
    assert peaks[2] - peaks[1] > 40e6


@pytest.mark.parametrize("target", ["theirs.py", ":f", "torch:", "torch"])
def test_a_target_of_another_form(target):
    with pytest.raises(ValueError, match=r"expected FILE\.py:FUNCTION or MODULE:FUNCTION"):
        load_callable(target)


def test_a_target_that_is_not_there(theirs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.py: no such file"):
        load_callable(f"{tmp_path}/gone.py:f")
    with pytest.raises(ValueError, match="no module named 'no_such_module'"):
        load_callable("no_such_module:f")
    for name in ("constant", "missing"):
        with pytest.raises(ValueError, match=f"has no function '{name}'"):
            load_callable(f"{theirs}:{name}")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        compare(f"{theirs}:average", average, pictures(), folder=tmp_path / "gone")


def test_modules_are_importable_by_name():
    assert load_callable("torch:maximum") is torch.maximum
