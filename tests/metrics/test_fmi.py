"""Feature mutual information against the field's MATLAB values, and on pictures worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fusionkit.metrics import _fmi_features as features
from fusionkit.metrics.fmi import fmi_dct, fmi_edge, fmi_gradient, fmi_pixel, fmi_wavelet

from .reference import pictures, solid_rows, triple

METRICS = {
    "fmi_pixel": fmi_pixel,
    "fmi_gradient": fmi_gradient,
    "fmi_edge": fmi_edge,
    "fmi_dct": fmi_dct,
    "fmi_wavelet": fmi_wavelet,
}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


@pytest.mark.parametrize("row", solid_rows(METRICS))
def test_reference_values(row, shared):
    # The whole of the difference is in windows that are flat but for one pixel, and in slopes of
    # exactly 45°, which the reference decides by its rounding.
    value = METRICS[row["name"]](*pictures(row, shared))
    assert value.item() == pytest.approx(row["value"], rel=1e-6 if "dct" in row["name"] else 1e-3)


@every_metric
def test_constant_pictures(metric):
    dark, light = torch.full((1, 1, 7, 9), 0.2), torch.full((1, 1, 7, 9), 0.6)
    other = triple(1, (7, 9))[0]
    # The DCT of a constant has one window, of 5 by 7, that is not flat.
    expected = (34 / 35 + 1) / 2 if metric is fmi_dct else 1
    assert metric(dark, light, light).item() == pytest.approx(expected, rel=1e-5)
    values = metric(other, dark, dark)
    assert torch.isfinite(values)
    assert 0.5 <= values.item() <= (1 if metric is fmi_edge else 0.99)


def window(*values: float) -> torch.Tensor:
    """One 3×3 picture from its columns."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 3, 3).mT / 255


def test_a_window_of_perfect_dependence():
    x = window(0, 1, 2, 0, 5, 3, 1, 0, 4)
    assert fmi_pixel(x, x, 0.1 + 3 * x).item() == pytest.approx(1)


def test_a_window_of_half_dependence():
    # Two places of 1/2 each. Perfect dependence puts all on the diagonal: covariance over
    # variance 1, so the share of dependence is the correlation of the values.
    x, y = window(0, 9, 0, 0, 0, 0, 9, 0, 0), window(0, 9, 0, 0, 0, 0, 0, 0, 9)
    share = (1 / 9 - 4 / 81) / (2 / 9 - 4 / 81)
    joint = [(1 + share) / 4, (1 - share) / 4, (1 - share) / 4, (1 + share) / 4]
    information = 2 + sum(p * math.log2(p) for p in joint)
    assert fmi_pixel(x, x, y).item() == pytest.approx(information, rel=1e-5)


def test_a_window_of_negative_dependence():
    # No place in common: correlation -(4/81) / (2/9 - 4/81), dependence on the reversed places.
    x, y = window(0, 9, 0, 0, 0, 0, 9, 0, 0), window(0, 0, 9, 0, 0, 0, 0, 0, 9)
    share = (4 / 81) / (2 / 9 - 4 / 81)
    joint = [(1 + share) / 4, (1 - share) / 4, (1 - share) / 4, (1 + share) / 4]
    information = 2 + sum(p * math.log2(p) for p in joint)
    assert fmi_pixel(x, x, y).item() == pytest.approx(information, rel=1e-5)


def test_edges_are_thin():
    step = torch.zeros(1, 8, 10, dtype=torch.float64)
    step[..., 5:] = 90
    step[..., 6:] = 100
    edges = features.edges(step)
    assert (edges[0].sum(1) == 1).all()
    assert edges[..., 5].all()
    assert not features.edges(step[..., :4]).any()


def test_dct_of_a_cosine_and_its_energy():
    x = torch.cos(math.pi / 16 * 3 * (torch.arange(16, dtype=torch.float64) + 0.5))
    coefficients = features.dct(x.expand(1, 12, 16))
    assert coefficients[0, 0, 3].item() == pytest.approx(math.sqrt(12 * 8))
    coefficients[0, 0, 3] = 0
    assert not coefficients.any()


def test_meyer_taps_are_an_orthogonal_filter():
    taps = features._meyer_taps(50)
    assert taps.sum().item() == pytest.approx(math.sqrt(2), abs=1e-5)
    shifted = [(taps[2 * k :] * taps[: len(taps) - 2 * k]).sum().item() for k in range(4)]
    assert shifted == pytest.approx([1, 0, 0, 0], abs=1e-8)
    high = features._meyer_matrix(64)[82:]
    assert high.sum(1).abs().max() < 1e-5  # details of a constant


@pytest.mark.parametrize("size", [(3, 3), (3, 40), (41, 5)])
@every_metric
def test_small_pictures(metric, size):
    assert torch.isfinite(metric(*triple(2, size))).all()
    with pytest.raises(ValueError, match="window is 3 wide; got 9×1 pixels"):
        metric(*triple(1, (9, 1)))
