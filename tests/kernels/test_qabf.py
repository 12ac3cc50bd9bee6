"""Q^AB/F in one pass: the Triton twin against the metric."""

from __future__ import annotations

import math

import pytest
import torch

from fusionkit.kernels.qabf import qabf_takes
from fusionkit.metrics import edges, qabf
from tests.kernels.cases import pictures


@pytest.fixture
def by_twin(device, monkeypatch):
    """qabf with the twin, whatever the device."""

    def value(*given, **options):
        with monkeypatch.context() as patch:
            patch.setattr(edges, "qabf_takes", lambda *x: True)
            return qabf(*given, **options)

    return value


def reference(*given, **options):
    return qabf(*(x.cpu() for x in given), **options).to(given[0].device)


@pytest.mark.parametrize("convention", ["matlab", "paper"])
@pytest.mark.parametrize("shape", [(2, 1, 9, 13), (1, 1, 8, 8), (1, 1, 1, 67)])
def test_twin_is_the_metric(shape, convention, by_twin, device):
    given = [x.detach() for x in pictures(shape, device)]
    found = by_twin(*given, convention=convention)
    torch.testing.assert_close(found, reference(*given, convention=convention), rtol=1e-12, atol=0)


@pytest.mark.parametrize("convention", ["matlab", "paper"])
def test_whole_levels_equal_edges_and_flat_regions(convention, by_twin, device):
    a, b, _ = ((8 * x.detach()).round() / 255 for x in pictures((1, 1, 12, 12), device))
    fused = torch.cat([a[..., :6], b[..., 6:]], dim=-1)
    fused[..., 4:8, :] = 0.5
    found = by_twin(a, b, fused, convention=convention)
    expected = reference(a, b, fused, convention=convention)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_not_contiguous(by_twin, device):
    given = [x.detach().mT[..., ::2, 1:] for x in pictures((2, 1, 9, 20), device)]
    torch.testing.assert_close(by_twin(*given), reference(*given), rtol=1e-12, atol=0)


def test_steep_and_gentle_angles(by_twin, device):
    # Ramps whose directions lie between 0 and a right angle: the arctangent over its range.
    step = torch.arange(6, device=device) / 255
    for slope in (0.0, 1e-3, 0.1, 0.7, 1.0, 3.0, 40.0):
        a = (step[None, :] + slope * step[:, None])[None, None].clamp(0, 1)
        given = a, a.mT.contiguous(), step.expand(1, 1, 6, 6)
        torch.testing.assert_close(by_twin(*given), reference(*given), rtol=1e-12, atol=1e-15)


def test_black_sources_have_no_value(by_twin, device):
    a, b, _ = torch.zeros(3, 1, 1, 8, 8, device=device)
    assert math.isnan(by_twin(a, b, b + 0.5).item())


def test_only_without_a_gradient():
    a, b, f = (
        x.double() for x in pictures((1, 8, 8), "cuda" if torch.cuda.is_available() else "cpu")
    )
    assert not qabf_takes(a, b, f)
    with torch.no_grad():
        assert qabf_takes(a, b, f) == a.is_cuda
