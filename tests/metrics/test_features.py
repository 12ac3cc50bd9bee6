"""Contrast and detail of the fused picture: MATLAB values, known values, gradients."""

from __future__ import annotations

import pytest
import torch

from fusionkit.metrics.features import (
    average_gradient,
    edge_intensity,
    spatial_frequency,
    standard_deviation,
)

from .reference import pictures, solid_rows, triple

METRICS = {
    "standard_deviation": standard_deviation,
    "spatial_frequency": spatial_frequency,
    "average_gradient": average_gradient,
    "edge_intensity": edge_intensity,
}


@pytest.mark.parametrize("row", solid_rows(METRICS))
def test_reference_values(row, shared):
    options = {}
    if row["implementation"].startswith("linfengtang/SF_evaluation"):
        options = {"divide_by": "differences"}
    images = pictures(row, shared)
    metric = METRICS[row["name"]]
    assert metric(*images, **options).item() == pytest.approx(row["value"], rel=1e-9)
    single = metric(*(x.float() for x in images), **options)
    assert single.item() == pytest.approx(row["value"], rel=1e-6)


def of(metric, fused: torch.Tensor, **options) -> float:
    return metric(fused, fused, fused, **options).item()


def ramp(right: float, down: float = 0) -> torch.Tensor:
    """12×20 pixels that brighten by so many gray levels a pixel."""
    x, y = torch.arange(20).double(), torch.arange(12).double()
    return ((right * x + down * y[:, None]) / 255).expand(1, 1, 12, 20)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_constant_pictures(metric):
    assert of(metric, torch.full((1, 1, 12, 20), 0.3)) == 0


def test_standard_deviation_of_two_levels():
    single = torch.zeros(1, 1, 10, 10)
    single[..., 0, 0] = 1
    assert of(standard_deviation, single) == pytest.approx(255 * (0.01 * 0.99) ** 0.5)


def test_spatial_frequency_of_ramps():
    assert of(spatial_frequency, ramp(1)) == pytest.approx((19 / 20) ** 0.5)
    assert of(spatial_frequency, ramp(1, 1)) == pytest.approx((19 / 20 + 11 / 12) ** 0.5)
    assert of(spatial_frequency, ramp(1), divide_by="differences") == pytest.approx(1)
    with pytest.raises(ValueError, match=r"divide_by 'rows'.*expected one of pixels, differences"):
        of(spatial_frequency, ramp(1), divide_by="rows")


def test_average_gradient_of_ramps():
    pixels = 12 * 20 / (11 * 19)
    assert of(average_gradient, ramp(3)) == pytest.approx(3 / 2**0.5 * pixels)
    assert of(average_gradient, ramp(3, 4)) == pytest.approx(5 / 2**0.5 * pixels)
    assert of(average_gradient, ramp(3, 4), divide_by="pixels") == pytest.approx(5 / 2**0.5)


def test_edge_intensity_of_ramps():
    across = torch.full((20,), 8 * 3.0)
    across[[0, -1]] = 4 * 3.0  # the repeated border halves the difference
    assert of(edge_intensity, ramp(3)) == pytest.approx(across.mean().item())


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_pictures_one_pixel_wide(size):
    x = torch.linspace(0, 1, size[0] * size[1]).view(1, 1, *size)
    assert torch.isfinite(edge_intensity(x, x, x)).all()
    assert torch.isfinite(spatial_frequency(x, x, x)).all()
    message = f"2×2 pixels at least; got {size[0]}×{size[1]}"
    with pytest.raises(ValueError, match=f"average gradient needs {message}"):
        average_gradient(x, x, x)
    with pytest.raises(ValueError, match=f"spatial frequency by differences needs {message}"):
        spatial_frequency(x, x, x, divide_by="differences")


@pytest.mark.parametrize("metric", [standard_deviation, spatial_frequency, edge_intensity])
def test_gradients(metric):
    a, b, fused = (0.1 + 0.8 * x.double() for x in triple(2, size=(12, 13)))
    fused.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: metric(a, b, f), (fused,), fast_mode=True)


def test_edge_intensity_has_gradient_0_from_flat_pictures():
    flat = torch.full((1, 1, 9, 9), 0.5, requires_grad=True)
    edge_intensity(flat, flat, flat).sum().backward()
    assert flat.grad.abs().max() == 0
