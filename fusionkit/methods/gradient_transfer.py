"""Sequential gradient transfer: multi-focus teaches multi-exposure, which teaches infrared-visible.

Source: Wang et al., A General Image Fusion Approach Exploiting Gradient Transfer Learning and
Fusion Rule Unfolding, section 3.1. Any network with `forward(a, b) -> fused` can be trained so; one
`GradientTransferMethod` is one of the three stages.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from fusionkit.losses import (
    gradient_transfer_loss,
    maximum_gradient_loss,
    maximum_intensity_loss,
    ssim,
    structure_loss,
)
from fusionkit.methods.base import Method, cosine
from fusionkit.names import check_name

STAGES = ("mfif", "meif", "ivif")
# λ of equation 1, as the release's scripts weigh it against the reconstruction loss.
TRANSFER_WEIGHT = {"mfif": 0.0, "meif": 0.5, "ivif": 2.0}


class GradientTransferMethod(Method):
    """One stage: a reconstruction loss of its task, plus the edges of the stage before (eq. 1).

    Args:
        fusion: the fusion network.
        task: `mfif` or `meif`, whose batches need a "target" (equation 2), or `ivif` (equations 4
            to 7).
        teacher: the network of the stage before; a frozen copy is kept. None trains the task by
            itself, as the ablations of Tables 6 and 7 do. The order of the stages is free.
        lr: Adam's learning rate; the release takes 1e-3 for the first stage, then 1e-4.
        anneal_steps: lower the learning rate to zero along half a cosine over so many steps; None
            keeps it.
        transfer_weight: λ of equation 1; by default the release's, 0.5 for `meif` and 2 for
            `ivif`.
        texture_weight, structure_weight: β1 and β2 of equation 4; the release's by default.
        spread_weight: reward for the fused picture's standard deviation in `ivif`. The release has
            2.5, the paper none.
        clip: largest norm of the gradient; the release has 1e-4 (`mfif`, `meif`) and 1e-2.
        warmup_steps: steps in which the network only learns to return its sources through its
            features, if it offers `autoencode(a, b)`. The release has two epochs of it in the
            first stage, the paper none.
        form: of the gradient transfer loss and the structure loss; "paper", or "released" as
            `losses` tells.

    Raises:
        ValueError: unknown task or form.
    """

    def __init__(
        self,
        fusion: nn.Module,
        *,
        task: str,
        teacher: nn.Module | None = None,
        lr: float = 1e-4,
        anneal_steps: int | None = None,
        transfer_weight: float | None = None,
        texture_weight: float = 5.0,
        structure_weight: float = 2.5,
        spread_weight: float = 0.0,
        clip: float | None = None,
        warmup_steps: int = 0,
        form: str = "paper",
    ) -> None:
        check_name(task, STAGES, "task")
        check_name(form, ("paper", "released"), "form")
        super().__init__(
            {"fusion": fusion}, {"fusion": torch.optim.Adam(fusion.parameters(), lr=lr)}
        )
        self.fusion, self.task, self.form = fusion, task, form
        # Outside `modules`: it is not trained, and the stage before has its checkpoint.
        self.teacher = None if teacher is None else copy.deepcopy(teacher).requires_grad_(False)
        self.lr, self.anneal_steps, self.clip = lr, anneal_steps, clip
        weight = TRANSFER_WEIGHT[task] if transfer_weight is None else transfer_weight
        self.transfer_weight = weight if teacher is not None else 0.0
        self.texture_weight, self.structure_weight = texture_weight, structure_weight
        self.spread_weight, self.warmup_steps = spread_weight, warmup_steps

    def step(self, batch: dict) -> dict[str, float]:
        """One step on `a`, `b`, and for `mfif` and `meif` `target`, (B, 1, H, W) each."""
        if self.anneal_steps:
            self.set_lr({"fusion": self.lr * cosine(self.steps_taken / self.anneal_steps)})
        a, b = batch["a"].to(self.device), batch["b"].to(self.device)
        if self.steps_taken < self.warmup_steps and hasattr(self.fusion, "autoencode"):
            a_hat, b_hat = self.fusion.autoencode(a, b)
            losses = {"autoencoder": F.l1_loss(a_hat, a) + F.l1_loss(b_hat, b)}
        else:
            losses = self.losses(a, b, batch.get("target"))
        total = sum(losses.values())
        parameters = list(self.fusion.parameters())
        # A part that takes no part in this step, such as the decoder's way past the masks.
        gradients = torch.autograd.grad(total, parameters, materialize_grads=True)
        if self.clip is not None:
            norm = torch.stack([g.norm() for g in gradients]).norm()
            scale = (self.clip / (norm + 1e-6)).clamp_max(1)
            gradients = [g * scale for g in gradients]
        self.update("fusion", gradients)
        self.steps_taken += 1
        return {name: loss.item() for name, loss in losses.items()}

    def losses(
        self, a: torch.Tensor, b: torch.Tensor, target: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The weighted terms of equation 1 by name; their sum is the loss.

        Raises:
            ValueError: no target for a task that needs one.
        """
        fused = self.fusion(a, b)
        if self.task == "ivif":
            terms = self._unsupervised(a, b, fused)
        elif target is None:
            raise ValueError(
                f"task {self.task!r} needs pairs with a 'target', the true fused picture; "
                "the embedded pairs have one"
            )
        else:
            terms = {"reconstruction": 1 - ssim(fused, target.to(fused.device))}  # eq. 2
        if self.transfer_weight:
            with torch.no_grad():
                taught = self.teacher.to(a.device)(a, b)
            transfer = gradient_transfer_loss(taught, fused, self.form)  # eq. 3
            terms["transfer"] = self.transfer_weight * transfer
        return terms

    def _unsupervised(
        self, a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        weighting = "equal" if self.form == "paper" else "gradient"
        terms = {
            "intensity": maximum_intensity_loss(a, b, fused),  # eq. 5
            "texture": self.texture_weight * maximum_gradient_loss(a, b, fused),  # eq. 6
            "structure": self.structure_weight * structure_loss(a, b, fused, weighting),  # eq. 7
        }
        if self.spread_weight:
            spread = fused.std((-2, -1), correction=0).mean()
            terms["spread"] = -self.spread_weight * spread
        return terms
