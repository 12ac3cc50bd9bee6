"""Bytes moved, counted by hand."""

from __future__ import annotations

import torch

from fusionkit.kernels.traffic import bytes_moved


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
