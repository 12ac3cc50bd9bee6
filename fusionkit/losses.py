"""Fusion loss terms, functional: pictures are (B, 1, H, W) in [0, 1], losses are scalars."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def sobel(image: torch.Tensor) -> torch.Tensor:
    """∇I: the Sobel gradient's magnitude |∂x I| + |∂y I|, kernel weights 1 2 1.

    (B, 1, H, W) -> (B, 1, H, W). The border is replicated, so that a flat picture has no edges.
    """
    smooth = image.new_tensor([1.0, 2.0, 1.0])
    differ = image.new_tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack([torch.outer(smooth, differ), torch.outer(differ, smooth)])[:, None]
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernels).abs().sum(dim=1, keepdim=True)


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
