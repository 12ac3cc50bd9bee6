"""Metrics from information theory against the field's MATLAB values and worked examples."""

from __future__ import annotations

import math

import pytest
import torch

from fusionkit.metrics.information import (
    cross_entropy,
    entropy,
    mutual_information,
    nmi,
    qncie,
    tsallis_entropy,
)

from .reference import pictures, solid_rows, triple

METRICS = {
    "entropy": entropy,
    "mutual_information": mutual_information,
    "nmi": nmi,
    "qncie": qncie,
    "cross_entropy": cross_entropy,
    "tsallis_entropy": tsallis_entropy,
}


@pytest.mark.parametrize("row", solid_rows(METRICS))
def test_reference_values(row, shared):
    options = {}
    if row["implementation"] == "vifb/metricsMutinf":
        options = {"unit": "nats"}
    elif row["name"] == "tsallis_entropy":
        options = {"convention": "mefb"}
    metric, images = METRICS[row["name"]], pictures(row, shared)
    assert metric(*images, **options).item() == pytest.approx(row["value"], rel=1e-9)
    # Float32 pictures, which is what the package has, are the same levels.
    images = [x.float() for x in images]
    assert metric(*images, **options).item() == pytest.approx(row["value"], rel=1e-9)


def levels(*values: int) -> torch.Tensor:
    """A line of pixels of these gray levels."""
    return torch.tensor(values).view(1, 1, 1, -1) / 255


def of(metric, a, b, fused, **options) -> float:
    return metric(a, b, fused, **options).item()


# a and b are independent; both share one bit of fused's 1.5 with it.
A, B, FUSED = levels(0, 0, 9, 9), levels(0, 5, 0, 5), levels(0, 0, 7, 8)


@pytest.mark.parametrize("bits", [0, 1, 2, 4, 8])
def test_entropy_of_even_levels(bits):
    even = (torch.arange(256) % 2**bits / 255).view(1, 1, 16, 16)
    assert of(entropy, even, even, even) == pytest.approx(bits, abs=1e-12)


def test_entropy_of_uneven_levels():
    quarter = levels(0, 0, 0, 255)
    assert of(entropy, quarter, quarter, quarter) == pytest.approx(2 - 0.75 * math.log2(3))


def test_mutual_information_of_a_worked_example():
    assert of(mutual_information, A, A, FUSED) == pytest.approx(2)
    assert of(mutual_information, A, B, FUSED) == pytest.approx(1.5)
    assert of(mutual_information, A, B, A) == pytest.approx(1)
    assert of(mutual_information, A, B, FUSED, unit="nats") == pytest.approx(1.5 * math.log(2))
    assert of(mutual_information, A, B, FUSED, reduction="mean") == pytest.approx(0.75)


def test_nmi_of_a_worked_example():
    assert of(nmi, A, A, FUSED) == pytest.approx(4 / 2.5)
    assert of(nmi, A, B, FUSED) == pytest.approx(2 * (1 / 2.5 + 0.5 / 2.5))
    assert of(nmi, FUSED, FUSED, FUSED) == pytest.approx(2)


def test_qncie_of_worked_examples():
    nothing_shared = 1 - math.log(3, 256)
    flat = levels(3, 3, 3, 3)
    assert of(qncie, flat, flat, flat) == pytest.approx(nothing_shared)
    # Only a and fused share, 1 of 8 bits: eigenvalues 1, 1 ± 1/8.
    shares = [1 / 3, 9 / 24, 7 / 24]
    assert of(qncie, A, B, A) == pytest.approx(1 + sum(s * math.log(s, 256) for s in shares))
    all_levels = levels(*range(256))
    assert of(qncie, all_levels, all_levels, all_levels) == pytest.approx(1)


def test_cross_entropy_of_worked_examples():
    assert of(cross_entropy, A, A, A) == 0
    # Halves at 0 and 9 against halves at 0 and quarters elsewhere; then against 3/4 and 1/4.
    assert of(cross_entropy, A, A, FUSED) == 0
    uneven = levels(0, 0, 0, 9)
    expected = 0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25)
    assert of(cross_entropy, A, A, uneven) == pytest.approx(expected)
    assert of(cross_entropy, A, uneven, uneven) == pytest.approx(expected / 2)
    assert of(cross_entropy, levels(1, 1), levels(2, 2), levels(3, 3)) == 0


def test_tsallis_entropy_of_worked_examples():
    # Two pairs of share 1/2, each with a product of marginals of 1/4.
    one = (2 * 0.5**1.85 / 0.25**0.85 - 1) / 0.85
    assert of(tsallis_entropy, A, A, A) == pytest.approx(2 * one)
    assert of(tsallis_entropy, A, B, A) == pytest.approx(one)
    assert of(tsallis_entropy, A, B, A, convention="mefb") == pytest.approx(one)
    # Shares 3/4 and 1/4 at 0 and 255 against the reverse: the marginals' order matters.
    a, f = levels(0, 0, 0, 255), levels(255, 255, 255, 0)
    plain = (0.75**1.85 / (0.75**2) ** 0.85 + 0.25**1.85 / (0.25**2) ** 0.85 - 1) / 0.85
    swapped = (0.75**1.85 / (0.25**2) ** 0.85 + 0.25**1.85 / (0.75**2) ** 0.85 - 1) / 0.85
    assert of(tsallis_entropy, a, a, f) == pytest.approx(2 * plain)
    assert of(tsallis_entropy, a, a, f, convention="mefb") == pytest.approx(2 * swapped)


def test_constant_pictures():
    flat, other = torch.full((1, 1, 4, 4), 0.2), triple(1, (4, 4))[0]
    assert of(entropy, flat, flat, flat) == 0
    assert of(mutual_information, flat, other, flat) == 0
    assert of(mutual_information, flat, flat, other) == pytest.approx(0, abs=1e-12)
    assert math.isnan(of(nmi, other, flat, flat))
    assert of(nmi, flat, flat, other) == pytest.approx(0, abs=1e-12)
    assert of(cross_entropy, flat, flat, flat) == 0
    assert of(tsallis_entropy, flat, flat, other) == pytest.approx(0, abs=1e-12)
    assert math.isnan(of(tsallis_entropy, other, flat, other, convention="mefb"))


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"unit 'nat'.*expected one of bits, nats"):
        mutual_information(A, B, FUSED, unit="nat")
    with pytest.raises(ValueError, match=r"reduction 'max'; expected one of sum, mean"):
        mutual_information(A, B, FUSED, reduction="max")
    with pytest.raises(ValueError, match=r"convention 'vifb'.*expected one of paper, mefb"):
        tsallis_entropy(A, B, FUSED, convention="vifb")
