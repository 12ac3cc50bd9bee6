"""ReFusion's training method: a fusion loss proposed by a network, meta-learned by reconstruction.

Source: Bai et al., ReFusion, IJCV 2024, section 3 and Algorithm 1. Any network with
`forward(a, b) -> fused` can be trained with it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call, jvp

from fusionkit.losses import reconstruction_loss, sobel, weighted_fusion_loss
from fusionkit.methods.base import Method, cosine
from fusionkit.methods.bilevel import directional_derivative
from fusionkit.models.refusion import LossProposal, Reconstruction
from fusionkit.names import check_name

META_GRADIENTS = ("exact", "first_order")


class ReFusionMethod(Method):
    """Alternates meta steps, which teach P, with fusion steps, which train F and R.

    Args:
        fusion: the fusion network F.
        lr: Adam's learning rate for F and R.
        proposal_lr: Adam's learning rate for P; by default `lr`, as in the paper.
        anneal_steps: lower the learning rates to zero along half a cosine over so many steps; None
            keeps them constant, as the paper does over its 111,100 steps.
        inner_lr: step size η of the inner updates, plain gradient descent; it stays as it is when
            the learning rates are annealed. The paper gives none; None takes `lr`, as TDFusion's
            release does.
        alpha1, alpha2: weights of the gradient terms in L_f (equation 1) and L_r (equation 4).
        warmup_steps: fusion steps before the first meta step. R's opinion is worth something only
            once R has seen fused pictures; the paper has none.
        meta_steps, fusion_steps: M and N of Algorithm 1, one after the other, over and over.
        meta_gradient: "exact" is equation 10. "first_order" lets the fused picture itself take the
            inner step, in place of the weights: no second derivative of F is needed, and the
            direction is another one.
        learned: False fixes W and V at 1/2 (row I of the paper's Table 4), without meta steps.
        proposal, reconstruction: P and R; the defaults are those of `models.refusion`.

    Raises:
        ValueError: `meta_gradient` is unknown.
    """

    def __init__(
        self,
        fusion: nn.Module,
        *,
        lr: float = 1e-4,
        proposal_lr: float | None = None,
        anneal_steps: int | None = None,
        inner_lr: float | None = None,
        alpha1: float = 1.0,
        alpha2: float = 1.0,
        warmup_steps: int = 0,
        meta_steps: int = 600,
        fusion_steps: int = 1622,
        meta_gradient: str = "exact",
        learned: bool = True,
        proposal: nn.Module | None = None,
        reconstruction: nn.Module | None = None,
    ) -> None:
        check_name(meta_gradient, META_GRADIENTS, "meta_gradient")
        self.fusion = fusion
        self.proposal = proposal or LossProposal()
        self.reconstruction = reconstruction or Reconstruction()
        modules = {
            "fusion": fusion,
            "proposal": self.proposal,
            "reconstruction": self.reconstruction,
        }
        proposal_lr = lr if proposal_lr is None else proposal_lr
        rates = {"fusion": lr, "reconstruction": lr, "proposal": proposal_lr}
        super().__init__(
            modules, {n: torch.optim.Adam(m.parameters(), lr=rates[n]) for n, m in modules.items()}
        )
        self.rates, self.anneal_steps = rates, anneal_steps
        self.inner_lr = lr if inner_lr is None else inner_lr
        self.alpha1, self.alpha2 = alpha1, alpha2
        self.warmup_steps = warmup_steps
        self.meta_steps, self.fusion_steps = meta_steps if learned else 0, fusion_steps
        self.meta_gradient, self.learned = meta_gradient, learned

    def step(self, batch: dict) -> dict[str, float]:
        """A meta step or a fusion step, by Algorithm 1's alternation.

        In a meta step the batch's even items are the meta-training set and its odd items the
        meta-test set, so a pair is never on both sides, and slices of a batch split alike.
        """
        a, b = batch["a"].to(self.device), batch["b"].to(self.device)
        if self.anneal_steps:
            factor = cosine(self.steps_taken / self.anneal_steps)
            self.set_lr({name: rate * factor for name, rate in self.rates.items()})
        position = (self.steps_taken - self.warmup_steps) % (self.meta_steps + self.fusion_steps)
        if self.steps_taken >= self.warmup_steps and position < self.meta_steps:
            losses = self.meta_step((a[::2], b[::2]), (a[1::2], b[1::2]))
        else:
            losses = self.fusion_step(a, b)
        self.steps_taken += 1
        return losses

    def weights(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W and V which P proposes for this pair, (B, 2, H, W) each."""
        if not self.learned:
            half = torch.full_like(torch.cat([a, b], dim=1), 0.5)
            return half, half
        return self.proposal(a, b, sobel(a), sobel(b))

    def meta_step(self, meta_train: tuple, meta_test: tuple) -> dict[str, float]:
        """One inner and one outer update: P moves, F and R stay (equations 7 to 10)."""
        gradient, losses = self.meta_gradients(meta_train, meta_test)
        self.update("proposal", gradient)  # eq. 9
        return losses

    def meta_gradients(
        self, meta_train: tuple, meta_test: tuple
    ) -> tuple[list[torch.Tensor], dict[str, float]]:
        """∂L_r/∂θ_P on the meta-test pairs (this process's share), and the step's losses."""
        if len(meta_test[0]) == 0:
            raise ValueError(
                "a meta step needs two pairs or more in each process's share of a batch"
            )
        if self.meta_gradient == "first_order":
            return self._first_order_gradients(meta_train, meta_test)
        a, b = meta_train
        theta_f = {n: p.detach().requires_grad_() for n, p in self.fusion.named_parameters()}
        weights = self.weights(a, b)
        fused = functional_call(self.fusion, theta_f, (a, b))
        loss_f = weighted_fusion_loss(a, b, fused, *(w.detach() for w in weights), self.alpha1)
        inner = self.average(torch.autograd.grad(loss_f, list(theta_f.values())))
        theta_f_stepped = {  # eq. 7
            name: (theta - self.inner_lr * g).detach().requires_grad_()
            for (name, theta), g in zip(theta_f.items(), inner, strict=True)
        }
        theta_r_stepped, loss_r = self._inner_reconstruction(a, b, fused.detach())  # eq. 8

        a_test, b_test = meta_test
        fused_test = functional_call(self.fusion, theta_f_stepped, (a_test, b_test))
        a_hat, b_hat = functional_call(self.reconstruction, theta_r_stepped, (fused_test,))
        outer = reconstruction_loss(a_test, b_test, a_hat, b_hat, self.alpha2)
        # Eq. 10: v = ∂L_r/∂θ_F' times -η ∂²L_f/∂θ_F ∂θ_P. L_f sees θ_F through the picture alone,
        # so the product is the derivative by θ_P of L_f's slope along v: one forward-mode pass
        # through F, in place of a second backward pass through its first.
        v = self.average(torch.autograd.grad(outer, list(theta_f_stepped.values())))
        fused, fused_slope = directional_derivative(
            lambda *theta: functional_call(
                self.fusion, dict(zip(theta_f, theta, strict=True)), (a, b)
            ),
            list(theta_f.values()),
            v,
        )
        _, slope = jvp(
            lambda f: weighted_fusion_loss(a, b, f, *weights, self.alpha1), (fused,), (fused_slope,)
        )
        gradient = torch.autograd.grad(-self.inner_lr * slope, list(self.proposal.parameters()))
        return list(gradient), _floats(fusion=loss_f, reconstruction=loss_r, meta=outer)

    def _first_order_gradients(
        self, meta_train: tuple, meta_test: tuple
    ) -> tuple[list[torch.Tensor], dict[str, float]]:
        with torch.no_grad():
            fused = self.fusion(*meta_train)
        theta_r, loss_r = self._inner_reconstruction(*meta_train, fused)
        a, b = meta_test
        fused = self.fusion(a, b).detach().requires_grad_()
        loss_f = weighted_fusion_loss(a, b, fused, *self.weights(a, b), self.alpha1)
        (inner,) = torch.autograd.grad(loss_f, fused, create_graph=True)
        stepped = fused - self.inner_lr * inner * fused.numel()  # each pixel's own gradient
        a_hat, b_hat = functional_call(self.reconstruction, theta_r, (stepped,))
        outer = reconstruction_loss(a, b, a_hat, b_hat, self.alpha2)
        gradient = torch.autograd.grad(outer, list(self.proposal.parameters()))
        return list(gradient), _floats(fusion=loss_f, reconstruction=loss_r, meta=outer)

    def _inner_reconstruction(
        self, a: torch.Tensor, b: torch.Tensor, fused: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        theta = dict(self.reconstruction.named_parameters())
        loss = reconstruction_loss(a, b, *self.reconstruction(fused), self.alpha2)
        gradients = self.average(torch.autograd.grad(loss, list(theta.values())))
        stepped = (
            t.detach() - self.inner_lr * g for t, g in zip(theta.values(), gradients, strict=True)
        )
        return dict(zip(theta, stepped, strict=True)), loss

    def fusion_step(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
        """One update of F by L_f and of R by L_r; P stays, and L_r never reaches F (eq. 11, 12)."""
        fused = self.fusion(a, b)
        with torch.no_grad():
            weights = self.weights(a, b)
        loss_f = weighted_fusion_loss(a, b, fused, *weights, self.alpha1)
        self.update("fusion", torch.autograd.grad(loss_f, list(self.fusion.parameters())))
        loss_r = reconstruction_loss(a, b, *self.reconstruction(fused.detach()), self.alpha2)
        self.update(
            "reconstruction", torch.autograd.grad(loss_r, list(self.reconstruction.parameters()))
        )
        return _floats(fusion=loss_f, reconstruction=loss_r)


def _floats(**losses: torch.Tensor) -> dict[str, float]:
    return {name: loss.item() for name, loss in losses.items()}
