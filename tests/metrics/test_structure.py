"""SCD, CC, SSIM and MS-SSIM against the field's MATLAB values, piq and known values."""

from __future__ import annotations

import pytest
import torch

from fusionkit.metrics.structure import cc, ms_ssim, scd, ssim

from .reference import pictures, related, solid_rows, triple

METRICS = {"scd": scd, "cc": cc, "ssim": ssim, "ms_ssim": ms_ssim}
SIZE = (176, 180)


@pytest.mark.parametrize("row", solid_rows(["scd", "cc", "ssim"]))
def test_reference_values(row, shared):
    options = {"reduction": "sum"} if row["name"] == "ssim" else {}
    value = METRICS[row["name"]](*pictures(row, shared), **options)
    assert value.item() == pytest.approx(row["value"], rel=1e-9)


@pytest.mark.parametrize("metric", [ssim, ms_ssim])
def test_reductions(metric):
    a, b, fused = related()
    both = metric(a, b, fused, reduction="sum")
    torch.testing.assert_close(both, 2 * metric(a, b, fused))
    torch.testing.assert_close(both, metric(a, a, fused) + metric(b, b, fused))
    with pytest.raises(ValueError, match="reduction 'max'; expected one of mean, sum"):
        metric(a, b, fused, reduction="max")


@pytest.mark.parametrize("metric", [ssim, ms_ssim])
def test_ivif_zoo_all_but_drops_the_constants(metric):
    a, b, fused = related()
    assert (metric(a, b, fused, convention="ivif_zoo") < metric(a, b, fused)).all()
    with pytest.raises(ValueError, match=r"convention 'zoo'.*expected one of standard, ivif_zoo"):
        metric(a, b, fused, convention="zoo")
    # The constants for a range of 255 on levels 255 times as large: two flat pictures.
    dark, light = torch.full((1, 1, *SIZE), 0.2), torch.full((1, 1, *SIZE), 0.6)
    c1 = 0.01**2
    luminance = (2 * 51 * 153 + c1) / (51**2 + 153**2 + c1)
    power = 1 if metric is ssim else 0.1333
    value = metric(dark, dark, light, convention="ivif_zoo").item()
    assert value == pytest.approx(luminance**power, rel=1e-6)


def test_cc_of_a_mean_and_of_a_negative():
    a, b, _ = (x.double() for x in triple())
    r = [
        torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]
        for x, y in zip(a, b, strict=True)
    ]
    # The mean of two pictures of one variance correlates with each by sqrt((1 + r) / 2).
    a, b = (((x - x.mean((-2, -1), True)) / x.std((-2, -1), keepdim=True)) for x in (a, b))
    a, b = 0.5 + a / 20, 0.5 + b / 20
    expected = ((1 + torch.stack(r)) / 2).sqrt()
    torch.testing.assert_close(cc(a, b, (a + b) / 2), expected)
    torch.testing.assert_close(cc(a, a, 1 - a), -torch.ones(3, dtype=torch.float64))


def test_scd_of_a_sum_and_of_a_negative():
    a, b, _ = (x.double() * 0.4 for x in triple())
    torch.testing.assert_close(scd(a, b, a + b), torch.full((3,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(scd(a, a, 1 - a), torch.full((3,), -2.0, dtype=torch.float64))


@pytest.mark.parametrize("metric", [cc, scd])
def test_correlations_with_constant_pictures_are_nan(metric):
    flat = torch.full((1, 1, 8, 8), 0.3)
    assert metric(flat, flat, flat).isnan().all()


@pytest.mark.parametrize("factor", [1, 255])
def test_ms_ssim_is_piqs(factor):
    # torchmetrics counts a mirrored border as well, and differs in the second or third digit.
    piq = pytest.importorskip("piq")
    a, b, fused = (x.double() for x in related(2, size=(192, 208)))
    expected = [
        piq.multi_scale_ssim(fused * factor, x * factor, data_range=float(factor), reduction="none")
        for x in (a, b)
    ]
    torch.testing.assert_close(ms_ssim(a, b, fused), sum(expected) / 2, rtol=1e-9, atol=0)
    both = ms_ssim(a, b, fused, reduction="sum")
    torch.testing.assert_close(both, sum(expected), rtol=1e-9, atol=0)


def test_ms_ssim_of_a_negative_is_zero_with_a_finite_gradient():
    a = triple(1, size=SIZE)[0].double()
    fused = (1 - a).requires_grad_()
    value = ms_ssim(a, a, fused)
    assert value.item() == 0
    value.sum().backward()
    assert torch.isfinite(fused.grad).all()


@pytest.mark.parametrize("metric", [ssim, ms_ssim])
def test_flat_pictures_compare_their_means(metric):
    dark, light = torch.full((1, 1, *SIZE), 0.2), torch.full((1, 1, *SIZE), 0.6)
    luminance = (2 * 51 * 153 + 2.55**2) / (51**2 + 153**2 + 2.55**2)
    power = 1 if metric is ssim else 0.1333
    assert metric(dark, dark, light).item() == pytest.approx(luminance**power, rel=1e-6)


@pytest.mark.parametrize(("metric", "least"), [(ssim, 11), (ms_ssim, 176)])
def test_small_pictures_are_refused(metric, least):
    enough = torch.rand(1, 1, least, least)
    assert torch.isfinite(metric(enough, enough, enough)).all()
    small = torch.rand(1, 1, least - 1, least)
    with pytest.raises(ValueError, match=f"{least}.*got {least - 1}×{least}"):
        metric(small, small, small)


@pytest.mark.parametrize("metric", [cc, scd])
def test_correlations_of_pictures_one_pixel_wide(metric):
    assert torch.isfinite(metric(*triple(size=(40, 1)))).all()


@pytest.mark.parametrize(
    ("metric", "size"), [(cc, (12, 13)), (scd, (12, 13)), (ssim, (12, 13)), (ms_ssim, SIZE)]
)
def test_gradients(metric, size):
    a, b, fused = (0.1 + 0.8 * x.double() for x in related(1, size=size))
    fused.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: metric(a, b, f), (fused,), fast_mode=True)
