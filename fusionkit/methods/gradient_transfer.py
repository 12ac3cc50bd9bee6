"""Sequential gradient transfer: multi-focus teaches multi-exposure, which teaches infrared-visible.

Source: Wang et al., A General Image Fusion Approach Exploiting Gradient Transfer Learning and
Fusion Rule Unfolding, section 3.1. Any network with `forward(a, b) -> fused` can be trained so; one
`GradientTransferMethod` is one of the three stages.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fusionkit.losses import (
    gradient_transfer_loss,
    maximum_losses,
    ssim,
    structure_loss,
)
from fusionkit.methods.base import Method, cosine
from fusionkit.names import check_name
from fusionkit.training import fit

FORMS = ("paper", "released")
# λ of equation 1 per task, as the release's scripts weigh it. They have no teacher for the first
# stage, mfif; in another order of the stages its loss is that of meif.
TRANSFER_WEIGHT = {"mfif": 0.5, "meif": 0.5, "ivif": 2.0}


class GradientTransferMethod(Method):
    """One stage: a reconstruction loss of its task, plus the edges of the stage before (eq. 1).

    The paper's sequence is `mfif` without a teacher, `meif` taught by it, and `ivif` taught by
    that one, from whose weights it also starts in the release. The paper gives no weight of any
    loss; the defaults are the release's, divided by the weight of the first term.

    Args:
        fusion: the fusion network, with the weights to start from.
        task: `mfif` or `meif`, whose batches need a "target" (equation 2), or `ivif` (equations 4
            to 7).
        teacher: the network of the stage before, whatever its task; a frozen copy is kept. None
            trains the task by itself, as the ablations of Tables 6 and 7 do.
        lr: Adam's learning rate; the release takes 1e-3 for the first stage, then 1e-4.
        anneal_steps: lower the learning rate to zero along half a cosine over so many steps; None
            keeps it. The release halves it two to four times.
        transfer_weight: λ of equation 1; by default 0.5, or 2 for `ivif`.
        texture_weight, structure_weight: β1 and β2 of equation 4.
        spread_weight: reward for the fused picture's standard deviation in `ivif`; by default
            none, as in the paper, and 2.5 in the released form.
        clip: largest L2 norm of the gradient; the release has 1e-4, and 1e-2 for `ivif`.
        warmup_steps: steps in which a network that offers `autoencode(a, b)` learns to return its
            sources through its features. The release has two epochs of them in the first stage,
            the paper none. Other networks have no such steps.
        form: "paper", or "released": the gradient transfer loss and the structure loss as
            `losses` tells, and borders padded with black.

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
        spread_weight: float | None = None,
        clip: float | None = None,
        warmup_steps: int = 0,
        form: str = "paper",
    ) -> None:
        check_name(task, TRANSFER_WEIGHT, "task")
        check_name(form, FORMS, "form")
        super().__init__(
            {"fusion": fusion}, {"fusion": torch.optim.Adam(fusion.parameters(), lr=lr)}
        )
        self.fusion, self.task, self.form = fusion, task, form
        # Outside `modules`: it is not trained, and the stage before has its checkpoint.
        self.teacher = None
        if teacher is not None:
            self.teacher = copy.deepcopy(teacher).requires_grad_(False).eval().to(self.device)
        self.lr, self.anneal_steps, self.clip = lr, anneal_steps, clip
        self.transfer_weight = TRANSFER_WEIGHT[task] if transfer_weight is None else transfer_weight
        self.texture_weight, self.structure_weight = texture_weight, structure_weight
        self.spread_weight = spread_weight
        if spread_weight is None:
            self.spread_weight = 2.5 if form == "released" else 0.0
        self.warmup_steps = warmup_steps if hasattr(fusion, "autoencode") else 0
        # The released structure loss weighs the sources by means over the whole batch.
        self.accumulates = form == "paper"

    def prepare(self, accelerator: Accelerator) -> None:
        super().prepare(accelerator)
        if self.teacher is not None:
            self.teacher.to(accelerator.device, memory_format=torch.channels_last)

    def step(self, batch: dict) -> dict[str, float]:
        """One step on `a`, `b`, and for `mfif` and `meif` `target`, (B, 1, H, W) each.

        Returns the weighted terms by name: `reconstruction` (eq. 2), or `intensity`, `texture`,
        `structure` (eq. 5 to 7) and `spread`; `transfer` (eq. 3); `autoencoder` in the warm-up.

        Raises:
            ValueError: no target for a task that needs one.
        """
        if self.anneal_steps:
            self.set_lr({"fusion": self.lr * cosine(self.steps_taken / self.anneal_steps)})
        a, b = batch["a"].to(self.device), batch["b"].to(self.device)
        if self.steps_taken < self.warmup_steps:
            a_hat, b_hat = self.fusion.autoencode(a, b)
            losses = {"autoencoder": F.l1_loss(a_hat, a) + F.l1_loss(b_hat, b)}
        else:
            losses = self.losses(a, b, batch.get("target"))
        # What has no part in a step, as all between encoder and decoder in the warm-up, has None.
        gradients = torch.autograd.grad(
            sum(losses.values()), self.trained("fusion"), allow_unused=True
        )
        self.update("fusion", gradients, self.clip)
        self.steps_taken += 1
        return {name: loss.item() for name, loss in losses.items()}

    def losses(
        self, a: torch.Tensor, b: torch.Tensor, target: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The weighted terms of equation 1 by name, as scalars; their sum is the loss.

        Raises:
            ValueError: no target for a task that needs one.
        """
        if self.task != "ivif" and target is None:
            raise ValueError(
                f"task {self.task!r} needs pairs with a 'target', the true fused picture; embedded "
                "and generated pairs have one"
            )
        fused, taught = self.fusion(a, b), None
        if self.teacher is not None and self.transfer_weight:
            with torch.no_grad():
                taught = self.teacher(a, b).to(a.dtype)
        # SSIM's variances are small differences: nothing for bf16.
        with torch.autocast(a.device.type, enabled=False):
            return self._terms(a, b, fused.to(a.dtype), taught, target)

    def _terms(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        fused: torch.Tensor,
        taught: torch.Tensor | None,
        target: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        released = self.form == "released"
        edges = "zeros" if released else "replicate"
        if self.task == "ivif":
            weighting, border = ("gradient", "zeros") if released else ("equal", "valid")
            intensity, texture = maximum_losses(a, b, fused, edges)  # eq. 5, eq. 6
            structure = structure_loss(a, b, fused, weighting, border)
            terms = {
                "intensity": intensity,
                "texture": self.texture_weight * texture,
                "structure": self.structure_weight * structure,  # eq. 7
            }
            if self.spread_weight:
                spread = fused.abs().std((-2, -1), correction=0).mean()
                terms["spread"] = -self.spread_weight * spread
        else:
            terms = {"reconstruction": 1 - ssim(fused, target.to(fused))}  # eq. 2
        if taught is not None:
            transfer = gradient_transfer_loss(taught, fused, self.form, edges)  # eq. 3
            terms["transfer"] = self.transfer_weight * transfer
        return terms


def train_stages(
    build: Callable[[], nn.Module],
    stages: Mapping[str, DataLoader],
    out_dir: str | os.PathLike,
    *,
    seed: int = 0,
    inherit: Collection[str] = ("ivif",),
    options: Mapping[str, object] | None = None,
    **fit_options,
) -> dict[str, nn.Module]:
    """Train a network a task, in the order of `stages`, each taught by the one before (Fig. 4).

    {"mfif": ..., "meif": ..., "ivif": ...} is the paper's sequence, another order one of its
    ablations, and a single task that task by itself. A run that was killed goes on where it was.

    Args:
        build: makes a new network; called with the seed set.
        stages: the loader of each task; a stage is one pass of it, with the learning rate falling
            to zero.
        out_dir: holds a folder a task, as `fit` writes it.
        inherit: tasks that start from their teacher's weights in place of new ones.
        options: of `GradientTransferMethod`, for all stages.
        fit_options: of `fit`.

    Returns:
        The trained network of each task.

    Raises:
        ValueError: as `GradientTransferMethod` and `fit`.
    """
    networks, teacher = {}, None
    for task, loader in stages.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fusion = build()
        if teacher is not None and task in inherit:
            fusion.load_state_dict(teacher.state_dict())
        settings = {"anneal_steps": len(loader), **(options or {})}
        method = GradientTransferMethod(fusion, task=task, teacher=teacher, **settings)
        fit(
            method,
            loader,
            steps=len(loader),
            out_dir=Path(out_dir) / task,
            seed=seed,
            **fit_options,
        )
        networks[task] = teacher = method.fusion
    return networks
