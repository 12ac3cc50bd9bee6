"""The maximum terms' Triton twin against the reference, and against numbers by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fusionkit.kernels.maximum_loss import maximum_terms_reference, maximum_terms_twin
from tests.kernels.cases import (
    check,
    check_second_gradients,
    gradients,
    not_contiguous,
    pictures,
)

BORDERS = ["replicate", "zeros"]


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("shape", [(2, 1, 9, 13), (1, 1, 8, 8), (1, 1, 3, 66), (1, 1, 1, 2)])
def test_twin_is_the_reference(shape, border, device):
    twin, reference = (
        partial(f, border=border) for f in (maximum_terms_twin, maximum_terms_reference)
    )
    check(twin, reference, pictures(shape, device))


@pytest.mark.parametrize("border", BORDERS)
def test_not_contiguous(border, device):
    twin, reference = (
        partial(f, border=border) for f in (maximum_terms_twin, maximum_terms_reference)
    )
    inputs = not_contiguous((2, 1, 6, 9), device)
    assert not inputs[0].is_contiguous()
    check(twin, reference, inputs)
    check_second_gradients(twin, reference, inputs)


def test_bf16_is_computed_in_float32(device):
    # The results are rounded to bf16, by the interpreter towards zero: 2^-7.
    inputs = pictures((1, 1, 9, 13), device, dtype=torch.bfloat16)
    check(maximum_terms_twin, maximum_terms_reference, inputs, tolerance=8e-3)


def test_equal_sources_share_the_gradient(device):
    a, _, fused = pictures((1, 1, 8, 8), device)
    b = a.detach().clone().requires_grad_()
    by_a, by_b, _ = gradients(maximum_terms_twin, [a, b, fused])
    assert by_a.abs().max() > 0
    torch.testing.assert_close(by_a, by_b, rtol=0, atol=0)
    check(maximum_terms_twin, maximum_terms_reference, [a, b, fused])


def test_flat_pictures_have_no_edges(device):
    a, b, fused = (torch.full((1, 1, 8, 8), x, device=device) for x in (0.3, 0.6, 0.7))
    fused.requires_grad_()
    intensity, gradient = maximum_terms_twin(a, b, fused)
    assert intensity.item() == pytest.approx(0.1)
    assert gradient.item() == 0
    (slope,) = torch.autograd.grad(intensity + gradient, fused)
    torch.testing.assert_close(slope, torch.full_like(slope, 1 / 64))


def test_only_what_needs_a_gradient_has_one(device):
    a, b, fused = pictures((1, 1, 8, 8), device)
    *_, expected = gradients(maximum_terms_reference, [a, b, fused])
    given = partial(maximum_terms_twin, a.detach(), b.detach())
    torch.testing.assert_close(gradients(given, [fused])[0], expected)


def test_nan_is_not_hidden(device):
    a, b, fused = (x.detach() for x in pictures((1, 1, 8, 8), device))
    for picture in (a, b, fused):
        spoilt = [x.clone() if x is picture else x for x in (a, b, fused)]
        for x in spoilt:
            if not any(x is y for y in (a, b, fused)):
                x[..., 3, 3] = torch.nan
        assert all(term.isnan() for term in maximum_terms_twin(*spoilt))


def test_second_gradients_where_one_picture_comes_from_another(device):
    twin, reference = (
        lambda a, b, f=f: f(a, b, a * b.sqrt())
        for f in (maximum_terms_twin, maximum_terms_reference)
    )
    check_second_gradients(twin, reference, pictures((1, 1, 5, 6), device, count=2))
