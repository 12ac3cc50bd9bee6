"""Loss terms by hand: the Sobel gradient, L_f (equations 1 to 3) and L_r (4 to 6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusionkit.losses import (
    gradient_transfer_loss,
    maximum_gradient_loss,
    maximum_intensity_loss,
    reconstruction_loss,
    sobel,
    ssim,
    structure_loss,
    weighted_fusion_loss,
)


def naive_sobel(image: torch.Tensor) -> torch.Tensor:
    """Pixel by pixel on (B, 1, H, W), border replicated."""
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    out = np.zeros(image.shape)
    for item, picture in enumerate(image[:, 0].numpy()):
        padded = np.pad(picture, 1, mode="edge")
        for y in range(picture.shape[0]):
            for x in range(picture.shape[1]):
                window = padded[y : y + 3, x : x + 3]
                dx, dy = (window * kernel).sum(), (window * kernel.T).sum()
                out[item, 0, y, x] = abs(dx) + abs(dy)
    return torch.from_numpy(out)


def random(*shape: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def random_weights() -> tuple[torch.Tensor, torch.Tensor]:
    w, v = random(2, 2, 5, 6, count=2)
    return w / w.sum(1, keepdim=True), v / v.sum(1, keepdim=True)


def test_sobel_equals_a_plain_loop():
    (image,) = random(2, 1, 5, 7, count=1)
    torch.testing.assert_close(sobel(image), naive_sobel(image))


def test_sobel_of_a_ramp():
    ramp = (0.01 * torch.arange(9.0)).expand(1, 1, 6, 9)
    gradient = sobel(ramp)
    torch.testing.assert_close(gradient[..., 1:-1], torch.full((1, 1, 6, 7), 0.08))
    # The replicated border halves the step.
    torch.testing.assert_close(gradient[..., [0, -1]], torch.full((1, 1, 6, 2), 0.04))


def test_sobel_of_an_edge():
    edge = torch.zeros(1, 1, 6, 8)
    edge[..., 4:] = 1
    expected = torch.zeros(1, 1, 6, 8)
    expected[..., 3:5] = 4
    torch.testing.assert_close(sobel(edge), expected, rtol=0, atol=0)
    torch.testing.assert_close(sobel(edge.mT), expected.mT, rtol=0, atol=0)


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_sobel_of_a_flat_picture_is_zero_up_to_the_border(level):
    assert (sobel(torch.full((1, 1, 8, 8), level)).abs() < 1e-6).all()


def test_sobel_does_not_see_orientation_or_sign():
    (image,) = random(1, 1, 5, 7, count=1)
    expected = sobel(image)
    torch.testing.assert_close(sobel(image.flip(-1)).flip(-1), expected)
    torch.testing.assert_close(sobel(image.flip(-2)).flip(-2), expected)
    torch.testing.assert_close(sobel(image.mT).mT, expected)
    torch.testing.assert_close(sobel(1 - image), expected)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_fusion_loss_is_its_equations(alpha):
    a, b, fused = random(2, 1, 5, 6, count=3)
    w, v = random_weights()
    grad_a, grad_b, grad_f = naive_sobel(a), naive_sobel(b), naive_sobel(fused)
    intensity = gradient = 0.0
    for i in range(2):
        for y in range(5):
            for x in range(6):
                at = (i, 0, y, x)
                intensity += w[i, 0, y, x] * (a[at] - fused[at]) ** 2
                intensity += w[i, 1, y, x] * (b[at] - fused[at]) ** 2
                gradient += v[i, 0, y, x] * (grad_a[at] - grad_f[at]) ** 2
                gradient += v[i, 1, y, x] * (grad_b[at] - grad_f[at]) ** 2
    expected = (intensity + alpha * gradient) / (2 * 5 * 6)
    loss = weighted_fusion_loss(a, b, fused, w, v, alpha)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)


def test_fusion_loss_is_zero_at_a_source_of_full_weight():
    a, b = random(2, 1, 5, 6, count=2)
    all_a = torch.cat([torch.ones_like(a), torch.zeros_like(a)], dim=1)
    assert weighted_fusion_loss(a, b, a, all_a, all_a) == 0
    assert weighted_fusion_loss(a, b, b, all_a.flip(1), all_a.flip(1)) == 0
    assert weighted_fusion_loss(a, b, b, all_a, all_a) > 0


def test_fusion_loss_swaps_with_its_sources():
    a, b, fused = random(2, 1, 5, 6, count=3)
    w, v = random_weights()
    torch.testing.assert_close(
        weighted_fusion_loss(a, b, fused, w, v),
        weighted_fusion_loss(b, a, fused, w.flip(1), v.flip(1)),
    )


def test_fusion_loss_has_gradients_by_picture_and_weights():
    torch.manual_seed(0)
    a, b, fused = random(1, 1, 4, 5, count=3)
    w, v = random(1, 2, 4, 5, count=2)
    given = [x.requires_grad_() for x in (fused, w, v)]
    assert torch.autograd.gradcheck(lambda f, w, v: weighted_fusion_loss(a, b, f, w, v), given)
    assert torch.autograd.gradgradcheck(lambda f, w, v: weighted_fusion_loss(a, b, f, w, v), given)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_reconstruction_loss_is_its_equations(alpha):
    a, b, a_hat, b_hat = random(2, 1, 5, 6, count=4)
    gradients = [naive_sobel(x) for x in (a, b, a_hat, b_hat)]
    intensity = gradient = 0.0
    for i in range(2):
        for y in range(5):
            for x in range(6):
                at = (i, 0, y, x)
                grad_a, grad_b, grad_a_hat, grad_b_hat = (g[at] for g in gradients)
                intensity += max((a[at] - a_hat[at]) ** 2, (b[at] - b_hat[at]) ** 2)
                gradient += max((grad_a - grad_a_hat) ** 2, (grad_b - grad_b_hat) ** 2)
    expected = (intensity + alpha * gradient) / (2 * 5 * 6)
    loss = reconstruction_loss(a, b, a_hat, b_hat, alpha)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)


def test_reconstruction_loss_is_symmetric_and_zero_at_the_sources():
    a, b, a_hat, b_hat = random(2, 1, 5, 6, count=4)
    torch.testing.assert_close(
        reconstruction_loss(a, b, a_hat, b_hat), reconstruction_loss(b, a, b_hat, a_hat)
    )
    assert reconstruction_loss(a, b, a, b) == 0
    assert reconstruction_loss(a, b, a, b_hat) > 0
    # One source's error hides behind a larger one of the other.
    far = (b - 2).requires_grad_()
    near = a_hat.clone().requires_grad_()
    reconstruction_loss(a, b, near, far, alpha=0).backward()
    assert near.grad.abs().max() == 0
    assert far.grad.abs().max() > 0


# Terms of the gradient transfer paper, against the authors' code


@pytest.fixture(scope="module")
def released(shared):
    with np.load(shared / "golden" / "frufn_extra.npz") as file:
        return {key[2:]: torch.from_numpy(file[key]) for key in file.files if key[:2] == "l_"}


def test_terms_agree_with_the_release(released):
    a, b, fused, teacher = (released[key] for key in ("a", "b", "f", "t"))
    found = {
        "sobel_sum": sobel(fused, "zeros").sum(),
        "intensity": maximum_intensity_loss(a, b, fused),
        "grad": maximum_gradient_loss(a, b, fused, "zeros"),
        "ssim_weighted": 1 - structure_loss(a, b, fused, "gradient", "zeros"),
        "ssim_pad": ssim(fused, teacher, "zeros"),
        "ssim_loss_valid": 1 - ssim(fused, teacher),
        "gt_grad": gradient_transfer_loss(teacher, fused, "released", "zeros"),
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(released[name].item(), rel=1e-5), name


def test_ssim_of_a_picture_with_itself_and_with_its_negative():
    x = torch.rand(2, 1, 20, 24, generator=torch.Generator().manual_seed(0))
    for border in ("valid", "zeros"):
        assert ssim(x, x, border).item() == pytest.approx(1, abs=1e-5)
    assert ssim(x, 1 - x).item() < -0.9


def test_structure_loss_adds_or_weighs_by_gradient():
    flat = torch.full((1, 1, 16, 16), 0.5)
    edges = flat.clone()
    edges[..., 8:] = 0.9
    equal = structure_loss(edges, flat, flat)
    assert equal.item() == pytest.approx(1 - ssim(flat, edges).item(), abs=1e-5)
    # All of the gradient is in `edges`, so it has all the weight.
    weighted = structure_loss(edges, flat, flat, "gradient")
    assert weighted.item() == pytest.approx(equal.item(), abs=1e-5)
    assert structure_loss(flat, flat, flat, "gradient").isfinite()
    with pytest.raises(ValueError, match=r"'sum'.*equal"):
        structure_loss(flat, flat, flat, "sum")


def test_gradient_transfer_asks_for_the_teachers_edges_only():
    ramp = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
    assert gradient_transfer_loss(ramp, 2 * ramp).item() == 0
    # A Sobel response of a ramp with slope s is 8 s; half of it is missing, less at the border.
    expected = (8 / 15 / 2) * (14 + 2 * 0.5) / 16
    student = (ramp / 2).requires_grad_()
    loss = gradient_transfer_loss(ramp, student)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.autograd.grad(loss, student)[0].abs().sum() > 0
    assert gradient_transfer_loss(ramp, 2 * ramp, "released").item() > 0.1
    teacher = ramp.clone().requires_grad_()
    assert not gradient_transfer_loss(teacher, ramp).requires_grad
    with pytest.raises(ValueError, match=r"'l2'.*paper"):
        gradient_transfer_loss(ramp, ramp, "l2")
