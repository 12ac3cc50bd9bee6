"""The search space of CAF: fifteen loss terms that are searched, and two that are not.

Source: Liu et al., Where Elegance Meets Precision (CAF), IJCAI 2024, section 3.3 and Figure 1; the
order, the reductions and the fixed terms are those of the authors' release. `a` is the infrared
and `b` the visible picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import normalize

from fusionkit.losses import sobel, ssim_of_both
from fusionkit.names import check_name
from fusionkit.tasks.base import as_rgb

TERMS = (
    "saliency_l1_visible",
    "saliency_l1_infrared",
    "l1_visible",
    "l1_infrared",
    "l1_maximum",
    "mse_visible",
    "mse_infrared",
    "mse_maximum",
    "ssim_infrared",
    "ssim_visible",
    "gradient_infrared",
    "gradient_visible",
    "gradient_maximum",
    "perceptual_infrared",
    "perceptual_visible",
)
FIXED_WEIGHT = 0.5
PERCEPTUAL_FACTOR = 0.1
SSIM_WINDOW = 5
LEVELS = 256
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
KINDS = ("handcrafted", "random", "average")
# Ours, of the kind that fusion papers choose by hand; the paper does not give its own.
HANDCRAFTED = {
    "l1_maximum": 0.4,
    "gradient_maximum": 0.3,
    "ssim_infrared": 0.15,
    "ssim_visible": 0.15,
}

Features = Callable[[torch.Tensor], Sequence[torch.Tensor]]


def term_names(features: Features | None) -> tuple[str, ...]:
    """The terms there are: without a feature network, all but the perceptual ones."""
    return tuple(t for t in TERMS if features is not None or not t.startswith("perceptual"))


def searched_terms(
    a: torch.Tensor,
    b: torch.Tensor,
    fused: torch.Tensor,
    features: Features | None = None,
    detached: bool = False,
) -> dict[str, torch.Tensor]:
    """Each searched loss term by its name, in the order of `TERMS`; scalars.

    Args:
        a, b, fused: (B, 1, H, W), at least 5×5.
        features: from pictures (B, 1, H, W) to a sequence of feature maps, such as `VGGFeatures`;
            None leaves the two perceptual terms out.
        detached: the perceptual terms pass no gradient, by the release's slip: their values tell
            of the fused picture, but no weight of them moves it.
    """
    (salient_a, salient_b), maximum = saliency_weights(a, b), torch.maximum(a, b)
    edges, edges_a, edges_b = sobel(fused), sobel(a), sobel(b)
    ssim_a, ssim_b = ssim_of_both(a, b, fused, window=SSIM_WINDOW)
    terms = {
        "saliency_l1_visible": (salient_b * (fused - b)).abs().mean(),
        "saliency_l1_infrared": (salient_a * (fused - a)).abs().mean(),
        "l1_visible": F.l1_loss(fused, b),
        "l1_infrared": F.l1_loss(fused, a),
        "l1_maximum": F.l1_loss(fused, maximum),
        "mse_visible": F.mse_loss(fused, b),
        "mse_infrared": F.mse_loss(fused, a),
        "mse_maximum": F.mse_loss(fused, maximum),
        "ssim_infrared": (1 - ssim_a) / 2,
        "ssim_visible": (1 - ssim_b) / 2,
        "gradient_infrared": F.l1_loss(edges, edges_a),
        "gradient_visible": F.l1_loss(edges, edges_b),
        "gradient_maximum": F.l1_loss(edges, torch.maximum(edges_a, edges_b)),
    }
    if features is not None:
        seen = features(fused.detach() if detached else fused)
        for name, source in (("infrared", a), ("visible", b)):
            with torch.no_grad():
                aim = features(source)
            terms[f"perceptual_{name}"] = PERCEPTUAL_FACTOR * perceptual_distance(seen, aim)
    return terms


def fixed_terms(a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
    """What is added without being searched: 0.5 times both saliency MSE terms; a scalar."""
    salient_a, salient_b = saliency_weights(a, b)
    infrared = (salient_a * (fused - a)).square().mean()
    visible = (salient_b * (fused - b)).square().mean()
    return FIXED_WEIGHT * (infrared + visible)


def perceptual_distance(x: Sequence[torch.Tensor], y: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum over feature maps of their mean absolute difference; a scalar."""
    return torch.stack([F.l1_loss(p, q) for p, q in zip(x, y, strict=True)]).sum()


def saliency(image: torch.Tensor) -> torch.Tensor:
    """Histogram contrast: how far each pixel's gray level is from all others of its picture.

    (B, 1, H, W) in [0, 1] -> the same shape, stretched to [0, 1]; zeros for a flat picture. Levels
    are those of 8 bits. No gradient.

    Source: Zhai and Shah, Visual attention detection in video sequences using spatiotemporal cues,
    2006.
    """
    levels = (image.detach().clamp(0, 1) * (LEVELS - 1)).round().long().flatten(1)
    ones = torch.ones_like(levels, dtype=image.dtype)
    counts = torch.zeros(len(image), LEVELS, dtype=image.dtype, device=image.device)
    counts = counts.scatter_add(1, levels, ones) / levels.shape[1]
    gray = torch.arange(LEVELS, dtype=image.dtype, device=image.device)
    contrast = counts @ (gray[:, None] - gray).abs()
    found = contrast.gather(1, levels)
    low, high = found.amin(1, keepdim=True), found.amax(1, keepdim=True)
    stretched = (found - low) / (high - low).clamp_min(torch.finfo(image.dtype).eps)
    return stretched.view_as(image)


def saliency_weights(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TarDAL's m_a = 0.5 + 0.5·(s_a - s_b) and m_b = 1 - m_a, s being the saliency; in [0, 1]."""
    weight = 0.5 + 0.5 * (saliency(a) - saliency(b))
    return weight, 1 - weight


def fixed_weights(kind: str, names: Sequence[str] = TERMS, seed: int = 0) -> dict[str, float]:
    """Loss weights that nobody searched, summing to 1 (the variants of Table 3).

    Args:
        kind: "average" is 1/n each; "random" the softmax of a normal draw; "handcrafted" the
            usual choice by hand: pixel maximum, strongest gradient and SSIM.
        seed: of "random".

    Raises:
        ValueError: unknown kind.
    """
    check_name(kind, KINDS, "kind of weights")
    if kind == "handcrafted":
        return {name: HANDCRAFTED.get(name, 0.0) for name in names}
    if kind == "average":
        return dict.fromkeys(names, 1 / len(names))
    draw = torch.randn(len(names), generator=torch.Generator().manual_seed(seed))
    return dict(zip(names, draw.softmax(0).tolist(), strict=True))


class VGGFeatures(nn.Module):
    """φ of the perceptual terms: the activations after some of a VGG's convolutions.

    The weights are frozen and shared with `vgg`. The release applies activation after activation to
    the first convolution's output, by a slip; this is what the paper says.

    Args:
        vgg: torchvision's or timm's VGG, such as `vgg16(weights="IMAGENET1K_V1")`.
        convolutions: which, counted from 1; the paper's L.

    Raises:
        ValueError: there is no such convolution.
    """

    def __init__(self, vgg: nn.Module, convolutions: Sequence[int] = (1, 3, 5, 9, 13)) -> None:
        super().__init__()
        places = [i for i, layer in enumerate(vgg.features) if isinstance(layer, nn.Conv2d)]
        if not convolutions or not all(1 <= c <= len(places) for c in convolutions):
            raise ValueError(f"convolutions {convolutions}; expected some of 1 to {len(places)}")
        # The activation follows its convolution, after a batch norm where there is one.
        activations = [i for i, layer in enumerate(vgg.features) if isinstance(layer, nn.ReLU)]
        self.taps = sorted(activations[c - 1] for c in convolutions)
        self.layers = vgg.features[: self.taps[-1] + 1].requires_grad_(False).eval()

    def forward(self, picture: torch.Tensor) -> list[torch.Tensor]:
        """(B, 1 or 3, H, W) in [0, 1], at least 16 pixels a side -> a map for each convolution."""
        x = normalize(as_rgb(picture), **IMAGENET)
        found = []
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if place in self.taps:
                found.append(x)
        return found

    def train(self, mode: bool = True) -> VGGFeatures:
        """Stays in evaluation mode."""
        return super().train(False)


def placed(features: Features | None, like: torch.Tensor) -> Features | None:
    """A feature network on the device of the pictures; any other callable as it is."""
    return features.to(like.device) if isinstance(features, nn.Module) else features
