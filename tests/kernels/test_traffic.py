"""Bytes moved, counted by hand, and the table of what twins save."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fusionkit.kernels.channel_statistics import channel_statistics_reference
from fusionkit.kernels.gated_depthwise import gated_depthwise_reference
from fusionkit.kernels.joint_histogram import joint_counts_reference
from fusionkit.kernels.maximum_loss import maximum_terms_reference
from fusionkit.kernels.normed_depthwise import (
    normed_depthwise_reference,
    normed_gated_depthwise_reference,
)
from fusionkit.kernels.ssim import ssim_reference
from fusionkit.kernels.traffic import COUNTS, WORTH, bytes_moved, table
from fusionkit.metrics import qabf
from fusionkit.models.solvers import Anderson

CHANNELS, SIDE = 16, 96
PIXELS = SIDE**2


def test_reads_and_writes_count_and_views_do_not():
    x, y = torch.rand(4, 25), torch.rand(4, 25)
    assert bytes_moved(lambda: x + y) == 3 * 400
    assert bytes_moved(lambda: x.add_(y)) == 3 * 400
    assert bytes_moved(lambda: x.view(10, 10).mT[:5]) == 0
    assert bytes_moved(lambda: (x + y) * y[:, :1].expand(4, 25)) == 5 * 400 + 4 * 4


def test_a_backward_pass_counts():
    x = torch.rand(100, requires_grad=True)
    loss = x.exp().sum()
    # The sum's gradient is one number, broadcast; exp's reads that and exp(x), and writes one map.
    assert bytes_moved(lambda: torch.autograd.grad(loss, x)) in range(2 * 400, 2 * 400 + 20)


def forward(function, inputs):
    return bytes_moved(lambda: function(*inputs))


def backward(function, inputs):
    """Bytes of the gradients by all inputs that want one, after the function."""
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    slopes = [torch.rand_like(x) for x in results]
    wanted = [x for x in inputs if x.requires_grad]
    return bytes_moved(lambda: torch.autograd.grad(results, wanted, slopes))


def both(function, inputs):
    return forward(function, inputs) + backward(function, inputs)


def pictures():
    a, b, fused = torch.rand(3, 1, 1, SIDE, SIDE)
    return a, b, fused.requires_grad_()


def maps(channels):
    x = torch.rand(1, channels, SIDE, SIDE)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def weights(*shapes):
    return [torch.rand(shape, requires_grad=True) for shape in shapes]


def of_block(out_channels):
    """x, and the weights of norm, 1×1 and depth-wise convolution."""
    shapes = CHANNELS, CHANNELS, (out_channels, CHANNELS, 1, 1), (out_channels, 1, 3, 3)
    return maps(CHANNELS), *weights(*shapes)


def layer_norm(x, weight, bias):
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias)


def anderson():
    """A solver with a full memory."""
    solver = Anderson(memory=6, mixing=1.0, regularisation=1e-4)
    for _ in range(6):
        solver(*torch.rand(2, 1, CHANNELS * PIXELS))
    return solver


# How many units of the table, the operation, and its inputs.
CASES = {
    "maximum_terms": lambda: (PIXELS, maximum_terms_reference, pictures()),
    "ssim_of_both": lambda: (
        PIXELS,
        lambda a, b, fused: ssim_reference(fused, a, b, border="zeros"),
        pictures(),
    ),
    "gated_depthwise": lambda: (
        CHANNELS * PIXELS,
        gated_depthwise_reference,
        (maps(2 * CHANNELS), *weights((2 * CHANNELS, 1, 3, 3))),
    ),
    "normed_depthwise": lambda: (
        CHANNELS * PIXELS,
        normed_depthwise_reference,
        of_block(3 * CHANNELS),
    ),
    "normed_gated_depthwise": lambda: (
        CHANNELS * PIXELS,
        normed_gated_depthwise_reference,
        of_block(4 * CHANNELS),
    ),
    "layer_norm": lambda: (CHANNELS * PIXELS, layer_norm, of_block(1)[:3]),
    "channel_statistics": lambda: (
        CHANNELS * PIXELS,
        channel_statistics_reference,
        weights(*[(1, CHANNELS, SIDE, SIDE)] * 2),
    ),
    "joint_histogram": lambda: (
        PIXELS,
        lambda x, y: joint_counts_reference(x, y, bins=16),
        (15 * torch.rand(2, 1, SIDE, SIDE)).double(),
    ),
    # With the check of the range and the way to gray levels, 108 bytes more.
    "qabf": lambda: (PIXELS, qabf, [x.detach() for x in pictures()]),
    "anderson_mixing": lambda: (
        CHANNELS * PIXELS,
        anderson(),
        torch.rand(2, 1, CHANNELS * PIXELS),
    ),
}
PHASES = {"forward": forward, "backward": backward, "both": both}


@pytest.mark.parametrize("row", COUNTS, ids=lambda row: f"{row.operation} {row.phase}")
def test_the_eager_column_is_what_moves(row):
    units, function, inputs = CASES[row.operation]()
    found = PHASES[row.phase](function, inputs) / units
    assert found == pytest.approx(row.eager, rel=0.07)


def test_only_what_is_worth_it_is_kept():
    rows = table()
    assert len({(row["operation"], row["phase"]) for row in rows}) == len(rows) == len(COUNTS)
    assert WORTH == 1.5
    for row in rows:
        assert row["kept"] == (row["compiled"] >= 1.5 * row["triton"])
        assert not row["measured"]
    found = {(row["operation"], row["phase"]): row for row in rows}
    assert found["normed_depthwise", "forward"]["gain"] == 3
    assert found["normed_depthwise", "forward"]["kept"]
    assert not found["layer_norm", "both"]["kept"]
    assert not found["anderson_mixing", "forward"]["kept"]
