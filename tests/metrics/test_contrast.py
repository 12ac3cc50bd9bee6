"""Q_CB and Q_CV against the field's MATLAB values, and what follows from their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from fusionkit.metrics import contrast as module
from fusionkit.metrics.contrast import qcb, qcv

from .reference import pictures, related, solid_rows, triple

METRICS = {"qcb": qcb, "qcv": qcv}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


@pytest.mark.parametrize("row", solid_rows(METRICS))
def test_reference_values(row, shared):
    metric = METRICS[row["name"]]
    images = pictures(row, shared)
    assert metric(*images).item() == pytest.approx(row["value"], rel=1e-9)
    assert metric(*(x.float() for x in images)).item() == pytest.approx(row["value"], rel=1e-9)


@every_metric
def test_each_picture_is_stretched_to_its_own_range(metric):
    levels = [(x * 100).round() / 255 for x in triple()]
    brighter = [2 * x + 17 / 255 for x in levels]
    torch.testing.assert_close(metric(*brighter), metric(*levels), rtol=1e-12, atol=0)


def test_worse_pictures_are_worse():
    a, b, fused = triple()
    other = fused.flip(0)
    near = 0.9 * a + 0.1 * other
    assert (qcb(a, a, near) > qcb(a, a, other)).all()
    assert (qcv(a, a, near) < 0.5 * qcv(a, a, other)).all()
    assert ((qcb(a, b, fused) > 0) & (qcb(a, b, fused) < 1)).all()


@pytest.mark.parametrize("cycles", [4, 8, 16])
def test_qcv_of_a_grating_against_its_negative(cycles):
    """The difference is a grating of amplitude 255, which the CSF scales."""
    x = torch.arange(128, dtype=torch.float64)
    grating = (0.5 + 0.5 * torch.cos(2 * math.pi * cycles * x / 128)).expand(1, 1, 128, 128)
    r = 0.144 * cycles / 4
    sensitivity = 2.6 * (0.0192 + r) * math.exp(-(r**1.1))
    value = qcv(grating, grating, 1 - grating).item()
    assert value == pytest.approx((255 * sensitivity) ** 2 / 2, rel=0.01)


def test_qcv_weighs_blocks_by_their_saliency():
    """An error in a block beside an edge counts; the same error far from it hardly does."""
    edge = torch.zeros(1, 1, 64, 128)
    edge[..., 40:] = 1
    near, far = edge.clone(), edge.clone()
    near[..., 24:40, 34:38] = 0.5
    far[..., 24:40, 10:14] = 0.5
    assert qcv(edge, edge, near).item() > 10 * qcv(edge, edge, far).item()


def test_constant_pictures():
    a, b, fused = triple()
    flat = torch.full_like(a, 0.4)
    for images in ((flat, b, fused), (a, b, flat), (flat, flat, flat)):
        assert qcb(*images).isnan().all()
    torch.testing.assert_close(qcv(flat, b, fused), qcv(b, b, fused))
    assert qcv(a, b, flat).isfinite().all()
    assert qcv(flat, flat, fused).isnan().all()
    mixed = torch.cat([flat[:1], a[1:]])
    assert qcb(mixed, b, fused).isnan().tolist() == [True, False, False]


@every_metric
@pytest.mark.parametrize("size", [(2, 3), (7, 16), (17, 31), (1, 40)])
def test_small_and_odd_sizes(metric, size):
    generator = torch.Generator().manual_seed(1)
    a, b, fused = torch.rand(3, 2, 1, *size, generator=generator)
    values = metric(a, b, fused)
    assert values.isfinite().all()
    torch.testing.assert_close(metric(b, a, fused), values)


def test_sensitivities_are_kept_for_few_sizes():
    for size in range(20, 40):
        qcb(*triple(1, (size, size)))
    assert module._sensitivity.cache_info().currsize <= 8


@pytest.mark.parametrize("metric", [qcb, qcv])
def test_gradients_after_inference_mode(metric):
    a, b, fused = related(1, size=(40, 44))
    with torch.inference_mode():
        metric(a, b, fused)
    fused = fused.clone().requires_grad_()
    metric(a, b, fused).sum().backward()
    assert fused.grad.isfinite().all()
