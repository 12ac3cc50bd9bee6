"""Pictures as TC-MoA and its masked autoencoder read them: normalised, enlarged, in patches.

Source: Zhu et al., TC-MoA, CVPR 2024, and its release; patches as in He et al., Masked Autoencoders
Are Scalable Vision Learners, CVPR 2022.
"""

from __future__ import annotations

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.nn import functional as F

from fusionkit.models.windows import WINDOW

PATCH = 16
ENLARGEMENT = 2  # both sources are enlarged before the patches are cut
TOKEN = PATCH // ENLARGEMENT  # pixels of the sources that a token stands for, in each direction
MULTIPLE = WINDOW * TOKEN  # sides of a picture that fill whole windows


def register_normalisation(network: nn.Module) -> None:
    """Give `network` ImageNet's `mean` and `std`, (3, 1, 1), which its files do not hold."""
    for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        network.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)


def enlarged(
    pictures: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, mode: str = "bilinear"
) -> torch.Tensor:
    """(B, 1 or 3, H, W) in [0, 1] -> (B, 3, 2H, 2W), normalised: what the patches are cut from."""
    x = (pictures.expand(-1, 3, -1, -1) - mean) / std
    return F.interpolate(x, scale_factor=ENLARGEMENT, mode=mode)


def to_patches(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, 16h, 16w) -> (B, h, w, 768): of each patch the pixels in reading order, of each the
    channels."""
    x = pictures.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3)


def from_patches(patches: torch.Tensor) -> torch.Tensor:
    """(B, h, w, 768) -> (B, 3, 16h, 16w): undoes `to_patches`."""
    x = patches.unflatten(-1, (PATCH, PATCH, 3))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
