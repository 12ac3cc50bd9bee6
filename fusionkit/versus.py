"""Another implementation beside ours: the same inputs, timed in turn, outputs compared.

An implementation is named "FILE.py:FUNCTION" or "MODULE:FUNCTION".
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fusionkit import _apart
from fusionkit._apart import load_callable
from fusionkit.bench import seconds_of


class Apart:
    """A function in a process of its own: another version of a package, or a peak of its own.

    Use it as a context manager; each call runs the function once on the same inputs and returns its
    seconds, without the way there and back.

    Args:
        target: "FILE.py:FUNCTION" or "MODULE:FUNCTION".
        inputs: tensors, strings and numbers.
        folder: where that process looks for modules first, such as the checkout of another version.

    Attributes:
        peak: bytes of resident memory that the process has needed so far, torch itself included.

    Raises:
        RuntimeError: the function failed there; the message ends with what it wrote to stderr.
    """

    def __init__(
        self, target: str, inputs: Sequence, folder: str | os.PathLike | None = None
    ) -> None:
        self.target, self.inputs, self.folder = target, tuple(inputs), folder
        self.peak = 0

    def __enter__(self) -> Apart:
        self._scratch = tempfile.TemporaryDirectory()
        self._place = Path(self._scratch.name)
        torch.save(self.inputs, self._place / "inputs.pt")
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        if self.folder is not None:
            paths = [str(self.folder), *filter(None, [environment.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        self._errors = (self._place / "stderr").open("w+")
        # -P: the folder of the script holds modules whose names others use, too.
        self._process = subprocess.Popen(
            [sys.executable, "-P", _apart.__file__, self.target, str(self._place)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        return self

    def __call__(self) -> float:
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and the line below is empty
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{self.target} failed: {self._errors.read().strip()[-2000:]}")
        answer = json.loads(answer)
        self.peak = answer["peak"]
        return answer["seconds"]

    def output(self) -> torch.Tensor:
        """What the first call returned; ends the process."""
        self._process.communicate()
        return torch.load(self._place / "output.pt", weights_only=True)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._scratch.cleanup()


def compare(
    other: str,
    ours: Callable,
    inputs: Sequence,
    *,
    folder: str | os.PathLike | None = None,
    repeats: int = 5,
    limit: float = math.inf,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Time `other` and `ours` on the same inputs and compare what they return.

    After one call each to warm up they are called in turn, `repeats` times each, or fewer after
    `limit` seconds, so that whatever else the machine does meets both.

    Args:
        other: "FILE.py:FUNCTION" or "MODULE:FUNCTION".
        ours: a function of the same arguments.
        inputs: the arguments, such as the two pictures.
        folder: run the other in a process of its own, which looks for modules there first.

    Returns:
        Medians `ours` and `other` in seconds, `speedup` (other / ours), the `calls` of each, and
        the largest absolute `difference` of the outputs.

    Raises:
        ValueError: the outputs' shapes differ; `other` names no function.
        FileNotFoundError: `other` or `folder` is not there.
        RuntimeError: the other failed in its own process.
    """

    def clock() -> float:
        return seconds_of(lambda: ours(*inputs), device)

    if folder is None:
        function = load_callable(other)
        theirs = torch.as_tensor(function(*inputs))
        found = torch.as_tensor(ours(*inputs))
        times = _in_turn(
            clock, lambda: seconds_of(lambda: function(*inputs), device), repeats, limit
        )
        return _row(times, found, theirs)
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    with Apart(other, inputs, folder) as apart:
        apart()
        found = torch.as_tensor(ours(*inputs))
        times = _in_turn(clock, apart, repeats, limit)
        return _row(times, found, apart.output())


def _in_turn(
    ours: Callable[[], float], other: Callable[[], float], repeats: int, limit: float
) -> list[tuple[float, float]]:
    times = [(ours(), other())]
    while len(times) < repeats and sum(map(sum, times)) < limit:
        times.append((ours(), other()))
    return times


def _row(
    times: list[tuple[float, float]], ours: torch.Tensor, other: torch.Tensor
) -> dict[str, float]:
    if ours.shape != other.shape:
        raise ValueError(f"ours gives {tuple(ours.shape)}, the other {tuple(other.shape)}")
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "ours": mine,
        "other": theirs,
        "speedup": theirs / mine,
        "calls": len(times),
        "difference": (ours.cpu().double() - other.cpu().double()).abs().max().item(),
    }
