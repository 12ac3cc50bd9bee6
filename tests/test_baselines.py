"""The classical baselines: exact cases, and pictures of which each half is sharp in one source."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fusionkit.baselines import BASELINES, GuidedFilter, LaplacianPyramid, guided_filter

every_baseline = pytest.mark.parametrize("build", BASELINES.values(), ids=BASELINES)


def texture(size=(64, 80), batch: int = 2, channels: int = 1) -> torch.Tensor:
    """Smooth regions and fine noise, within [0.1, 0.9]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, channels, 6, 7, generator=generator)
    smooth = F.interpolate(coarse, size, mode="bilinear")
    return 0.15 + 0.6 * smooth + 0.15 * torch.rand(smooth.shape, generator=generator)


def half_sharp(size=(64, 80)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The truth, and two sources blurred in the right and in the left half of it."""
    truth = texture(size)
    blurred = F.avg_pool2d(F.pad(truth, (3, 3, 3, 3), mode="reflect"), 7, 1)
    left = torch.arange(size[1]) < size[1] // 2
    return truth, torch.where(left, truth, blurred), torch.where(left, blurred, truth)


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    return -10 * (x - y).square().mean().log10().item()


def test_names():
    assert list(BASELINES) == ["average", "maximum", "laplacian_pyramid", "guided_filter"]
    for build in BASELINES.values():
        assert not list(build().parameters())


def test_average_and_maximum():
    a, b = texture(), texture().flip(-1)
    torch.testing.assert_close(BASELINES["average"]()(a, b), torch.stack([a, b]).mean(0))
    torch.testing.assert_close(BASELINES["maximum"]()(a, b), torch.stack([a, b]).amax(0))


@every_baseline
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (8, 61), (37, 50), (64, 80)])
@pytest.mark.parametrize("channels", [1, 3])
def test_identical_sources_come_back(build, size, channels):
    x = texture(size, channels=channels)
    fused = build()(x, x.clone())
    assert fused.dtype == x.dtype
    torch.testing.assert_close(fused, x, rtol=0, atol=1e-6)


@every_baseline
@pytest.mark.parametrize("size", [(8, 8), (19, 33)])
def test_constant_sources_give_a_constant_between_them(build, size):
    a, b = torch.full((1, 1, *size), 0.2), torch.full((1, 1, *size), 0.7)
    fused = build()(a, b)
    torch.testing.assert_close(fused, fused.mean().expand_as(fused), rtol=0, atol=1e-6)
    assert 0.2 - 1e-6 <= fused.mean().item() <= 0.7 + 1e-6
    zero = torch.zeros_like(a)
    torch.testing.assert_close(build()(zero, zero), zero)


@every_baseline
def test_the_range_is_kept_and_a_batch_is_a_loop(build):
    generator = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, 3, 1, 33, 21, generator=generator).round()
    fused = build()(a, b)
    assert fused.shape == a.shape
    assert fused.min() >= 0
    assert fused.max() <= 1
    one_by_one = [build()(a[i : i + 1], b[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(fused, torch.cat(one_by_one), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["laplacian_pyramid", "guided_filter"])
@pytest.mark.parametrize("size", [(64, 80), (63, 81)])
def test_the_sharp_halves_are_taken(name, size):
    truth, a, b = half_sharp(size)
    averaged = psnr(BASELINES["average"]()(a, b), truth)
    fused = BASELINES[name]()(a, b)
    assert psnr(fused, truth) > averaged + 3
    # Far from the seam the sharp source comes through.
    assert (fused - truth)[..., : size[1] // 4].abs().mean() < 0.01


def test_the_pyramid_keeps_the_larger_coefficient():
    flat = torch.full((1, 1, 32, 32), 0.5)
    spot = flat.clone()
    spot[..., 16, 16] = 1
    fused = LaplacianPyramid(levels=1)(spot, flat)
    low = LaplacianPyramid(levels=5)(spot, flat)
    assert fused[..., 16, 16].item() > 0.9
    torch.testing.assert_close(
        LaplacianPyramid(levels=3)(flat, spot), LaplacianPyramid(3)(spot, flat)
    )
    assert (low - fused).abs().max() > 1e-3
    with pytest.raises(ValueError, match="levels 0; expected 1 or more"):
        LaplacianPyramid(levels=0)


def test_the_guided_filter_by_its_definition():
    """A window's regression, written out for one pixel (its coefficients averaged over windows)."""
    generator = torch.Generator().manual_seed(2)
    guide, x = torch.rand(2, 12, 14, generator=generator, dtype=torch.float64)
    filtered = guided_filter(guide, x, 2, 0.01)
    row, column, lines = 0, 6, []
    for i in range(0, 3):
        for j in range(4, 9):
            window = slice(max(i - 2, 0), i + 3), slice(j - 2, j + 3)
            i_w, x_w = guide[window], x[window]
            slope = ((i_w * x_w).mean() - i_w.mean() * x_w.mean()) / (i_w.var(correction=0) + 0.01)
            lines.append(slope * guide[row, column] + x_w.mean() - slope * i_w.mean())
    assert filtered[row, column].item() == pytest.approx(torch.stack(lines).mean().item())


def test_guided_weights_follow_edges():
    """A base layer's seam between two constant exposures stays free of overshoot."""
    a, b = torch.zeros(1, 1, 40, 40), torch.full((1, 1, 40, 40), 0.5)
    a[..., 20:] = 1
    fused = GuidedFilter()(a, b)
    assert fused.min() >= 0
    assert fused[..., 19].mean() < 0.3 < 0.7 < fused[..., 20].mean()


@every_baseline
def test_bad_sources_are_refused(build):
    x = texture((16, 16))
    with pytest.raises(ValueError, match=r"one shape, got \(2, 1, 16, 16\) and \(2, 1, 16, 15\)"):
        build()(x, x[..., 1:])
    with pytest.raises(ValueError, match=r"one shape, got \(1, 16, 16\)"):
        build()(x[0], x[0])
    with pytest.raises(ValueError, match="at least 8×8 pixels, got 7×16"):
        build()(x[..., :7, :], x[..., :7, :])
