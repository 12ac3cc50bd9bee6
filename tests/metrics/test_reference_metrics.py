"""PSNR and RMSE against the field's MATLAB values, and measures against a ground truth."""

from __future__ import annotations

import math

import pytest
import torch

from fusionkit.metrics.reference import (
    psnr,
    reference_psnr,
    reference_rmse,
    reference_ssim,
    rmse,
)
from fusionkit.metrics.structure import ssim

from .reference import pictures, solid_rows, triple

METRICS = {"psnr": psnr, "rmse": rmse}
REFERENCE = {"psnr": reference_psnr, "rmse": reference_rmse, "ssim": reference_ssim}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
every_reference = pytest.mark.parametrize("metric", REFERENCE.values(), ids=REFERENCE)


@pytest.mark.parametrize("row", solid_rows(METRICS))
def test_reference_values(row, shared):
    value = METRICS[row["name"]](*pictures(row, shared))
    assert value.item() == pytest.approx(row["value"], rel=1e-9)


def shifted(*levels: int) -> list[torch.Tensor]:
    return [torch.full((1, 1, 10, 20), level / 255).double() for level in levels]


def test_known_values_of_each_convention():
    a, b, fused = shifted(100, 120, 103)
    assert rmse(a, b, fused, convention="plain").item() == pytest.approx((3 + 17) / 2)
    assert rmse(a, b, fused).item() == pytest.approx(10 / math.sqrt(200))
    decibels = [20 * math.log10(255 / d) for d in (3, 17)]
    assert psnr(a, b, fused, convention="plain").item() == pytest.approx(sum(decibels) / 2)
    expected = 20 * math.log10(255 / math.sqrt(10 / math.sqrt(200)))
    assert psnr(a, b, fused).item() == pytest.approx(expected)
    expected = 10 * math.log10(255**2 / ((9 + 289) / 2 / 255**2))
    assert psnr(a, b, fused, convention="linfengtang").item() == pytest.approx(expected)


def test_linfengtangs_psnr_has_the_peak_of_another_scale(shared):
    rows = [p.values[0] for p in solid_rows(["psnr"])]
    row = next(row for row in rows if row.fused == "vifb_kettle_DLF_f_gray.png")
    value = psnr(*pictures(row, shared), convention="linfengtang").item()
    assert value == pytest.approx(62.014922, abs=1e-6)  # reference.csv, PSNR_evaluation


@every_metric
def test_unknown_conventions_are_refused(metric):
    with pytest.raises(ValueError, match=r"convention 'plane' \(did you mean 'plain'"):
        metric(*triple(), convention="plane")


def test_equal_pictures():
    fused = triple()[2]
    assert (rmse(fused, fused, fused) == 0).all()
    for convention in ("vifb", "plain", "linfengtang"):
        assert torch.isposinf(psnr(fused, fused, fused, convention=convention)).all()
    assert (reference_rmse(fused, fused) == 0).all()
    assert torch.isposinf(reference_psnr(fused, fused)).all()
    torch.testing.assert_close(reference_ssim(fused, fused), torch.ones(3, dtype=torch.float64))


def test_a_ground_truth_is_one_source_that_is_both():
    truth, _, fused = triple()
    plain = {"convention": "plain"}
    torch.testing.assert_close(reference_rmse(fused, truth), rmse(truth, truth, fused, **plain))
    torch.testing.assert_close(reference_psnr(fused, truth), psnr(truth, truth, fused, **plain))
    torch.testing.assert_close(reference_ssim(fused, truth), ssim(truth, truth, fused))


def test_reference_values_of_a_shift():
    fused, truth = shifted(100, 110)
    assert reference_rmse(fused, truth).item() == pytest.approx(10)
    assert reference_psnr(fused, truth).item() == pytest.approx(20 * math.log10(25.5))
    # No dimension but the batch is left, and pictures one pixel wide work.
    assert reference_rmse(fused[..., :1], truth[..., :1]).shape == (1,)
    with pytest.raises(ValueError, match="11×11 pixels; got 10×20"):
        reference_ssim(fused, truth)


@every_reference
def test_bad_pictures_are_refused_against_a_truth(metric):
    fused, truth, _ = triple()
    with pytest.raises(ValueError, match="shape"):
        metric(fused, truth[..., 1:])
    truth[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\]"):
        metric(fused, truth)
