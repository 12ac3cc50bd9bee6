"""The Triton twin of SSIM against both sources, held against the reference."""

from __future__ import annotations

import pytest
import torch

from fusionkit.kernels.ssim import ssim, ssim_of_both, ssim_of_both_twin, ssim_reference
from tests.kernels.cases import (
    check,
    check_second_gradients,
    gradients,
    not_contiguous,
    pictures,
)


def pair(border: str = "valid", window: int = 11):
    def twin(a, b, fused):
        return ssim_of_both_twin(a, b, fused, border, window)

    def reference(a, b, fused):
        return ssim_reference(fused, a, b, border=border, window=window)

    return twin, reference


@pytest.mark.parametrize(
    ("shape", "border", "window"),
    [
        ((1, 1, 12, 15), "valid", 11),
        ((1, 2, 8, 8), "zeros", 11),
        ((2, 1, 8, 8), "valid", 5),
        ((1, 1, 5, 69), "zeros", 3),
        ((1, 1, 7, 7), "valid", 7),
    ],
)
def test_twin_is_the_reference(shape, border, window, device):
    check(*pair(border, window), pictures(shape, device), tolerance=5e-5)


def test_not_contiguous(device):
    inputs = not_contiguous((1, 2, 7, 9), device)
    assert not inputs[0].is_contiguous()
    check(*pair(window=5), inputs, tolerance=5e-5)
    check_second_gradients(*pair(window=5), inputs, tolerance=5e-5)


def test_bf16_is_computed_in_float32(device):
    # The results are rounded to bf16, by the interpreter towards zero: 2^-7.
    inputs = pictures((1, 1, 8, 9), device, dtype=torch.bfloat16)
    check(*pair("zeros", 5), inputs, tolerance=8e-3)


def test_gradient_of_the_fused_picture_alone(device):
    a, b, fused = pictures((1, 1, 8, 8), device)
    twin, reference = pair("zeros", 5)
    *_, expected = gradients(reference, [a, b, fused])
    (found,) = gradients(lambda f: twin(a.detach(), b.detach(), f), [fused])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("border", ["valid", "zeros"])
def test_both_is_ssim_with_each(border):
    a, b, fused = (x.double() for x in pictures((2, 1, 13, 12), "cpu"))
    found = ssim_of_both(a, b, fused, border)
    torch.testing.assert_close(found, (ssim(fused, a, border), ssim(fused, b, border)))
    assert (found[0] - found[1]).abs() > 1e-3


def test_reference_has_second_gradients():
    inputs = [x.detach().double().requires_grad_() for x in pictures((1, 1, 4, 4), "cpu")]
    torch.manual_seed(0)
    given = lambda a, b, f: ssim_of_both(a, b, f, window=3)  # noqa: E731
    assert torch.autograd.gradcheck(given, inputs)
    assert torch.autograd.gradgradcheck(given, inputs)


def test_windows_that_cannot_be():
    a, b, fused = pictures((1, 1, 8, 9), "cpu")
    with pytest.raises(ValueError, match="window is 4 wide; expected an odd"):
        ssim_of_both(a, b, fused, window=4)
    with pytest.raises(ValueError, match="window is 11 wide; got 8×9 pixels"):
        ssim_of_both(a, b, fused)
