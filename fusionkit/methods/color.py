"""Training of ColorNet, which gives a fused multi-exposure picture its colour.

Source: Wang et al., A General Image Fusion Approach Exploiting Gradient Transfer Learning and
Fusion Rule Unfolding, section 3.1, remark 1.
"""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from torch import nn

from fusionkit.color import chroma, luminance
from fusionkit.methods.base import Method, cosine


class ColorNetMethod(Method):
    """The mean absolute error of the predicted chroma (equation 8).

    Args:
        colornet: the network that is trained, such as `models.colornet.ColorNet`; it is called
            with the fused luminance (B, 1, H, W) and both sources' CbCr (B, 2, H, W).
        fusion: the network whose pictures are coloured, of the stage `meif`; a frozen copy is
            kept, which is no part of a checkpoint.
        lr: Adam's learning rate; 1e-4 in the release.
        anneal_steps: lower the learning rate to zero along half a cosine over so many steps; None
            keeps it.
    """

    accumulates = True

    def __init__(
        self,
        colornet: nn.Module,
        *,
        fusion: nn.Module,
        lr: float = 1e-4,
        anneal_steps: int | None = None,
    ) -> None:
        # By this name `create_model` finds the network in a run's checkpoint.
        super().__init__(
            {"fusion": colornet}, {"fusion": torch.optim.Adam(colornet.parameters(), lr=lr)}
        )
        self.colornet = colornet
        self.fusion = copy.deepcopy(fusion).requires_grad_(False).eval().to(self.device)
        self.lr, self.anneal_steps = lr, anneal_steps

    def prepare(self, accelerator: Accelerator) -> None:
        super().prepare(accelerator)
        self.fusion.to(accelerator.device, memory_format=torch.channels_last)

    def step(self, batch: dict) -> dict[str, float]:
        """One step on RGB `a`, `b` and `target`, (B, 3, H, W) each; the loss is `color`.

        Raises:
            ValueError: a picture without colour, or no target.
        """
        for key in ("a", "b", "target"):
            shape = tuple(batch[key].shape) if key in batch else "nothing"
            if key not in batch or shape[1] != 3:
                raise ValueError(f"{key!r} is {shape}; expected RGB pictures (B, 3, H, W)")
        if self.anneal_steps:
            self.set_lr({"fusion": self.lr * cosine(self.steps_taken / self.anneal_steps)})
        a, b, target = (batch[key].to(self.device) for key in ("a", "b", "target"))
        with torch.no_grad():
            fused = self.fusion(luminance(a), luminance(b))
        predicted = self.colornet(fused, chroma(a), chroma(b))
        loss = (predicted - chroma(target)).abs().mean()  # eq. 8
        self.update("fusion", torch.autograd.grad(loss, self.trained("fusion")))
        self.steps_taken += 1
        return {"color": loss.item()}
