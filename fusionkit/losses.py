"""Fusion loss terms, functional: pictures are (B, 1, H, W) in [0, 1], losses are scalars."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fusionkit.names import check_name


def sobel_components(image: torch.Tensor, border: str = "replicate") -> torch.Tensor:
    """∂x I and ∂y I by the Sobel operator, kernel weights 1 2 1: (B, 1, H, W) -> (B, 2, H, W).

    The border is replicated, so that a flat picture has no edges; "zeros" pads with black, as the
    releases of TDFusion and FRUFN do.
    """
    smooth = image.new_tensor([1.0, 2.0, 1.0])
    differ = image.new_tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack([torch.outer(smooth, differ), torch.outer(differ, smooth)])[:, None]
    mode = "constant" if border == "zeros" else border
    return F.conv2d(F.pad(image, (1, 1, 1, 1), mode=mode), kernels)


def sobel(image: torch.Tensor, border: str = "replicate") -> torch.Tensor:
    """∇I: the Sobel gradient's magnitude |∂x I| + |∂y I|, (B, 1, H, W) -> (B, 1, H, W).

    `border`: as in `sobel_components`.
    """
    return sobel_components(image, border).abs().sum(dim=1, keepdim=True)


def ssim(x: torch.Tensor, y: torch.Tensor, border: str = "valid", window: int = 11) -> torch.Tensor:
    """Mean structural similarity of (B, C, H, W) pictures in [0, 1], for use in a loss; a scalar.

    Gaussian window of odd side `window` with σ 1.5, C1 = 1e-4, C2 = 9e-4. `border`: "valid" leaves
    windows out that reach beyond the picture; "zeros" pads with black, as the releases of TC-MoA
    and FRUFN do in most of their terms.

    Source: Wang et al., Image quality assessment: from error visibility to structural similarity,
    2004.
    """
    reach = window // 2
    position = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    weights = torch.softmax(-position.square() / (2 * 1.5**2), dim=0)
    padding = reach if border == "zeros" else 0
    stack = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]
    blurred = F.conv2d(stack, weights.view(1, 1, 1, window), padding=(0, padding))
    blurred = F.conv2d(blurred, weights.view(1, 1, window, 1), padding=(padding, 0))
    mean_x, mean_y, xx, yy, xy = blurred.chunk(5)
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    luminance = (2 * product + 1e-4) / (squares + 1e-4)
    contrast_structure = (2 * (xy - product) + 9e-4) / (xx + yy - squares + 9e-4)
    return (luminance * contrast_structure).mean()


def maximum_intensity_loss(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """Mean |fused - max(a, b)|: equation 5 of the gradient transfer paper, and many others'."""
    return (fused - torch.maximum(a, b)).abs().mean()


def maximum_gradient_loss(
    a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor, border: str = "replicate"
) -> torch.Tensor:
    """Mean |∇fused - max(∇a, ∇b)|: equation 6 of the gradient transfer paper."""
    strongest = torch.maximum(sobel(a, border), sobel(b, border))
    return (sobel(fused, border) - strongest).abs().mean()


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
    similarity_a, similarity_b = ssim(fused, a, border), ssim(fused, b, border)
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
