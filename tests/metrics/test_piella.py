"""Piella's, Cvejic's and Yang's indices against MATLAB values, windows by hand, known values."""

from __future__ import annotations

import pytest
import torch

from fusionkit.metrics.piella import qc, qe, qs, qw, qy

from .reference import pictures, solid_rows, triple

METRICS = {"qs": qs, "qw": qw, "qe": qe, "qc": qc, "qy": qy}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
LEAST = {qs: 11, qw: 11, qe: 11, qc: 7, qy: 7}
# Pictures with flat regions, in which the MATLAB values are partly rounding noise over rounding
# noise: how far they may be, by metric. Everywhere else they agree to rounding.
WITH_FLAT_REGIONS = ("vifb_carWhite", "vifb_kettle", "mefb_Chair", "mfifb_aymaz")
NOISE = {"qs": 2e-5, "qw": 2e-8, "qe": 5e-8, "qy": 5e-4}


@pytest.mark.parametrize("row", solid_rows(["qs", "qw", "qe", "qy"]))
def test_reference_values(row, shared):
    metric = METRICS[row["name"]]
    options = {"convention": "mefb"} if row.implementation.startswith("mefb/metricsQw") else {}
    noisy = row.fused.startswith(WITH_FLAT_REGIONS)
    tolerance = NOISE[row["name"]] if noisy else 1e-9
    images = pictures(row, shared)
    assert metric(*images, **options).item() == pytest.approx(row["value"], rel=tolerance)
    value = metric(*(x.float() for x in images), **options).item()
    assert value == pytest.approx(row["value"], rel=max(tolerance, 1e-6))


def flat_share(*images: torch.Tensor) -> float:
    """Share of the 7×7 windows which are flat in one of the pictures."""
    flat = [x.unfold(-2, 7, 1).unfold(-2, 7, 1).flatten(-2) for x in images]
    return torch.stack([x.amax(-1) == x.amin(-1) for x in flat]).any(0).double().mean().item()


@pytest.mark.parametrize("row", solid_rows(["qc"]))
def test_reference_values_of_cvejics_index(row, shared):
    images = pictures(row, shared)
    share = flat_share(*images)
    difference = qc(*images).item() - row["value"]
    if row.fused.startswith(("vifb_fight", "vifb_kettle")):
        assert share > 0.01
        assert not 0 < row["value"] < 1  # noise that no definition gives
    else:
        assert abs(difference) <= 1e-9 + min(share, 0.005)


def window_moments(size: int) -> dict:
    """Moments of one whole window of random pictures, under MATLAB's Gaussian."""
    a, b, f = (255 * x.double()[0, 0] for x in triple(1, size=(size, size)))
    distance = torch.arange(size, dtype=torch.float64) - size // 2
    taps = (-distance.square() / (2 * 1.5**2)).exp()
    window = taps[:, None] * taps / taps.sum() ** 2
    pictures = {"a": a, "b": b, "f": f}
    mean = {k: (window * x).sum() for k, x in pictures.items()}
    moment = {
        x + y: (window * (pictures[x] - mean[x]) * (pictures[y] - mean[y])).sum()
        for x in "abf"
        for y in "abf"
    }
    return {**moment, **mean}


def similarity(m: dict, x: str, y: str, c1: float = 0, c2: float = 0):
    luminance = (2 * m[x] * m[y] + c1) / (m[x] ** 2 + m[y] ** 2 + c1)
    return luminance * (2 * m[x + y] + c2) / (m[x + x] + m[y + y] + c2)


def test_one_window_by_the_definitions():
    m = window_moments(11)
    constants = (2.55**2, 7.65**2)
    share = m["aa"] / (m["aa"] + m["bb"])
    expected = share * similarity(m, "a", "f", *constants)
    expected += (1 - share) * similarity(m, "b", "f", *constants)
    images = triple(1, size=(11, 11))
    assert qs(*images).item() == pytest.approx(expected.item(), rel=1e-6)
    assert qw(*images).item() == pytest.approx(expected.item(), rel=1e-6)

    m = window_moments(7)
    images = triple(1, size=(7, 7))
    with_a, with_b = similarity(m, "a", "f"), similarity(m, "b", "f")
    share = m["af"] / (m["af"] + m["bf"])
    limited = share.clamp(0, 1)
    expected = limited * with_a + (1 - limited) * with_b
    value = qc(*images, convention="cvejic").item()
    assert value == pytest.approx(expected.item(), rel=1e-6)
    expected = expected if share == limited else limited
    assert qc(*images).item() == pytest.approx(expected.item(), rel=1e-6)
    share = m["aa"] / (m["aa"] + m["bb"])
    alike = similarity(m, "a", "b") >= 0.75
    expected = share * with_a + (1 - share) * with_b if alike else max(with_a, with_b)
    assert qy(*images).item() == pytest.approx(float(expected), rel=1e-6)


def test_yangs_index_of_alike_and_of_different_sources():
    a, b, _ = triple(1, size=(7, 7))
    assert qy(a, b, a).item() == pytest.approx(1)  # different: the larger one
    b = 0.9 * a + 0.1 * b  # alike: between the two
    assert 0.75 < qy(b, b, a).item() < qy(a, b, a).item() < 1


def test_conventions_of_qc():
    a, b, _ = triple(1)
    # Where one source is the negative of the fused picture, all shares are outside 0 to 1.
    less = 0.5 - 0.3 * a
    assert qc(a, less, a).item() == pytest.approx(1)
    assert qc(less, a, a).item() == 0
    assert qc(less, a, a, convention="cvejic").item() == pytest.approx(1)
    a, b, fused = triple()
    values = [qc(*x, fused, convention="cvejic") for x in ((a, b), (b, a))]
    torch.testing.assert_close(*values)
    with pytest.raises(ValueError, match=r"convention 'liu'.*expected one of mefb, cvejic"):
        qc(a, b, a, convention="liu")


def test_conventions_of_qe():
    a, b, fused = triple()
    edges = qe(a, b, fused, convention="mefb")
    torch.testing.assert_close(qe(a, b, fused), edges**2)
    expected = edges * qw(a, b, fused)
    torch.testing.assert_close(qe(a, b, fused, convention="piella"), expected)
    with pytest.raises(ValueError, match=r"convention 'paper'.*expected one of liu, mefb, piella"):
        qe(a, b, fused, convention="paper")


@every_metric
def test_a_worse_picture_has_a_smaller_value(metric):
    a, b, _ = triple()
    noise = torch.rand(a.shape, generator=torch.Generator().manual_seed(1))
    mean = (a + b) / 2
    assert (metric(a, b, (mean + noise) / 2) < metric(a, b, mean)).all()


@pytest.mark.parametrize("metric", [qs, qc])
def test_constant_pictures_compare_their_means(metric):
    a, b, fused = (torch.full((1, 1, 12, 13), x) for x in (0.2, 0.6, 0.4))
    ratios = [2 * x * 0.4 / (x * x + 0.16) for x in (0.2, 0.6)]
    assert metric(a, b, fused).item() == pytest.approx(sum(ratios) / 2, rel=1e-3)
    black = torch.zeros(1, 1, 12, 13)
    assert metric(black, black, black).item() == 1


@pytest.mark.parametrize("metric", [qw, qe, qy])
def test_constant_pictures_without_a_value(metric):
    black = torch.zeros(1, 1, 12, 13)
    assert metric(black, black, black).isnan().all()


def test_yangs_index_leaves_out_what_is_flat_in_all():
    a, b, fused = triple(1)
    wide = [torch.nn.functional.pad(x, (0, 60), value=0.5) for x in (a, b, fused)]
    narrow = [torch.nn.functional.pad(x, (0, 6), value=0.5) for x in (a, b, fused)]
    torch.testing.assert_close(qy(*wide), qy(*narrow))


@every_metric
def test_one_flat_source_is_finite(metric):
    a, _, fused = triple()
    assert torch.isfinite(metric(a, torch.full_like(a, 0.5), fused)).all()
    assert torch.isfinite(metric(a, torch.zeros_like(a), fused)).all()


@every_metric
def test_small_pictures_are_refused(metric):
    least = LEAST[metric]
    enough = torch.rand(1, 1, least, least)
    assert torch.isfinite(metric(enough, enough, enough)).all()
    small = torch.rand(1, 1, least - 1, least)
    with pytest.raises(ValueError, match=f"{least}×{least} pixels; got {least - 1}×{least}"):
        metric(small, small, small)
