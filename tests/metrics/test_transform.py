"""Q_P and Q_M: MATLAB values, known values, and what follows from the definitions."""

from __future__ import annotations

import math

import pytest
import torch

from fusionkit.metrics._phase_congruency import phase_congruency
from fusionkit.metrics.transform import qm, qp

from .reference import pictures, solid_rows, triple

METRICS = {"qm": qm, "qp": qp}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


@pytest.mark.parametrize("row", solid_rows(["qm"]))
def test_reference_values_of_qm(row, shared):
    images = pictures(row, shared)
    assert qm(*images).item() == pytest.approx(row["value"], rel=1e-9)
    assert qm(*(x.float() for x in images)).item() == pytest.approx(row["value"], rel=1e-5)


@pytest.mark.parametrize("row", solid_rows(["qp"]))
def test_reference_values_of_qp(row, shared):
    images = pictures(row, shared)
    even = not any(size % 2 for size in images[0].shape[-2:])
    tolerance = 1.5e-4 if even else 5e-4
    assert qp(*images).item() == pytest.approx(row["value"], rel=tolerance)


@every_metric
def test_worse_pictures_have_smaller_values(metric):
    a, _, fused = triple()
    blurred = torch.nn.functional.avg_pool2d(a, 5, 1, 2, count_include_pad=False)
    perfect, worse, unrelated = metric(a, a, a), metric(a, a, blurred), metric(a, a, fused)
    assert (perfect > worse).all()
    assert (perfect > unrelated).all()


def test_constant_pictures():
    gray, x = torch.full((3, 1, 40, 52), 0.4), triple()[2]
    assert qp(gray, gray, gray).isnan().all()
    assert torch.isfinite(qp(gray, x, x)).all()
    # The constant in the correlation makes it 1 where the fused picture has no variance.
    torch.testing.assert_close(qp(x, x, gray), torch.ones(3, dtype=torch.float64))
    assert qm(gray, gray, x).isnan().all()
    torch.testing.assert_close(qm(gray, x, x), qm(x, x, x), rtol=1e-5, atol=0)


def test_qm_by_hand():
    # Columns 0, 2, 0, 2, ...: the fine level has one band, 2 everywhere; the coarse one has pairs.
    rows = torch.tensor([0, 2, 8, 10]).repeat(2).double() / 255
    source = rows.expand(1, 1, 8, 8)
    flat = torch.full_like(source, 5 / 255)
    fine = (math.exp(-2) + 2) * 1.0  # difference 2 in one band, none in the others
    coarse = math.exp(-16) + 2  # approximations 2 and 18: difference 16 · 2 / 2
    value = qm(source, source, flat).item()
    assert value == pytest.approx(fine ** (2 / 3) * coarse ** (1 / 3), rel=1e-9)


@pytest.mark.parametrize("size", [(8, 8), (9, 10), (11, 11)])
def test_qm_crops_odd_sizes(size):
    a, b, fused = triple(size=size)
    even = [x[..., : size[0] // 4 * 4 + 2, : size[1] // 4 * 4 + 2] for x in (a, b, fused)]
    torch.testing.assert_close(qm(a, b, fused), qm(*even))


# Phase congruency


def step(contrast: float, size: int = 64) -> torch.Tensor:
    x = torch.zeros(1, size, size, dtype=torch.float64)
    x[..., size // 4 : 3 * size // 4] = contrast
    return x


def test_phase_congruency_finds_edges_whatever_their_contrast():
    weak, strong = phase_congruency(step(2.0)), phase_congruency(step(200.0))
    torch.testing.assert_close(weak.congruency, strong.congruency, rtol=0, atol=5e-4)
    row = strong.maximum_moment[0, 32]
    assert row[15:17].min() > 0.5
    assert row[24:40].max() < 0.1


def test_phase_congruency_of_transposed_and_mirrored_pictures():
    # Six orientations every 30 degrees: mirrored ones and those at right angles are among them.
    x = triple(2, (31, 41))[0][:, 0].double()  # odd sizes have no frequency without a twin
    maps = phase_congruency(x)
    assert maps.congruency.min() >= 0
    assert maps.congruency.max() < 1
    for turn in (lambda z: z.mT, lambda z: z.flip(-1), lambda z: z.flip(-2)):
        for turned, expected in zip(phase_congruency(turn(x)), maps, strict=True):
            torch.testing.assert_close(turned, turn(expected), rtol=1e-6, atol=1e-7)


# Refusals


@pytest.mark.parametrize(
    ("metric", "size", "message"),
    [
        (qm, (3, 9), "Q_M needs 4×4 pixels at least; got 3×9"),
        (qm, (1, 1), "Q_M needs 4×4 pixels at least; got 1×1"),
        (qp, (10, 20), "Q_P's window is 11 wide; got 10×20 pixels"),
        (qp, (20, 1), "Q_P's window is 11 wide; got 20×1 pixels"),
    ],
)
def test_small_pictures_are_refused(metric, size, message):
    x = torch.zeros(1, 1, *size)
    with pytest.raises(ValueError, match=message):
        metric(x, x, x)
