"""TC-MoA's losses: the release's numbers with its weights, and each term by hand."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fusionkit.losses import ssim
from fusionkit.methods.tcmoa_losses import (
    WEIGHTS,
    average_intensity_loss,
    mef_ssim_loss,
    mutual_information_regularisation,
    sharper_source,
    signed_gradient,
    signed_maximum_gradient_loss,
    tcmoa_loss,
)
from fusionkit.models import create_model
from fusionkit.models.tcmoa import TCMoAOutput

TASKS = {"VIF": "ivif", "MEF": "meif", "MFF": "mfif"}
# The release's names of the terms, and the factor that it reports with them.
TERMS = {
    "pixel": ("pixel", 1.0),
    "max_pixel": ("pixel", 1.0),
    "max_grad": ("gradient", 3.0),
    "ssim": ("ssim", 1.0),
    "MEF_SSIM": ("ssim", 1.0),
    "prompt": ("mir", 1.0),
    "aux": ("balance", 1.0),
}
# Factors that differ: its pixel term holds them in some tasks and not in others.
FACTORS = {
    ("VIF", 0, "pixel"): 3.0,
    ("MEF", 0, "pixel"): 3.0,
    ("MEF", 3, "pixel"): 3.0,
}


@cache
def golden_run(shared, size: str, theirs: str):
    golden = np.load(shared / "golden" / "tcmoa_tiny.npz")
    weights = shared / "weights" / "tcmoa_tiny.safetensors"
    network = create_model("tcmoa_tiny", checkpoint=weights).eval()
    a, b = (torch.from_numpy(golden[f"{name}_{size}"]) for name in "ab")
    with torch.no_grad():
        out = network.explain(a, b, TASKS[theirs])
    prefix = f"loss_{size}_{theirs}_"
    return a, b, out, {k.removeprefix(prefix): v for k, v in golden.items() if prefix in k}


@pytest.mark.parametrize("theirs", TASKS)
@pytest.mark.parametrize("size", ["112x112", "112x224", "224x112"])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_number_of_the_release(shared, epoch, size, theirs):
    a, b, out, numbers = golden_run(shared, size, theirs)
    total, terms = tcmoa_loss(TASKS[theirs], a, b, out, epoch=epoch, warmup=epoch < 2)
    expected = {k: float(v) for k, v in numbers.items() if k.startswith(f"ep{epoch}_")}
    assert total.item() == pytest.approx(expected.pop(f"ep{epoch}_loss"), rel=1e-5)
    assert len(expected) >= 3
    for key, value in expected.items():
        name = key.removeprefix(f"ep{epoch}_").removesuffix("_loss")
        ours, factor = TERMS[name]
        factor = FACTORS.get((theirs, epoch, name), factor)
        assert factor * terms[ours].item() == pytest.approx(value, rel=1e-5), key


# By hand


def random(*shape: int, count: int = 3, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(*shape, generator=generator, dtype=dtype) for _ in range(count)]


def layers(*sums: float) -> tuple[torch.Tensor, ...]:
    """Prompts of one layer each, of which the first source has a fifth."""
    return tuple(torch.tensor([0.2 * s, 0.8 * s]).view(1, 2, 1, 1).expand(3, 2, 4, 5) for s in sums)


def test_mir_by_hand():
    prompts = {"encoder": layers(1.2, 0.6), "decoder": layers(1.5)}
    released = mutual_information_regularisation(prompts)
    assert released.item() == pytest.approx(0.75 * (0.04 + 0.16) / 2 + 0.25 * 0.25)
    paper = mutual_information_regularisation(prompts, "paper")
    assert paper.item() == pytest.approx(0.75 * (0.2 + 0.4) / 2 + 0.25 * 0.5)
    mixed = torch.tensor([[0.4, 0.9], [0.4, 0.5]]).view(1, 2, 1, 2)  # sums 0.8 and 1.4
    prompts = {"encoder": (mixed,), "decoder": layers(1.0)}
    assert mutual_information_regularisation(prompts).item() == pytest.approx(0.75 * 0.1)
    assert mutual_information_regularisation({"encoder": (), "decoder": ()}) == 0


def test_signed_gradient_by_hand():
    ramp = 0.1 * torch.arange(6.0).expand(1, 1, 5, 6)
    slope = 3 * 0.2 * 1.4  # three channels, two pixels, the kernel's sum
    inner = signed_gradient(ramp)[..., 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, slope))
    upwards = ramp.mT
    torch.testing.assert_close(signed_gradient(upwards)[..., 1:-1, 1:-1], -inner.mT)
    colour = torch.cat([ramp, 2 * ramp, 0 * ramp], dim=1)
    torch.testing.assert_close(signed_gradient(colour), signed_gradient(ramp))
    # Beyond the border is black: in the last column the pixel before it is lost.
    assert signed_gradient(ramp)[0, 0, 2, -1].item() == pytest.approx(-3 * 1.4 * 0.4)


def test_stronger_gradient_keeps_its_sign():
    ramp = 0.05 * torch.arange(8.0).expand(1, 1, 8, 8)
    rising, falling = ramp, -2 * ramp
    for pair in ((rising, falling), (falling, rising)):
        assert signed_maximum_gradient_loss(*pair, falling).item() == pytest.approx(0, abs=1e-7)
        assert signed_maximum_gradient_loss(*pair, -falling) > 0.1


def test_sharper_source_is_chosen_by_patch():
    a, b = torch.full((2, 3, 32, 48), 0.1), torch.full((2, 3, 32, 48), 0.08)
    a[0, :, 5, 5] = 1  # sharp in the top left patch only
    b[0, :, 20, 40] = 1  # in the bottom right one
    b[1, 0, 8, 24] = 1  # red: 0.299 of the step that ...
    a[1, 1, 8, 24] = 1  # ... green's 0.587 makes
    # Where no patch is sharp inside, the step to black at the border decides, for the brighter.
    selected = sharper_source(a, b)
    assert torch.equal(selected[0, :, :16, :16], a[0, :, :16, :16])
    assert torch.equal(selected[0, :, 16:, 32:], b[0, :, 16:, 32:])
    assert torch.equal(selected[1, :, :16, 16:32], a[1, :, :16, 16:32])
    assert torch.equal(selected[0, :, 16:, :16], a[0, :, 16:, :16])


def test_sharper_source_of_any_size_and_one_channel():
    a, b = random(1, 1, 37, 50, count=2)
    selected = sharper_source(a, b)
    assert selected.shape == a.shape
    assert torch.equal(torch.where(selected == a, a, b), selected)
    torch.testing.assert_close(
        sharper_source(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1))[:, :1], selected
    )


def naive_mef_ssim(a: np.ndarray, b: np.ndarray, fused: np.ndarray) -> float:
    """One-channel (H, W) pictures, window by window."""
    place = np.arange(-5, 6)
    window = np.exp(-(place**2) / (2 * (11 / 6) ** 2))
    window = np.outer(window, window) / window.sum() ** 2
    height, width = a.shape
    a, b, fused = (np.pad(x, 5) for x in (a, b, fused))
    stats = np.zeros((height, width, 3))
    means = np.zeros((height, width, 2))
    for y in range(height):
        for x in range(width):
            cut = np.s_[y : y + 11, x : x + 11]
            p, q, f = a[cut], b[cut], fused[cut]
            mean = [(window * v).sum() for v in (p, q, f)]
            var = [(window * v * v).sum() - m * m for v, m in zip((p, q, f), mean, strict=True)]
            best = (p, mean[0], var[0]) if var[0] >= var[1] else (q, mean[1], var[1])
            covariance = (window * best[0] * f).sum() - best[1] * mean[2]
            stats[y, x] = (2 * covariance + 9e-4) / (best[2] + var[2] + 9e-4), mean[2], 0
            means[y, x] = mean[:2]
    whole = means.mean((0, 1))
    weights = np.exp(-((means - 0.5) ** 2) / 0.08) * np.exp(-((whole - 0.5) ** 2) / 0.08)
    wanted = (weights * means).sum(-1) / weights.sum(-1)
    luminance = (2 * wanted * stats[..., 1] + 1e-4) / (wanted**2 + stats[..., 1] ** 2 + 1e-4)
    return luminance.mean() * stats[..., 0].mean()


def test_mef_ssim_equals_a_plain_loop():
    a, b, fused = random(1, 1, 14, 17)
    a, fused = 0.3 * a, (a + fused) / 2
    expected = naive_mef_ssim(*(x[0, 0].numpy() for x in (a, b, fused)))
    assert 1 - mef_ssim_loss(a, b, fused).item() == pytest.approx(expected, rel=1e-9)
    stacked = [torch.cat([x[0], x[0]], dim=-2)[None] for x in (a, b, fused)]
    batch = [torch.cat([x, x]) for x in (a, b, fused)]
    torch.testing.assert_close(mef_ssim_loss(*batch), mef_ssim_loss(*stacked))


def test_mef_ssim_scales():
    (a,) = random(1, 1, 48, 48, count=1)
    assert mef_ssim_loss(a, a, a, scales=3).item() == pytest.approx(0, abs=1e-6)
    fused = F.avg_pool2d(a, 3, 1, 1)  # blur is worst at the finest scale
    assert 0 < mef_ssim_loss(a, a, fused, scales=3) < mef_ssim_loss(a, a, fused)
    opposite = (1 - a).requires_grad_()  # covariance below zero, where a power has no value
    (gradient,) = torch.autograd.grad(mef_ssim_loss(a, a, opposite, scales=3), opposite)
    assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="scales is 2, expected 1 or 3"):
        mef_ssim_loss(a, a, a, scales=2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "loss",
    [
        signed_maximum_gradient_loss,
        average_intensity_loss,
        mef_ssim_loss,
        lambda a, b, f: F.l1_loss(f, sharper_source(a, b)),
    ],
)
def test_gradients_by_finite_differences(loss, channels):
    a, b, fused = random(1, channels, 17, 18)
    assert torch.autograd.gradcheck(lambda f: loss(a, b, f), fused.requires_grad_(), fast_mode=True)


def output(fused: torch.Tensor, balance: float = 0.3) -> TCMoAOutput:
    prompts = {"encoder": layers(1.2), "decoder": layers(1.0)}
    return TCMoAOutput(fused, prompts, prompts, torch.tensor(balance))


@pytest.mark.parametrize("task", WEIGHTS)
def test_the_whole_is_the_weighted_sum_of_its_terms(task):
    a, b, fused = random(2, 1, 32, 32, dtype=torch.float32)
    total, terms = tcmoa_loss(task, a, b, output(fused), epoch=4)
    weighed = sum(weight * terms[name] for name, weight in WEIGHTS[task].items())
    assert total.item() == pytest.approx(weighed.item() + 0.3 / 5)
    assert terms["mir"].item() == pytest.approx(0.75 * 0.04)
    assert terms["balance"].item() == pytest.approx(0.3)
    pixel, _ = tcmoa_loss(task, a, b, output(fused, 0), weights={"pixel": 2.0})
    assert pixel.item() == pytest.approx(2 * terms["pixel"].item())


def test_warm_up_asks_for_the_mean_and_for_the_sharper_source():
    a, b = random(1, 1, 32, 32, count=2, dtype=torch.float32)
    middle, selected = output((a + b) / 2), output(sharper_source(a, b))
    for task in ("ivif", "meif"):
        _, terms = tcmoa_loss(task, a, b, middle, epoch=0, warmup=True)
        assert terms["pixel"] == 0
        similarity = (ssim(middle.fused, a, "zeros") + ssim(middle.fused, b, "zeros")) / 2
        torch.testing.assert_close(terms["ssim"], 1 - similarity)
    _, terms = tcmoa_loss("mfif", a, b, selected, epoch=0, warmup=True)
    assert terms["pixel"] == 0
    assert abs(terms["ssim"].item()) < 1e-6


def test_pictures_are_clipped_first():
    a, b, fused = random(1, 1, 32, 32, dtype=torch.float32)
    wide = [3 * x - 1 for x in (a, b, fused)]
    for task in WEIGHTS:
        clipped = tcmoa_loss(task, *(x.clamp(0, 1) for x in wide[:2]), output(wide[2].clamp(0, 1)))
        torch.testing.assert_close(tcmoa_loss(task, *wide[:2], output(wide[2]))[0], clipped[0])


def test_losses_stay_in_float32_under_autocast():
    a, b, fused = random(1, 1, 32, 32, dtype=torch.float32)
    for task in WEIGHTS:
        expected, _ = tcmoa_loss(task, a, b, output(fused))
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = tcmoa_loss(task, a, b, output(fused))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("mif", {}, "unknown task 'mif'.*expected one of ivif, meif, mfif"),
        ("ivif", {"mir_form": "squared"}, "unknown MIR form 'squared'; expected one of released, "),
        ("meif", {"weights": {"colour": 1.0}}, "unknown loss term 'colour'"),
        ("mfif", {"warmup": True, "weights": {"gradient": 1.0}}, "unknown loss term 'gradient'"),
    ],
)
def test_bad_options(task, options, message):
    a, b, fused = random(1, 1, 32, 32, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        tcmoa_loss(task, a, b, output(fused), **options)
