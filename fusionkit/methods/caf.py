"""CAF's training method: the weights of the fusion loss are searched, guided by a task.

Source: Liu et al., Where Elegance Meets Precision (CAF), IJCAI 2024, sections 3.2 to 3.4. Any
network with `forward(a, b) -> fused` and any `PerceptionTask` will do. `a` is the infrared and `b`
the visible picture.

The whole of it is `CAFSearch`, whose `loss_weights()` then go to `WeightedLossTraining`, whose
network at last goes to `perception.TaskTraining`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from fusionkit.methods.base import Method
from fusionkit.methods.bilevel import directional_derivative, statistics_kept
from fusionkit.methods.caf_terms import (
    Features,
    fixed_terms,
    placed,
    searched_terms,
    term_names,
)
from fusionkit.methods.perception import (
    Size,
    halves,
    on_device,
    perceive,
    resize,
    trained_weights,
    weight_gradients,
)
from fusionkit.names import check_name
from fusionkit.tasks.base import PerceptionTask

PRODUCTS = ("finite_difference", "exact")


class LossWeights(nn.Module):
    """β: a softmax over one value for each loss term, uniform at the start."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((count,), 0.0125))  # the release's start

    def forward(self) -> torch.Tensor:
        return self.logits.softmax(0)


class CAFSearch(Method):
    """The bilevel search for β (equation 2, Algorithm 1).

    A step takes the batch's even items for training and its odd ones for validation. The task T
    learns on the fused training pictures, the fusion network F learns by the weighted loss, and β
    learns from T's loss on what F would fuse for the validation pictures after one virtual step.

    Batch norm: all passes, virtual and perturbed ones included, use the batch's own statistics, as
    in training. The running statistics of F and T follow one pass a step each, that in which F or T
    learns; in the release all passes move them.

    Args:
        fusion: the fusion network F.
        task: the task network T and its loss.
        features, detached: as in `caf_terms.searched_terms`. Without features 13 terms are
            searched. With `detached` the finite difference still sees the perceptual terms'
            values change with F's weights, and gives them a gradient that no step of F obeys; the
            exact product is that of the step.
        lr: learning rate of F: Adam's, as the paper's training has it, or with `momentum` that of
            stochastic gradient descent. No learning rate of the search but β's is published.
        momentum: None trains F by Adam.
        weight_decay: of F.
        inner_lr: η, the size of the virtual step; plain gradient descent, with weight decay, and
            momentum if there is any. None is the learning rate of F.
        task_lr: Adam's learning rate of T.
        weights_lr: Adam's learning rate of β.
        decay: what `weights_lr` is multiplied by after each update of β; the paper says only "step
            decay at a rate of 0.998".
        warmup_steps: steps in which F and T learn, but β does not; the paper has none.
        product: "finite_difference" is equation 3; "exact" is the product that it approximates, at
            a similar cost. They differ by what crosses a kink of an L1 term or of a ReLU within ±δ:
            on pictures of 64×64 a few thousandths with a smooth network, a few percent with CAF's.
        radius: R; δ of equation 3 is R divided by the norm of the gradient by F's weights.
        task_size: (height, width) at which the task sees pictures; None keeps the batch's.

    Attributes:
        names: of the searched terms, in the order of β.
        history: β at the start and after each step, a list each; a checkpoint holds it.

    Raises:
        ValueError: `product` is unknown, or the radius is not positive.
    """

    def __init__(
        self,
        fusion: nn.Module,
        task: PerceptionTask,
        *,
        features: Features | None = None,
        detached: bool = False,
        lr: float = 1e-4,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        inner_lr: float | None = None,
        task_lr: float = 1e-4,
        weights_lr: float = 5e-2,
        decay: float = 0.998,
        warmup_steps: int = 0,
        product: str = "finite_difference",
        radius: float = 0.01,
        task_size: Size | None = None,
    ) -> None:
        check_name(product, PRODUCTS, "product")
        if not radius > 0:
            raise ValueError(f"radius is {radius}, expected a positive number")
        self.fusion, self.task = fusion, task
        self.names = term_names(features)
        self.weights = LossWeights(len(self.names)).to(next(fusion.parameters()))
        if momentum is None:
            descent = torch.optim.Adam(fusion.parameters(), lr=lr, weight_decay=weight_decay)
        else:
            descent = torch.optim.SGD(
                fusion.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
            )
        super().__init__(
            {"fusion": fusion, "task": task, "weights": self.weights},
            {
                "fusion": descent,
                "task": torch.optim.Adam(task.parameters(), lr=task_lr),
                "weights": torch.optim.Adam(self.weights.parameters(), lr=weights_lr),
            },
        )
        self.features, self.detached = features, detached
        self.momentum, self.weight_decay = momentum or 0.0, weight_decay
        self.inner_lr = lr if inner_lr is None else inner_lr
        self.weights_lr, self.decay, self.warmup_steps = weights_lr, decay, warmup_steps
        self.product, self.radius, self.task_size = product, radius, task_size
        self.history = [self.weights().tolist()]

    def loss_weights(self) -> dict[str, float]:
        """β as it is now: the weight of each searched term by its name; they sum to 1."""
        return dict(zip(self.names, self.weights().tolist(), strict=True))

    def step(self, batch: dict) -> dict[str, float]:
        """One round of Algorithm 1: an update of T, one of F, and after the warm-up one of β.

        Args:
            batch: `a` and `b`, (B, 1, H, W) in [0, 1], and the entries of `task.keys`, as labelled
                data sets give them; with `cbcr` in it the task sees colour.

        Returns:
            `task` and `fusion`, the training losses before the step, and `validation`, the task's
            loss after the virtual step.
        """
        self.modules.train()
        train, validation = halves(on_device(batch, self.device))
        fused = self.fusion(train["a"], train["b"])
        loss_t = self.task(*perceive(fused.detach(), train, self.task_size))
        self.update("task", weight_gradients(loss_t, self.trained("task")))
        loss_f = self.fusion_loss(train, fused)
        self.update("fusion", weight_gradients(loss_f, self.trained("fusion")))
        losses = {"task": loss_t.item(), "fusion": loss_f.item()}
        if self.steps_taken >= self.warmup_steps:
            updates = self.steps_taken - self.warmup_steps
            self.set_lr({"weights": self.weights_lr * self.decay**updates})
            gradient, losses["validation"] = self.weights_gradient(train, validation)
            self.update("weights", [gradient])
        self.history.append(self.weights().tolist())
        self.steps_taken += 1
        return losses

    def state_dict(self) -> dict:
        return super().state_dict() | {"history": list(self.history)}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.history = list(state["history"])

    def fusion_loss(self, batch: dict, fused: torch.Tensor) -> torch.Tensor:
        """L^f: the terms weighted by β, and those that are not searched."""
        weights = self.weights().detach()
        searched = (weights * torch.stack(self.terms(batch, fused))).sum()
        return searched + fixed_terms(batch["a"], batch["b"], fused)

    def terms(self, batch: dict, fused: torch.Tensor) -> list[torch.Tensor]:
        """The searched terms, in the order of β."""
        features = placed(self.features, fused)
        found = searched_terms(batch["a"], batch["b"], fused, features, self.detached)
        return [found[name] for name in self.names]

    def weights_gradient(self, train: dict, validation: dict) -> tuple[torch.Tensor, float]:
        """The gradient of the validation loss by β's logits (this process's share), and the loss.

        Without the direct term, which is zero: T's loss does not see β but through F's weights.
        """
        with statistics_kept(self.fusion, self.task):
            theta = trained_weights(self.fusion)
            stepped = self.virtual_step(theta, train)
            sources = (resize(validation[key], self.task_size) for key in ("a", "b"))
            fused = functional_call(self.fusion, stepped, tuple(sources))
            loss = self.task(*perceive(fused, validation, self.task_size))
            v = self.average(weight_gradients(loss, list(stepped.values())))
            theta = {name: t.detach() for name, t in theta.items()}
            if self.product == "exact":
                slopes = self._exact_slopes(theta, v, train)
            else:
                slopes = self._difference_slopes(theta, v, train)
        # The terms do not know β, so ∇²_{β,ω} L v is the softmax's Jacobian times their slopes.
        (product,) = torch.autograd.grad(self.weights(), self.weights.logits, slopes)
        return -self.inner_lr * product, loss.item()

    def virtual_step(self, theta: dict[str, torch.Tensor], train: dict) -> dict[str, torch.Tensor]:
        """ω' = ω - η (momentum · buffer + ∇L^f + decay · ω), as new leaves."""
        fused = functional_call(self.fusion, theta, (train["a"], train["b"]))
        loss = self.fusion_loss(train, fused)
        gradients = self.average(weight_gradients(loss, list(theta.values())))
        stepped = {}
        for (name, weight), gradient, parameter in zip(
            theta.items(), gradients, self.trained("fusion"), strict=True
        ):
            descent = gradient + self.weight_decay * weight.detach()
            buffer = self.optimizers["fusion"].state[parameter].get("momentum_buffer")
            if buffer is not None:
                descent = descent + self.momentum * buffer
            stepped[name] = (weight.detach() - self.inner_lr * descent).requires_grad_()
        return stepped

    def _difference_slopes(
        self, theta: dict[str, torch.Tensor], v: list[torch.Tensor], train: dict
    ) -> torch.Tensor:
        """Each term's slope along v, by the central difference of equation 3."""
        norm = torch.stack([each.norm() for each in v]).norm()
        if norm == 0:  # the task found nothing to learn, such as no box at all
            return torch.zeros_like(self.weights.logits)
        delta, values = self.radius / norm, []
        for sign in (1, -1):
            moved = {
                name: t + sign * delta * each
                for (name, t), each in zip(theta.items(), v, strict=True)
            }
            with torch.no_grad():
                fused = functional_call(self.fusion, moved, (train["a"], train["b"]))
                values.append(torch.stack(self.terms(train, fused)))
        return (values[0] - values[1]) / (2 * delta)

    def _exact_slopes(
        self, theta: dict[str, torch.Tensor], v: list[torch.Tensor], train: dict
    ) -> torch.Tensor:
        """Each term's slope along v: its gradient by the picture times the picture's slope.

        One forward-mode pass through F, and a backward pass for each term, but not through F.
        """

        def fuse(*weights: torch.Tensor) -> torch.Tensor:
            named = dict(zip(theta, weights, strict=True))
            return functional_call(self.fusion, named, (train["a"], train["b"]))

        fused, slope = directional_derivative(fuse, list(theta.values()), v)
        fused.requires_grad_()
        slopes = [
            (weight_gradients(term, [fused], retain_graph=True)[0] * slope).sum()
            for term in self.terms(train, fused)
        ]
        return torch.stack(slopes)
