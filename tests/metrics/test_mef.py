"""MEF-SSIM against the field's MATLAB values, a patch by its definition, and known values."""

from __future__ import annotations

import math

import pytest
import torch

from fusionkit.metrics._filters import gaussian
from fusionkit.metrics.mef import mef_ms_ssim, mef_ssim

from .reference import pictures, solid_rows, triple

METRICS = {"mef_ssim": mef_ssim, "mef_ms_ssim": mef_ms_ssim}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
SIZE = (48, 57)


@pytest.mark.parametrize("row", solid_rows(METRICS))
def test_reference_values(row, shared):
    value = METRICS[row["name"]](*pictures(row, shared))
    assert value.item() == pytest.approx(row["value"], rel=1e-9)


def test_a_patch_by_its_definition():
    a, b, f = (255 * x.double()[0, 0] for x in triple(1, size=(11, 11)))
    patches = [x - x.mean() for x in (a, b)]
    norms = [x.norm() + 0.001 for x in patches]
    consistency = sum(patches).norm() / sum(x.norm() for x in patches)
    power = math.tan(math.pi / 2 * consistency)
    assert 0 < power < 10
    structure = sum(n**power * x / n for x, n in zip(patches, norms, strict=True))
    desired = max(norms) * structure / structure.norm()
    taps = torch.tensor(gaussian(11, 1.5), dtype=torch.float64)
    window = taps[:, None] * taps
    means = [(window * x).sum() for x in (desired, f)]
    covariance = (window * (desired - means[0]) * (f - means[1])).sum()
    variances = [(window * (x - m) ** 2).sum() for x, m in zip((desired, f), means, strict=True)]
    c2 = 7.65**2
    expected = (2 * covariance + c2) / (sum(variances) + c2)
    value = mef_ssim(*(x[None, None] / 255 for x in (a, b, f)))
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)


@every_metric
def test_means_of_patches_do_not_enter(metric):
    fused = triple(size=SIZE)[2]
    ones = torch.ones(3, dtype=torch.float64)
    shifted = 0.8 * fused
    torch.testing.assert_close(metric(shifted, shifted, shifted + 0.1), ones, rtol=0, atol=1e-6)


@every_metric
def test_a_flat_source_does_not_count(metric):
    a = triple(size=SIZE)[0]
    flat = torch.full_like(a, 0.4)
    torch.testing.assert_close(
        metric(a, flat, a), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-3
    )


@every_metric
def test_constant_pictures(metric):
    flat = [torch.full((1, 1, *SIZE), x) for x in (0.1, 0.7, 0.3)]
    assert metric(*flat).item() == pytest.approx(1, abs=1e-5)
    textured = triple(1, size=SIZE)[2]
    assert 0 < metric(flat[0], flat[1], textured).item() < 0.9


def test_a_negative_has_no_multi_scale_value():
    a = triple(1, size=SIZE)[0]
    fused = (1 - a).requires_grad_()
    value = mef_ms_ssim(a, a, fused)
    assert value.item() == 0
    value.sum().backward()
    assert torch.isfinite(fused.grad).all()


@pytest.mark.parametrize(("metric", "least"), [(mef_ssim, 11), (mef_ms_ssim, 41)])
def test_small_pictures_are_refused(metric, least):
    enough = torch.rand(1, 1, least, least)
    assert torch.isfinite(metric(enough, enough, enough)).all()
    small = torch.rand(1, 1, least - 1, least)
    with pytest.raises(ValueError, match=f"{least}×{least} pixels; got {least - 1}×{least}"):
        metric(small, small, small)


@every_metric
def test_gradients(metric):
    a, b, fused = (0.1 + 0.8 * x.double() for x in triple(1, size=(41, 42)))
    fused.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: metric(a, b, f), (fused,), fast_mode=True)
    flat = torch.full((1, 1, 41, 42), 0.5, requires_grad=True)
    metric(a.float(), b.float(), flat).sum().backward()
    assert torch.isfinite(flat.grad).all()
    assert flat.grad.abs().max() > 0
