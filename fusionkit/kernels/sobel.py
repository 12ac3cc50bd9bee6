"""The Sobel gradient of pictures, the reference that losses and kernels share."""

from __future__ import annotations

import torch
from torch.nn import functional as F


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
