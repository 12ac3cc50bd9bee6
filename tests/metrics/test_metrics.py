"""Metrics against the field's MATLAB values, on pictures of known value, and their refusals."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fusionkit.metrics.features import average_gradient, spatial_frequency, standard_deviation
from fusionkit.metrics.information import entropy
from fusionkit.metrics.structure import scd, ssim

METRICS = {
    "entropy": entropy,
    "standard_deviation": standard_deviation,
    "spatial_frequency": spatial_frequency,
    "average_gradient": average_gradient,
    "scd": scd,
    "ssim": ssim,
}
every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


def solid_rows() -> list:
    table = Path(os.environ.get("FUSIONKIT_SHARED", "")) / "metrics" / "reference.csv"
    if not table.is_file():
        skip = pytest.mark.skip("set FUSIONKIT_SHARED to the folder of reference data")
        return [pytest.param(None, marks=skip)]
    rows = pd.read_csv(table)
    rows = rows[(rows.solid == "yes") & rows.name.isin(METRICS)]
    return [
        pytest.param(row, id=f"{row['name']}-{row.fused}-{row.implementation.split()[0]}")
        for _, row in rows.iterrows()
    ]


@cache
def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path)) / 255)[None, None]


@pytest.mark.parametrize("row", solid_rows())
def test_reference_values(row, shared):
    folder = shared / "metrics" / "pictures"
    pictures = [read(folder / row[key]) for key in ("image_a", "image_b", "fused")]
    options = {}
    if row["name"] == "ssim":
        options = {"reduction": "sum"}
    elif row["implementation"].startswith("linfengtang/SF_evaluation"):
        options = {"divide_by": "differences"}
    value = METRICS[row["name"]](*pictures, **options)
    assert value.shape == (1,)
    assert value.item() == pytest.approx(row["value"], rel=1e-9)
    # Float32 pictures, which is what the package has, are as good.
    value = METRICS[row["name"]](*(p.float() for p in pictures), **options)
    assert value.item() == pytest.approx(row["value"], rel=1e-5)


def test_every_metric_has_reference_rows(shared):
    names = {p.values[0]["name"] for p in solid_rows()}
    assert names == set(METRICS)


def triple(batch: int = 3, size=(17, 23)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (3, batch, 1, *size), generator=generator)
    return list(levels / 255)


@every_metric
def test_a_batch_is_a_loop(metric):
    a, b, fused = triple()
    one_by_one = [metric(a[i : i + 1], b[i : i + 1], fused[i : i + 1]) for i in range(3)]
    values = metric(a, b, fused)
    assert values.shape == (3,)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, torch.cat(one_by_one))
    assert len(set(values.tolist())) == 3


@every_metric
def test_sources_swap(metric):
    a, b, fused = triple()
    torch.testing.assert_close(metric(a, b, fused), metric(b, a, fused))


@every_metric
def test_transposed_pictures_have_the_same_value(metric):
    a, b, fused = triple()
    torch.testing.assert_close(metric(a.mT, b.mT, fused.mT), metric(a, b, fused))


# Known values


def of(metric, fused: torch.Tensor) -> float:
    return metric(fused, fused, fused).item()


def stripes(levels: int, size: int = 16) -> torch.Tensor:
    """Columns that go through `levels` evenly spaced gray levels."""
    columns = torch.arange(size) % levels * (255 // max(levels - 1, 1)) / 255
    return columns.expand(1, 1, size, size)


@pytest.mark.parametrize(("levels", "bits"), [(1, 0), (2, 1), (4, 2), (16, 4)])
def test_entropy_of_even_levels(levels, bits):
    assert of(entropy, stripes(levels)) == pytest.approx(bits, abs=1e-12)


def test_entropy_of_all_levels_and_of_uneven_ones():
    all_levels = (torch.arange(256) / 255).view(1, 1, 16, 16)
    assert of(entropy, all_levels) == pytest.approx(8)
    quarter = torch.zeros(1, 1, 16, 16)
    quarter[..., :8, :8] = 1
    assert of(entropy, quarter) == pytest.approx(2 - 0.75 * np.log2(3))


def test_standard_deviation_of_two_levels():
    assert of(standard_deviation, stripes(2)) == pytest.approx(127.5)
    assert of(standard_deviation, stripes(1)) == 0
    single = torch.zeros(1, 1, 10, 10)
    single[..., 0, 0] = 1
    assert of(standard_deviation, single) == pytest.approx(255 * (0.01 * 0.99) ** 0.5)


def test_spatial_frequency_of_stripes_and_ramps():
    assert of(spatial_frequency, stripes(2)) == pytest.approx(255 * (15 / 16) ** 0.5)
    assert of(spatial_frequency, stripes(1)) == 0
    ramp = (torch.arange(20) / 255).expand(1, 1, 12, 20).double()
    assert of(spatial_frequency, ramp) == pytest.approx((19 / 20) ** 0.5, rel=1e-5)
    both = ramp + (torch.arange(12) / 255)[:, None]
    assert of(spatial_frequency, both) == pytest.approx((19 / 20 + 11 / 12) ** 0.5, rel=1e-5)


def test_average_gradient_of_ramps():
    ramp = (3 * torch.arange(20) / 255).expand(1, 1, 12, 20)
    pixels = 12 * 20 / (11 * 19)
    assert of(average_gradient, ramp) == pytest.approx(3 / 2**0.5 * pixels, rel=1e-5)
    both = ramp + (4 * torch.arange(12) / 255)[:, None]
    expected = ((3**2 + 4**2) / 2) ** 0.5 * pixels
    assert of(average_gradient, both) == pytest.approx(expected, rel=1e-5)
    assert of(average_gradient, stripes(1)) == 0


def test_scd_of_a_sum_and_of_its_negative():
    a, b, _ = (x.double() * 0.4 for x in triple())
    torch.testing.assert_close(scd(a, b, a + b), torch.full((3,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(scd(a, a, 1 - a), torch.full((3,), -2.0, dtype=torch.float64))
    assert of(scd, stripes(1)) != of(scd, stripes(1))  # NaN: nothing varies


def test_ssim_of_equal_pictures():
    fused = triple()[2]
    torch.testing.assert_close(ssim(fused, fused, fused), torch.ones(3, dtype=torch.float64))
    both = ssim(fused, fused, fused, reduction="sum")
    torch.testing.assert_close(both, torch.full((3,), 2.0, dtype=torch.float64))


def test_ssim_is_a_mean_over_the_sources():
    a, b, fused = triple()
    torch.testing.assert_close(ssim(a, b, fused) * 2, ssim(a, b, fused, reduction="sum"))
    torch.testing.assert_close(
        ssim(a, b, fused, reduction="sum"), ssim(a, a, fused) + ssim(b, b, fused)
    )
    assert (ssim(a, b, fused) < 0.5).all()


def test_ssim_of_flat_pictures_compares_their_means():
    dark, light = torch.full((1, 1, 12, 12), 0.2), torch.full((1, 1, 12, 12), 0.6)
    expected = (2 * 51 * 153 + 2.55**2) / (51**2 + 153**2 + 2.55**2)
    assert ssim(dark, dark, light).item() == pytest.approx(expected, rel=1e-6)


def test_ssim_refusals():
    small = torch.rand(1, 1, 10, 20)
    with pytest.raises(ValueError, match="window is 11 wide; got 10×20 pixels"):
        ssim(small, small, small)
    with pytest.raises(ValueError, match="reduction 'max'; expected one of mean, sum"):
        ssim(*triple(), reduction="max")


def test_spatial_frequency_by_the_number_of_differences():
    ramp = (torch.arange(20) / 255).expand(1, 1, 12, 20).double()
    value = spatial_frequency(ramp, ramp, ramp, divide_by="differences")
    assert value.item() == pytest.approx(1, rel=1e-5)
    with pytest.raises(ValueError, match=r"divide_by 'rows'.*expected one of pixels, differences"):
        spatial_frequency(ramp, ramp, ramp, divide_by="rows")


# Refusals


@every_metric
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.01, 1.5, 255.0])
def test_values_outside_the_range_are_refused(metric, place, bad):
    pictures = triple()
    pictures[place][1, 0, 3, 4] = bad
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\]"):
        metric(*pictures)


@every_metric
@pytest.mark.parametrize("place", [0, 1, 2])
def test_other_shapes_are_refused(metric, place):
    pictures = triple()
    pictures[place] = pictures[place][..., :-1]
    with pytest.raises(ValueError, match=r"one shape.*\(3, 1, 17, 2"):
        metric(*pictures)
    pictures = triple()
    pictures[place] = pictures[place].expand(3, 3, 17, 23)
    with pytest.raises(ValueError, match=r"gray pictures.*\(3, 3, 17, 23\)"):
        metric(*pictures)
    pictures[place] = triple()[place][0]
    with pytest.raises(ValueError, match=r"gray pictures.*\(1, 17, 23\)"):
        metric(*pictures)


# Gradients


@pytest.mark.parametrize("metric", [standard_deviation, spatial_frequency, scd, ssim])
def test_gradients(metric):
    a, b, fused = (0.1 + 0.8 * x.double() for x in triple(2, size=(12, 13)))
    fused.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: metric(a, b, f), (fused,), fast_mode=True)
    as_float = fused.detach().float().requires_grad_()
    metric(a.float(), b.float(), as_float).sum().backward()
    assert torch.isfinite(as_float.grad).all()
    assert as_float.grad.abs().max() > 0
