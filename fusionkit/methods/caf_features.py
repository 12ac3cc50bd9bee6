"""Features for CAF's perceptual terms where VGG-16's weights cannot be had.

The paper's φ is a VGG-16 trained on ImageNet (Liu et al., CAF, IJCAI 2024, section 3.3). The
network here has its layers with fewer channels and learns on whatever labelled pictures there are;
the heads are those of Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR
2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.vgg import make_layers

from fusionkit.methods.caf_terms import VGGFeatures
from fusionkit.tasks.segmentation import Segmentation

# VGG-16's convolutions in multiples of its first width, and its poolings.
PLAN = (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M")


class NarrowVGG(nn.Module):
    """The convolutions of VGG-16, which has 64 channels in the first, with `width` there.

    `VGGFeatures` takes it as it takes torchvision's.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.features = make_layers([p if p == "M" else p * width for p in PLAN])
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)


class VGGSegmentation(Segmentation):
    """Label maps from the feature maps that the perceptual terms compare: how those are learned.

    Each map has a 1×1 convolution to the classes; the sum of all, resized, is the logits. So
    every map has learned to tell classes apart.

    Attributes:
        features: the features, with gradient by their weights until `frozen` is called.
    """

    def __init__(
        self, classes: Sequence[str], width: int = 8, convolutions: Sequence[int] = (1, 3, 5, 9, 13)
    ) -> None:
        super().__init__(classes)
        vgg = NarrowVGG(width)
        self.features = VGGFeatures(vgg, convolutions).requires_grad_()
        channels = [p * width for p in PLAN if p != "M"]
        heads = (nn.Conv2d(channels[c - 1], len(self.classes), 1) for c in sorted(convolutions))
        self.heads = nn.ModuleList(heads)

    def logits(self, fused: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        size = tuple(fused.shape[-2:] if size is None else size)
        maps = zip(self.heads, self.features(fused), strict=True)
        return sum(F.interpolate(head(x), size=size, mode="bilinear") for head, x in maps)

    def frozen(self) -> VGGFeatures:
        """The features for `searched_terms`: their weights learn no more."""
        return self.features.requires_grad_(False)


class EachSource(nn.Module):
    """A fusion that is none: the infrared picture of even items, the visible one of odd items.

    Shows a task both kinds of pictures, as perceptual terms compare with both.
    """

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        odd = torch.arange(len(a), device=a.device) % 2 == 1
        return torch.where(odd[:, None, None, None], b, a)
