"""Q^AB/F, N^AB/F and Q_G: MATLAB values, known values, and what follows from the definitions."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from fusionkit.metrics import edges as module
from fusionkit.metrics.edges import nabf, qabf, qg

from .reference import pictures, preserved, solid_rows, triple

METRICS = {"qabf": qabf, "nabf": nabf, "qg": qg}


@pytest.mark.parametrize("row", solid_rows(METRICS))
def test_reference_values(row, shared):
    metric = METRICS[row["name"]]
    images = pictures(row, shared)
    assert metric(*images).item() == pytest.approx(row["value"], rel=1e-9)
    assert metric(*(x.float() for x in images)).item() == pytest.approx(row["value"], rel=1e-9)


# Known values


def test_identical_pictures_by_the_paper():
    x = triple()[2]
    expected = torch.full((3,), preserved(module.XYDEAS), dtype=torch.float64)
    torch.testing.assert_close(qabf(x, x, x, "paper"), expected)
    assert (qabf(x, x, x) > expected).all()


def ramp(slope: float, size=(12, 20)) -> torch.Tensor:
    """Columns that brighten by `slope` gray levels; whole levels."""
    return (slope * torch.arange(size[1]).double() / 255).expand(1, 1, *size)


def test_nabf_of_a_steeper_ramp_by_hand():
    # Inside, each gradient is the slope (Sobel over 8); the mirrored border has none.
    kept = 0.9999 / (1 + math.exp(-19 * (0.5 - 0.5))) * 0.9995 / (1 + math.exp(-22 * 0.5))
    inside, outside = 18 * 4**1.5, 2 * 0.001
    expected = (1 - math.sqrt(kept)) * inside / (inside + outside)
    assert nabf(ramp(4), ramp(4), ramp(8)).item() == pytest.approx(expected, rel=1e-12)
    assert nabf(ramp(4), ramp(8), ramp(8)).item() == 0


def test_gradients_at_right_angles_are_not_preserved():
    # The interior only: beyond the border the zeros have edges of their own.
    a = module._qabf_edges(ramp(4, (16, 16))[0] * 255)
    b = module._qabf_edges(ramp(4, (16, 16))[0].mT * 255)
    inside = (..., slice(1, -1), slice(1, -1))
    assert (a.strength[inside] == b.strength[inside]).all()
    assert (module._alignment(a, b)[inside] == 0).all()
    assert (module._alignment(a, a)[inside] == 1).all()
    same, turned = (qg(ramp(4), ramp(4), f).item() for f in (ramp(4), ramp(4, (20, 12)).mT))
    assert turned < 0.3 < 0.98 < same


def test_qg_takes_flat_regions_as_preserved():
    flat = torch.zeros(1, 1, 20, 20)
    assert qg(flat, flat, flat).item() == pytest.approx(preserved(module.LIU))


def test_constant_pictures():
    black, gray = torch.zeros(2, 1, 9, 9), torch.full((2, 1, 9, 9), 0.4)
    assert qabf(black, black, gray).isnan().all()
    assert torch.isfinite(qabf(gray, gray, gray)).all()  # the border counts
    assert nabf(gray, gray, gray).tolist() == [0, 0]
    assert nabf(black, gray, black).tolist() == [0, 0]
    for pictures_ in ((gray, gray, black), (black, black, gray), (black, gray, gray)):
        assert torch.isfinite(qg(*pictures_)).all()


# Gradients


@pytest.mark.parametrize("convention", module.QABF_CONVENTIONS)
def test_qabf_gradients(convention):
    a, b, fused = (0.1 + 0.8 * x.double() for x in triple(2, size=(12, 13)))
    generator = torch.Generator().manual_seed(1)
    fused = (fused + 0.05 * torch.rand(fused.shape, generator=generator)).requires_grad_()
    metric = partial(qabf, convention=convention)
    assert torch.autograd.gradcheck(lambda f: metric(a, b, f), (fused,), eps=1e-8, fast_mode=True)


@pytest.mark.parametrize("convention", module.QABF_CONVENTIONS)
def test_qabf_gradients_are_finite_on_flat_regions_and_copies(convention):
    a, b, fused = triple()
    for start in (fused, a, torch.full_like(a, 0.5), torch.zeros_like(a)):
        start = start.clone().requires_grad_()
        qabf(a, b, start, convention).sum().backward()
        assert torch.isfinite(start.grad).all()
    near = (0.9 * a + 0.1 * b).requires_grad_()
    qabf(a, b, near, convention).sum().backward()
    assert near.grad.abs().max() > 0


# Refusals


def test_unknown_conventions_are_refused():
    with pytest.raises(ValueError, match=r"convention 'python'.*expected one of matlab, paper"):
        qabf(*triple(), convention="python")


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_pictures_one_pixel_wide(size):
    x = torch.linspace(0.1, 1, size[0] * size[1]).view(1, 1, *size)
    assert qabf(x, x, x).isnan() if size == (1, 1) else 0 < qabf(x, x, x).item() < 1
    assert 0 < qg(x, x, x).item() < 1
    with pytest.raises(ValueError, match=f"2×2 pixels at least; got {size[0]}×{size[1]}"):
        nabf(x, x, x)
