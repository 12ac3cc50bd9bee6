"""Fusion loss terms, functional: pictures are (B, 1, H, W) in [0, 1], losses are scalars."""

from __future__ import annotations

import torch

from fusionkit.kernels.maximum_loss import maximum_terms
from fusionkit.kernels.sobel import sobel, sobel_components
from fusionkit.kernels.ssim import ssim, ssim_of_both  # noqa: F401 (`ssim` is a term, too)
from fusionkit.names import check_name


def maximum_intensity_loss(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Mean |fused - max(a, b)|: equation 5 of the gradient transfer paper, and many others'."""
    return (fused - torch.maximum(a, b)).abs().mean()


def maximum_gradient_loss(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, border: str = "replicate"
) -> torch.Tensor:
    """Mean |∇fused - max(∇a, ∇b)|: equation 6 of the gradient transfer paper."""
    strongest = torch.maximum(sobel(a, border), sobel(b, border))
    return (sobel(fused, border) - strongest).abs().mean()


def maximum_losses(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, border: str = "replicate"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`maximum_intensity_loss` and `maximum_gradient_loss`; on a GPU both in one pass."""
    return maximum_terms(a, b, fused, border)


def structure_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    weighting: str = "equal",
    border: str = "valid",
) -> torch.Tensor:
    """How far the fused picture's structure is from the sources', by SSIM; a scalar.

    Args:
        weighting: "equal" is (1 - SSIM(fused, a)) + (1 - SSIM(fused, b)), equation 7 of the
            gradient transfer paper; "gradient" is 1 - w_a SSIM(fused, a) - w_b SSIM(fused, b)
            with w the sources' shares of the mean gradient, as in its release.
        border: as `ssim` takes it; with "zeros" the gradients are padded so too.

    Raises:
        ValueError: unknown weighting.
    """
    check_name(weighting, ("equal", "gradient"), "weighting")
    similarity_a, similarity_b = ssim_of_both(a, b, fused, border)
    if weighting == "equal":
        return 2 - similarity_a - similarity_b
    edges = "zeros" if border == "zeros" else "replicate"
    share_a, share_b = sobel(a, edges).mean(), sobel(b, edges).mean()
    total = (share_a + share_b).clamp_min(torch.finfo(a.dtype).tiny)
    return 1 - (share_a * similarity_a + share_b * similarity_b) / total


def gradient_transfer_loss(
    teacher: torch.Tensor, student: torch.Tensor, form: str = "paper", border: str = "replicate"
) -> torch.Tensor:
    """What the student lacks of the teacher's edges: L_gt of the gradient transfer paper; a scalar.

    Args:
        teacher: the fused picture of the stage before; no gradient goes there.
        form: "paper" is equation 3, mean max(∇teacher - ∇student, 0): edges beyond the teacher's
            cost nothing. "released" is mean |∇teacher·m - ∇student·m| with
            m = max(∇teacher, ∇student), which punishes both.

    Raises:
        ValueError: unknown form.
    """
    check_name(form, ("paper", "released"), "form")
    teacher, student = sobel(teacher.detach(), border), sobel(student, border)
    if form == "paper":
        return (teacher - student).clamp_min(0).mean()
    strongest = torch.maximum(teacher, student)
    return (strongest * (teacher - student)).abs().mean()


def weighted_fusion_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    intensity_weights: torch.Tensor,
    gradient_weights: torch.Tensor,
    alpha: float = 1.0,
) -> torch.Tensor:
    """The parameterised fusion loss L_f of ReFusion (equations 1 to 3).

    Args:
        intensity_weights, gradient_weights: W and V, (B, 2, H, W), each summing to 1 over
            dimension 1; channel 0 weighs the distance to `a`, channel 1 to `b`.
        alpha: α₁, the weight of the gradient term.
    """
    sources = torch.cat([a, b], dim=1)
    gradients = torch.cat([sobel(a), sobel(b)], dim=1)
    intensity = (intensity_weights * (sources - fused).square()).sum(dim=1).mean()  # eq. 2
    gradient = (gradient_weights * (gradients - sobel(fused)).square()).sum(dim=1).mean()  # eq. 3
    return intensity + alpha * gradient  # eq. 1


def reconstruction_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    a_hat: torch.Tensor,
    b_hat: torch.Tensor,
    alpha: float = 1.0,
) -> torch.Tensor:
    """The reconstruction loss L_r of ReFusion (equations 4 to 6): at each pixel the worse source.

    Args:
        a_hat, b_hat: the sources as reconstructed from the fused picture.
        alpha: α₂, the weight of the gradient term.
    """
    intensity = torch.maximum((a - a_hat).square(), (b - b_hat).square()).mean()  # eq. 5
    gradient = torch.maximum(
        (sobel(a) - sobel(a_hat)).square(), (sobel(b) - sobel(b_hat)).square()
    ).mean()  # eq. 6
    return intensity + alpha * gradient  # eq. 4


def task_driven_fusion_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    weights: torch.Tensor,
    alpha: float = 1.0,
    intensity: str = "paper",
) -> torch.Tensor:
    """The learnable fusion loss L_f of TDFusion (equation 1); a scalar.

    Args:
        weights: w_a and w_b, (B, 2, H, W), summing to 1 over dimension 1.
        alpha: α, the weight of the gradient term; 0 leaves it out.
        intensity: as `weighted_intensity_loss` takes it.
    """
    loss = weighted_intensity_loss(a, b, fused, weights, intensity)
    return loss + alpha * signed_sobel_loss(a, b, fused) if alpha else loss


def weighted_intensity_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    weights: torch.Tensor,
    form: str = "paper",
) -> torch.Tensor:
    """Mean w_a (f - a)² + w_b (f - b)², equation 2 of TDFusion; a scalar.

    `form` "released" is mean (w_a (f - a))² + (w_b (f - b))², which punishes less where both
    sources have a say.

    Raises:
        ValueError: unknown form.
    """
    check_name(form, ("paper", "released"), "form")
    if form == "released":
        weights = weights.square()
    return (weights * (fused - torch.cat([a, b], dim=1)).square()).sum(dim=1).mean()


def signed_sobel_loss(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Mean |∂x f - ∂x| + |∂y f - ∂y|: equation 3 of TDFusion in its release's reading; a scalar.

    In x and in y, each pixel's aim is the source's gradient of larger magnitude, with its sign;
    black beyond the border.
    """
    of_a, of_b, of_fused = (sobel_components(x, border="zeros") for x in (a, b, fused))
    stronger = torch.where(of_a.abs() >= of_b.abs(), of_a, of_b)
    return (of_fused - stronger).abs().sum(dim=1).mean()
