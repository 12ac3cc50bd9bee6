"""How many bytes a computation moves: what bounds it on a GPU, and what a Triton twin saves.

Which operations have a twin is decided by `table`, until times on a GPU do: a predicted gain of
`WORTH` or more over the compiled reference. None is measured yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORTH = 1.5  # times less traffic than the compiled reference


class Traffic(NamedTuple):
    """Bytes that an operation reads and writes for each `unit`, each address once.

    `eager` is counted by `bytes_moved`. `compiled` is what the schedule of `torch.compile` (of
    torch 2.15) reads and writes, without copies between memory formats; convolutions, matrix
    products and counting stay library calls there. `triton` is what the twin loads and stores, or
    would have to. Maps are float32 in channels last, as in the networks; pictures are float32, for
    metrics float64. What does not grow with the picture is left out.
    """

    operation: str
    phase: str
    unit: str
    eager: float
    compiled: float
    triton: float
    why: str

    @property
    def gain(self) -> float:
        """How many times less the twin moves than the compiled reference."""
        return self.compiled / self.triton

    @property
    def kept(self) -> bool:
        """Whether the package has the twin."""
        return self.gain >= WORTH


PIXEL, CHANNEL = "pixel", "pixel and channel"
COUNTS = (
    Traffic(
        *("maximum_terms", "forward", PIXEL, 216, 116, 13),
        "three pictures read once; a byte for the backward pass written",
    ),
    Traffic(
        *("maximum_terms", "backward", PIXEL, 124, 60, 5),
        "that byte is all it reads",
    ),
    Traffic(
        *("ssim_of_both", "forward", CHANNEL, 640, 204, 76),
        "products are formed while rows are blurred, and compared while columns are",
    ),
    Traffic(
        *("ssim_of_both", "backward", CHANNEL, 1152, 288, 112),
        "the same with the transposed blurs",
    ),
    Traffic(
        *("gated_depthwise", "forward", CHANNEL, 36, 28, 12),
        "convolution and gate in one: two maps read, one written",
    ),
    Traffic(
        *("gated_depthwise", "both", CHANNEL, 112, 72, 72),
        "the convolved maps, which the gradients need, would be computed and moved again",
    ),
    Traffic(
        *("normed_depthwise", "forward", CHANNEL, 48, 48, 16),
        "norm, 1×1 and 3×3 in one: C channels read, 3·C written",
    ),
    Traffic(
        *("normed_depthwise", "both", CHANNEL, 117, 125, 117),
        "the weights' gradients need all maps between, which would be computed again",
    ),
    Traffic(
        *("normed_gated_depthwise", "forward", CHANNEL, 100, 84, 12),
        "norm, 1×1, 3×3 and gate in one: C channels read, 2·C written",
    ),
    Traffic(
        *("layer_norm", "forward", CHANNEL, 8, 8, 8),
        "one map read and one written, whoever does it",
    ),
    Traffic(
        *("layer_norm", "both", CHANNEL, 21, 29, 20),
        "backward two maps read and one written; the compiler reads them again for the weights",
    ),
    Traffic(
        *("channel_statistics", "forward", CHANNEL, 32, 16, 8),
        "q kᵀ and both squared lengths in one reading",
    ),
    Traffic(
        *("channel_statistics", "backward", CHANNEL, 88, 48, 16),
        "both gradients in one reading",
    ),
    Traffic(
        *("joint_histogram", "forward", PIXEL, 128, 32, 16),
        "levels are rounded, paired and counted at once",
    ),
    Traffic(
        *("qabf", "forward", PIXEL, 2586, 152, 24),
        "three pictures read once; no map of gradients is written",
    ),
    Traffic(
        *("anderson_mixing", "forward", "unknown", 100, 72, 64),
        "memory of six, counted by hand; compiled, residual and products are one operation, too",
    ),
)


def table() -> list[dict[str, object]]:
    """`COUNTS` with the predicted `gain` and whether the twin is `kept`, a dict a row."""
    return [
        {**row._asdict(), "gain": round(row.gain, 2), "kept": row.kept, "measured": False}
        for row in COUNTS
    ]


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
