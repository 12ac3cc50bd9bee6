"""Joint histograms: the Triton twin against the reference, and against counts by hand."""

from __future__ import annotations

import pytest
import torch

from fusionkit.kernels import joint_histogram as module
from fusionkit.kernels.joint_histogram import joint_counts_reference, joint_counts_twin
from fusionkit.metrics import mutual_information
from tests.kernels.cases import pictures


def levels(shape, device):
    return [255 * x.detach().double() for x in pictures(shape, device, count=2)]


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 33, 47), (1, 1, 1)])
def test_twin_is_the_reference(shape, device):
    x, y = levels(shape, device)
    found = joint_counts_twin(x, y)
    assert found.sum() == x.numel()
    assert torch.equal(found, joint_counts_reference(x, y))


def test_not_contiguous(device):
    x, y = (z.mT[:, ::2] for z in levels((2, 9, 14), device))
    assert torch.equal(joint_counts_twin(x, y), joint_counts_reference(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_halves_go_to_even(dtype, device):
    x = torch.tensor([[[0.5, 1.5, 2.5, 2.4999]]], dtype=dtype, device=device)
    y = torch.tensor([[[3.5, 3.0, 0.0, 0.0]]], dtype=dtype, device=device)
    expected = torch.zeros(1, 5, 5, dtype=torch.int64, device=device)
    expected[0, [0, 2], [4, 3]] = 1
    expected[0, 2, 0] = 2
    assert torch.equal(joint_counts_twin(x, y, bins=5), expected)
    assert torch.equal(joint_counts_reference(x, y, bins=5), expected)


def test_a_level_beyond_the_bins_is_not_written_elsewhere(device):
    x = torch.tensor([[[-1.0, 4.0, 1.0]], [[0.0, 0.0, 0.0]]], device=device)
    found = joint_counts_twin(x, x.clamp(0, 3), bins=4)
    assert found[0].sum() == 1
    assert found[1, 0, 0] == 3


def test_mutual_information_is_the_same(device, monkeypatch):
    a, b, f = (x.detach() for x in pictures((2, 1, 16, 17), device))
    expected = mutual_information(a, b, f)
    monkeypatch.setattr(module, "twin_takes", lambda *x, types: x[0].dtype in types)
    called, twin = [], joint_counts_twin
    monkeypatch.setattr(module, "joint_counts_twin", lambda *x: called.append(1) or twin(*x))
    assert torch.equal(mutual_information(a, b, f), expected)
    assert called
