"""VIF and VIFF against the field's MATLAB values, and what follows from their definitions."""

from __future__ import annotations

import pytest
import torch

from fusionkit.metrics.fidelity import vif, viff

from .reference import pictures, solid_rows, triple

METRICS = {"vif": vif, "viff": viff}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
SIZE = (48, 57)


@pytest.mark.parametrize("row", solid_rows(METRICS))
def test_reference_values(row, shared):
    metric = METRICS[row["name"]]
    images = pictures(row, shared)
    # Flat regions of over-exposed pictures are decided by rounding: 7e-7 at most, 1e-9 elsewhere.
    assert metric(*images).item() == pytest.approx(row["value"], rel=1e-6)
    assert metric(*(x.float() for x in images)).item() == pytest.approx(row["value"], rel=1e-6)


def test_reductions():
    a, b, fused = triple(size=SIZE)
    total = vif(a, b, fused)
    torch.testing.assert_close(vif(a, b, fused, reduction="sum"), total)
    torch.testing.assert_close(vif(a, b, fused, reduction="mean"), total / 2)
    each = [vif(x, x, fused, reduction="mean") for x in (a, b)]
    torch.testing.assert_close(total, each[0] + each[1])
    with pytest.raises(ValueError, match="reduction 'max'; expected one of sum, mean"):
        vif(a, b, fused, reduction="max")


@every_metric
def test_brightness_does_not_count_and_contrast_does(metric):
    a, b, fused = (0.25 + (x * 127).round() / 255 for x in triple(size=SIZE))
    value = metric(a, b, fused)
    torch.testing.assert_close(metric(a, b, fused - 51 / 255), value, rtol=1e-5, atol=0)
    middle = fused.mean((-2, -1), keepdim=True)
    assert (metric(a, b, middle + 0.5 * (fused - middle)) < value).all()
    x = a.double()
    assert (metric(x, x, (1.4 * x - 0.2).clamp(0, 1)) > metric(x, x, x)).all()


def test_data_range_sets_the_noise():
    a, b, fused = (x.double() for x in triple(size=SIZE))
    halved = vif(a / 2, b / 2, fused / 2, data_range=510)
    torch.testing.assert_close(halved, vif(a, b, fused), rtol=1e-8, atol=0)
    assert (vif(a, b, fused, data_range=1) > 1.05 * vif(a, b, fused)).all()
    for bad in (0, -255, float("nan")):
        with pytest.raises(ValueError, match=f"data_range {bad}; expected a positive number"):
            vif(a, b, fused, data_range=bad)


def test_vif_of_a_noise_free_gain():
    """f = a / 2 without distortion: the ratio of log(1 + s²/4 / σ²) to log(1 + s² / σ²)."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 1, 64, 64, generator=generator, dtype=torch.float64)
    # With noise far above the signal both logarithms are linear, so that the ratio is gain².
    value = vif(a, a, a / 2, reduction="mean", data_range=1e-3)
    assert value.item() == pytest.approx(0.25, rel=1e-3)


def test_constant_pictures():
    a, b, fused = triple(1, SIZE)
    flat = torch.full_like(a, 0.7)
    assert vif(flat, b, fused).isnan().all()
    assert vif(flat, flat, flat).isnan().all()
    assert vif(a, b, flat).item() == 0
    assert viff(flat, flat, flat).item() == pytest.approx(1)
    assert viff(a, b, flat).item() == pytest.approx(0, abs=1e-5)
    assert viff(flat, b, fused).isfinite().all()


def test_gradients():
    a, b, fused = (0.1 + 0.8 * x.double() for x in triple(1, (41, 43)))
    fused.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: vif(a, b, f), (fused,), fast_mode=True)
    for other in (fused.detach(), a.round(), torch.full_like(a, 0.5)):  # flat regions as well
        picture = other.float().requires_grad_()
        vif(a.float(), b.float(), picture).sum().backward()
        assert picture.grad.isfinite().all()
    picture = fused.detach().requires_grad_()
    vif(a, b, picture).sum().backward()
    stepped = fused.detach() + 1e-3 * picture.grad / picture.grad.abs().max()
    assert vif(a, b, stepped.clamp(0, 1)).item() > vif(a, b, fused).item()


@every_metric
def test_small_pictures_are_refused(metric):
    with pytest.raises(ValueError, match=r"41×41 pixels; got 40×41"):
        metric(*triple(1, (40, 41)))
    assert metric(*triple(1, (41, 41))).isfinite().all()
