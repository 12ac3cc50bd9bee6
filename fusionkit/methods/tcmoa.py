"""TC-MoA's training: one network for three tasks, of which only a small part is trained.

Source: Zhu et al., Task-Customized Mixture of Adapters for General Image Fusion, CVPR 2024,
section 4.1, and its release. Any network with `forward(a, b) -> fused` can be trained with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fusionkit.methods.base import Method, decay_groups, warmup_cosine
from fusionkit.methods.tcmoa_losses import tcmoa_loss
from fusionkit.models.adapters import ROUTED_TASKS
from fusionkit.models.tcmoa import TCMoA, TCMoAOutput
from fusionkit.names import check_name


class TCMoAMethod(Method):
    """Joint training: each step updates the network once for every task, with the task's own loss.

    Trained is what requires a gradient, in `TCMoA` all but the masked autoencoder; after
    `requires_grad_(True)` the whole network is. The paper's ablations (Tables 4 and 5, Fig. 8) are
    `tasks` with one task, and the network's options `adapters=1, active=1`, `tuning`, `adapters`
    and `interval`. A network other than `TCMoA` is trained by the terms on pictures alone.

    With several processes, MEF-SSIM and load balancing see each process's share of a batch.

    Args:
        fusion: the fusion network.
        steps_per_epoch: steps that count as one epoch, such as the loader's length.
        epochs: after which the learning rate has reached `final_lr`; it stays there.
        warmup_epochs: at first the learning rate rises from 0 and all tasks are trained with the
            warm-up losses.
        tasks: what is trained, of `ivif`, `meif` and `mfif`, always in this order.
        lr: AdamW's largest learning rate; the release's setting, the paper has 1.5e-4.
        final_lr: its smallest, along half a cosine.
        weight_decay: not on biases, norms and λ.
        ema: decay of the exponential moving average of all that is trained, taken after each
            update; training itself does not use the average, `ema_network` does. Neither the paper
            nor what is known of its release says how often it is taken.
        mir_form, mef_scales: see `tcmoa_loss`.
        weights: for each task the weights of its loss terms after the warm-up; by default
            `tcmoa_losses.WEIGHTS`.

    Raises:
        ValueError: a setting is out of range or unknown; nothing in the network is trained.
    """

    def __init__(
        self,
        fusion: nn.Module,
        *,
        steps_per_epoch: int,
        epochs: int = 20,
        warmup_epochs: int = 2,
        tasks: Sequence[str] = ROUTED_TASKS,
        lr: float = 3e-4,
        final_lr: float = 1e-5,
        weight_decay: float = 0.05,
        ema: float = 0.99,
        mir_form: str = "released",
        mef_scales: int = 1,
        weights: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        for task in tasks:
            check_name(task, ROUTED_TASKS, "task")
        trained = [p for p in fusion.parameters() if p.requires_grad]
        latest = epochs - 1
        for name, good, expected in (
            (f"tasks are {list(tasks)}", len(tasks) > 0, "one or more"),
            (f"steps_per_epoch is {steps_per_epoch}", steps_per_epoch >= 1, "at least 1"),
            (f"warmup_epochs is {warmup_epochs}", 0 <= warmup_epochs <= latest, f"0 to {latest}"),
            (f"ema is {ema}", 0 <= ema < 1, "at least 0 and less than 1"),
            (f"{len(trained)} parameters require a gradient", len(trained) > 0, "some"),
        ):
            if not good:
                raise ValueError(f"{name}, expected {expected}")
        optimizer = torch.optim.AdamW(decay_groups(trained, weight_decay), lr=lr, betas=(0.9, 0.95))
        super().__init__({"fusion": fusion}, {"fusion": optimizer})
        self.fusion = fusion
        self.tasks = [task for task in ROUTED_TASKS if task in tasks]
        self.steps_per_epoch, self.epochs = steps_per_epoch, epochs
        self.warmup_epochs = warmup_epochs
        self.lr, self.final_lr, self.ema = lr, final_lr, ema
        self.loss_options = {"mir_form": mir_form, "mef_scales": mef_scales}
        self.weights = weights or {}
        self.average_weights: dict[str, torch.Tensor] = {}

    def step(self, batch: dict) -> dict[str, float]:
        """An update for each task on its part of the batch.

        Args:
            batch: for each task `{"a": ..., "b": ...}`, (B, 1 or 3, H, W) in [0, 1], as
                `datasets.TaskCrops` gives them.

        Returns:
            Each task's loss by its name, and the means over the tasks of the unweighted prompt and
            balance losses as "mir" and "balance".
        """
        self.fusion.train()  # the routers' noise
        if self.steps_taken == 0:
            self.average_weights = {n: p.detach().clone() for n, p in self._named_trained()}
        self.set_lr({"fusion": self.learning_rate()})
        report = dict.fromkeys([*self.tasks, "mir", "balance"], 0.0)
        for task in self.tasks:
            a, b = (batch[task][key].to(self.device) for key in ("a", "b"))
            loss, terms = self.loss(task, a, b)
            # Parts that this task does not use, such as a network's second head, get zeros.
            gradients = torch.autograd.grad(loss, self.trained("fusion"), materialize_grads=True)
            self.update("fusion", gradients)
            self._update_average()
            report[task] = loss.item()
            for name in ("mir", "balance"):
                report[name] += terms[name].item() / len(self.tasks)
        self.steps_taken += 1
        return report

    @property
    def epoch(self) -> int:
        return self.steps_taken // self.steps_per_epoch

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        warmup, steps = (n * self.steps_per_epoch for n in (self.warmup_epochs, self.epochs))
        share = warmup_cosine(self.steps_taken, warmup, steps)
        if self.steps_taken < warmup:
            return self.lr * share
        return self.final_lr + (self.lr - self.final_lr) * share

    def loss(
        self, task: str, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The task's loss at the present epoch, and its unweighted terms; see `tcmoa_loss`."""
        warmup = self.epoch < self.warmup_epochs
        weights = None if warmup else self.weights.get(task)
        return tcmoa_loss(
            task,
            a,
            b,
            self._output(task, a, b),
            epoch=self.epoch,
            warmup=warmup,
            weights=weights,
            **self.loss_options,
        )

    def _output(self, task: str, a: torch.Tensor, b: torch.Tensor) -> TCMoAOutput:
        if isinstance(self.fusion, TCMoA):
            return self.fusion.explain(a, b, task)
        none = {"encoder": (), "decoder": ()}
        return TCMoAOutput(self.fusion(a, b), none, none, torch.zeros((), device=a.device))

    def ema_network(self) -> nn.Module:
        """A copy of the network, in evaluation, with the moving averages as its weights."""
        network = copy.deepcopy(self.fusion).eval()
        network.load_state_dict(self.average_weights, strict=False)
        return network

    def _named_trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.fusion.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def _update_average(self) -> None:
        for name, parameter in self._named_trained():
            self.average_weights[name].lerp_(parameter, 1 - self.ema)

    def state_dict(self) -> dict:
        return super().state_dict() | {"average_weights": self.average_weights}

    def load_state_dict(self, state: dict) -> None:
        averages = state["average_weights"]
        expected = [name for name, _ in self._named_trained()]
        if averages and list(averages) != expected:
            raise ValueError(f"averages of {len(averages)} weights, {len(expected)} are trained")
        super().load_state_dict(state)
        self.average_weights = {n: t.to(self.device).clone() for n, t in averages.items()}
