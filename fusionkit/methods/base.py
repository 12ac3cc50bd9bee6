"""What every training method shares: its networks, its optimisers, and averages over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from fusionkit.batches import parts_of


def cosine(fraction: float) -> float:
    """Half a cosine from 1 (fraction 0) to 0 (fraction 1 and beyond)."""
    return 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))


def warmup_cosine(step: int, warmup: int, steps: int) -> float:
    """A straight line up to 1 over `warmup` steps, then half a cosine to 0 at step `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return cosine((step - warmup) / max(steps - warmup, 1))


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Two groups for an optimiser: weight decay on matrices, none on biases, norms and scalars."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


class _Part(NamedTuple):
    """A part of a batch: its share of the items, and the gradients of those before it."""

    share: float
    last: bool
    sums: dict[str, list[torch.Tensor | None]]

    def add(self, name: str, gradients: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The shares of the parts up to this one, added up; None where no part has a gradient."""
        new = [None if g is None else self.share * g for g in gradients]
        if old := self.sums.get(name):
            pairs = zip(old, new, strict=True)
            new = [p if q is None else q if p is None else p + q for p, q in pairs]
        self.sums[name] = new
        return new


class Method:
    """A way to train a fusion network; `training.fit` drives it.

    A subclass registers its networks and optimisers by name and implements `step`.
    Gradients are taken with `torch.autograd.grad` and averaged over processes here, rather than
    by a wrapped module, since meta-learning differentiates through weights that no module holds.

    Attributes:
        modules: every network that is trained, by name; the fusion network is `fusion`.
        optimizers: one optimiser a name.
        steps_taken: calls of `step` that were finished, counted by the subclass.
        accumulates: whether `step` is one update by the mean of a loss over the batch's items, so
            that the gradients of parts of a batch may be added up.
    """

    accumulates = False

    def __init__(
        self, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
    ) -> None:
        self.modules = nn.ModuleDict(modules)
        self.optimizers = optimizers
        self.steps_taken = 0
        self.accelerator: Accelerator | None = None
        self._part: _Part | None = None

    def step(self, batch: dict) -> dict[str, float]:
        """One training step on `batch` (keys `a`, `b`: (B, 1, H, W) in [0, 1]); named losses."""
        raise TypeError(f"{type(self).__name__} defines no step")

    def step_in_parts(self, batch: dict, parts: int) -> dict[str, float]:
        """`step`, with the batch going through in `parts` parts one after the other.

        One update by the mean gradient over all items; the losses are means likewise.

        Raises:
            ValueError: more than one part, and the method does not accumulate.
        """
        if parts == 1:
            return self.step(batch)
        self.check_accumulates()
        taken, gradients, report = self.steps_taken, {}, {}
        pieces = parts_of(batch, parts)
        try:
            for i, (piece, share) in enumerate(pieces):
                self.steps_taken = taken
                self._part = _Part(share, i == len(pieces) - 1, gradients)
                for name, value in self.step(piece).items():
                    report[name] = report.get(name, 0.0) + share * value
        finally:
            self._part = None
        return report

    def check_accumulates(self) -> None:
        """Raise a ValueError if gradients of parts of a batch must not be added up."""
        if not self.accumulates:
            raise ValueError(
                f"{type(self).__name__} does not accumulate gradients: its step is not one update "
                "by a mean over the batch; expected accumulate=1"
            )

    @property
    def device(self) -> torch.device:
        return next(self.modules.parameters()).device

    def trained(self, name: str) -> list[nn.Parameter]:
        """The parameters of a module that are not frozen."""
        return [p for p in self.modules[name].parameters() if p.requires_grad]

    def prepare(self, accelerator: Accelerator) -> None:
        """Move the networks to the accelerator's device, and average gradients with it.

        Every process starts from the weights of process 0, however it drew its own.
        """
        self.accelerator = accelerator
        # Channels last: three times the speed of Restormer blocks on a CPU, at equal results.
        self.modules.to(accelerator.device, memory_format=torch.channels_last)
        if accelerator.num_processes > 1:
            for tensor in self.modules.state_dict().values():  # shares memory with the modules
                tensor.copy_(broadcast(tensor))
        for optimizer in self.optimizers.values():  # a resumed optimiser's moments move along
            optimizer.load_state_dict(optimizer.state_dict())

    def average(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The mean over all processes of each tensor; themselves with one process."""
        tensors = list(tensors)
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return tensors
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])  # one message, not hundreds
        flat = self.accelerator.reduce(flat, reduction="mean")
        sizes = [t.numel() for t in tensors]
        return [part.view_as(t) for part, t in zip(flat.split(sizes), tensors, strict=True)]

    def update(
        self,
        name: str,
        gradients: Iterable[torch.Tensor | None],
        clip: float | None = None,
    ) -> None:
        """One step of the optimiser `name` with these gradients, averaged over processes.

        One gradient for each of `trained(name)`; where it is None, the parameter stays as it is.
        `clip` is the largest L2 norm of the averaged gradient, over all parameters together.
        """
        parameters = self.trained(name)
        if self._part is not None:
            gradients = self._part.add(name, gradients)
            if not self._part.last:
                return
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        averaged = self.average([gradient for _, gradient in pairs])
        for (parameter, _), gradient in zip(pairs, averaged, strict=True):
            parameter.grad = gradient
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)

    def set_lr(self, rates: dict[str, float]) -> None:
        """Give each optimiser that `rates` names its learning rate."""
        for name, rate in rates.items():
            for group in self.optimizers[name].param_groups:
                group["lr"] = rate

    def state_dict(self) -> dict:
        """Everything that the next step depends on, apart from the random state."""
        return {
            "modules": self.modules.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "steps_taken": self.steps_taken,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a `state_dict`; strict, so a checkpoint of another network is an error."""
        self.modules.load_state_dict(state["modules"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.steps_taken = state["steps_taken"]
