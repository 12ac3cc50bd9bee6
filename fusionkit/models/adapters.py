"""The TC-MoA layer: a router for each task, a shared bank of adapters, prompt-driven fusion.

Tokens of both sources are grids (B, h, w, C). Source: Zhu et al., Task-Customized Mixture of
Adapters for General Image Fusion, CVPR 2024 (equations 2 to 6 and 8); routers after Shazeer et al.,
Outrageously Large Neural Networks, ICLR 2017.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fusionkit.models.blocks import conv1x1, conv3x3
from fusionkit.names import TASKS, check_name

# The order of the routers in the authors' files, where they are VIF, MEF and MFF.
ROUTED_TASKS = ("ivif", "meif", "mfif")
BALANCE_WEIGHT = 1e-3
SMALLEST_SHARE = 1e-4

RouterMix = Mapping[str, float]


def router_mix(task: str | RouterMix) -> dict[str, float]:
    """A task, or weights of tasks, as weights of the routers there are.

    Raises:
        ValueError: an unknown task; weights that are negative or do not sum to one.
    """
    weights = {task: 1.0} if isinstance(task, str) else dict(task)
    mix: dict[str, float] = {}
    for name, weight in weights.items():
        check_name(name, TASKS, "task")
        if not weight >= 0:
            raise ValueError(f"router weight of {name} is {weight}; expected 0 or more")
        router = "ivif" if name == "mif" else name
        mix[router] = mix.get(router, 0.0) + weight
    if not math.isclose(total := sum(mix.values()), 1.0, abs_tol=1e-6):
        raise ValueError(f"router weights {weights} sum to {total:g}; expected 1")
    return {name: weight for name, weight in mix.items() if weight > 0}


@dataclass(frozen=True)
class PromptControl:
    """The paper's equation 8, which steers the fusion by its prompts.

    prompt'_a = μ + α (prompt_a - μ) + β and prompt'_b = μ + α (prompt_b - μ) - β. A larger α makes
    each token favour one source more; β > 0 leans to source a everywhere, β < 0 to b. α = 1 and
    β = 0 change nothing. Results may leave (0, 1); the paper does not clip them.
    """

    alpha: float = 1.0
    beta: float = 0.0
    mu: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value):
                raise ValueError(f"prompt control {name} is {value}; expected a finite number")

    def __call__(self, prompts: torch.Tensor) -> torch.Tensor:
        """Prompts (..., 2) for a and b -> the same shape."""
        # Multiplied out, so that α = 1 and β = 0 give the prompts to the last bit.
        a, b = (self.alpha * prompts + (1 - self.alpha) * self.mu).unbind(-1)
        return torch.stack([a + self.beta, b - self.beta], dim=-1)


class Adapter(nn.Sequential):
    """A bottleneck: linear dim -> hidden, ReLU, linear hidden -> dim."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))


class Routing(NamedTuple):
    """Shares of the adapters (..., N), which sum to one, and the load-balancing loss."""

    gates: torch.Tensor
    auxiliary: torch.Tensor


def noisy_top_k(
    logits: torch.Tensor,
    k: int,
    scale: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 3: the softmax over the k largest of N logits, zero elsewhere.

    Args:
        logits: (..., N), without noise.
        k: how many shares are not zero.
        scale, noise: standard deviation and standard normal draws, (..., N) each; in training.

    Returns:
        gates: (..., N).
        load: (N,), how many tokens go to each adapter: a count without noise; with noise the
            expected number, Σ P(the logit would be among the k largest under another draw of its
            own noise), which has a gradient.
    """
    noisy = logits if noise is None else logits + scale * noise
    highest, indices = noisy.topk(min(k + 1, logits.shape[-1]), dim=-1)
    chosen = torch.zeros_like(noisy).scatter(-1, indices[..., :k], 1.0)
    gates = noisy.masked_fill(chosen == 0, -torch.inf).softmax(dim=-1)
    if noise is None or k >= logits.shape[-1]:
        return gates, (gates > 0).flatten(0, -2).sum(0).to(gates.dtype)
    # To be among the k largest, a logit must beat the k-th largest of the others.
    kth, next_one = highest[..., k - 1 : k], highest[..., k : k + 1]
    threshold = torch.where(noisy > next_one, next_one, kth)
    probability = torch.special.ndtr((logits - threshold) / scale)
    return gates, probability.flatten(0, -2).sum(0)


def squared_variation(x: torch.Tensor) -> torch.Tensor:
    """The squared coefficient of variation of (N,), unbiased; 0 for a single value."""
    if len(x) == 1:
        return torch.zeros_like(x[0])
    return x.var() / (x.mean().square() + 1e-10)


class RouterBank(nn.Module):
    """One router for each task (equation 3); noise in training only.

    The logits start at zero, so the first choice among the adapters is the noise's.
    """

    def __init__(self, dim: int, adapters: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.gate = nn.Parameter(torch.zeros(len(ROUTED_TASKS), dim, adapters))
        self.noise = nn.Parameter(torch.zeros(len(ROUTED_TASKS), dim, adapters))

    def forward(self, features: torch.Tensor, mix: RouterMix) -> Routing:
        """Φ (..., dim) -> shares (..., N) and the balance loss 1e-3 (cv²(importance) + cv²(load)).

        `mix` maps tasks to weights that sum to one. Of several routers both results are the means
        by weight, so with two tasks up to twice as many adapters take part.
        """
        gates, auxiliary = 0, 0
        for task, weight in mix.items():
            index = ROUTED_TASKS.index(task)
            logits = features @ self.gate[index]
            scale = noise = None
            if self.training:
                scale = F.softplus(features @ self.noise[index]) + 0.1
                noise = torch.randn_like(logits)
            shares, load = noisy_top_k(logits, self.active, scale, noise)
            importance = shares.flatten(0, -2).sum(0)
            balance = squared_variation(importance) + squared_variation(load)
            gates = gates + weight * shares
            auxiliary = auxiliary + weight * BALANCE_WEIGHT * balance
        return Routing(gates, auxiliary)


class AdapterBank(nn.ModuleList):
    """The N adapters, which all tasks share, and their weighted combination (equation 4).

    `combine="sum"` is the equation: Σ gate_i A_i(Φ). `combine="log"` is what the release does, and
    what its weights were trained with: log Σ gate_i exp(A_i(Φ)), where shares below 1e-4 are left
    out (this threshold is inferred from the release's outputs; it hardly ever matters).

    All adapters are computed, and those not chosen are weighted by zero: they are small, and
    gathering tokens by adapter would make the GPU wait for the host.
    """

    def __init__(self, dim: int, hidden: int, adapters: int, combine: str) -> None:
        super().__init__(Adapter(dim, hidden) for _ in range(adapters))
        self.combine = combine

    def forward(self, features: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Φ (..., dim), gates (..., N) -> (..., dim)."""
        outputs = torch.stack([adapter(features) for adapter in self], dim=-1)
        gates = gates.unsqueeze(-2)
        if self.combine == "sum":
            return (gates * outputs).sum(-1)
        gates = gates.masked_fill(gates < SMALLEST_SHARE, 0.0)
        outputs = outputs.masked_fill(gates == 0, -torch.inf)
        # exp overflows past 88, so the largest output is taken out of the logarithm.
        top = outputs.detach().amax(-1, keepdim=True)
        weighed = gates * (outputs - top).exp()
        return weighed.sum(-1).log() + top.squeeze(-1)


class LayerReport(NamedTuple):
    """What one TC-MoA layer can tell: prompts (B, 2, h, w), gates (B, N, h, w), balance loss."""

    prompts: torch.Tensor
    gates: torch.Tensor
    auxiliary: torch.Tensor


class TCMoALayer(nn.Module):
    """One TC-MoA: prompt generation (equations 2 to 4), then prompt-driven fusion (5 and 6).

    Args:
        width: channels C of a source's tokens, a multiple of 8.
        adapters, active: N, and how many of them a token's router chooses (K).
        combine: see `AdapterBank`.
        restandardise: give each source, after the fusion, the mean and standard deviation (over
            tokens and channels) that it had before; the release's decoder does since 2025.
    """

    def __init__(
        self, width: int, adapters: int, active: int, combine: str, restandardise: bool
    ) -> None:
        super().__init__()
        dim = width // 4
        self.restandardise = restandardise
        self.reduce = nn.Sequential(  # L
            nn.LayerNorm(2 * width), nn.Linear(2 * width, dim, bias=False), nn.LayerNorm(dim)
        )
        self.routers = RouterBank(dim, adapters, active)
        self.adapters = AdapterBank(dim, dim // 8, adapters, combine)
        # S: a row for each task, and in it one embedding for a and one for b.
        self.source_embedding = nn.Parameter(torch.empty(len(ROUTED_TASKS), 2, width))
        nn.init.normal_(self.source_embedding, std=0.02)
        self.fusion = nn.Sequential(conv1x1(width, dim), conv3x3(dim, dim), conv1x1(dim, width))
        self.mixing = nn.Parameter(torch.tensor(0.5))  # λ_f

    def forward(
        self, x: torch.Tensor, mix: RouterMix, control: PromptControl | None = None
    ) -> tuple[torch.Tensor, LayerReport]:
        """Tokens (2B, h, w, C), source a's before source b's -> the same shape, and a report.

        `mix` maps tasks to weights that sum to one; routing shares and source embeddings are mixed
        by them. The reported prompts are those that were used, after `control`.

        Under autocast the layer works in its weights' precision, as in the authors' training.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.mixing.dtype)
            a, b = x.chunk(2)
            features = self.reduce(torch.cat([a, b], dim=-1))  # (2)
            gates, auxiliary = self.routers(features, mix)
            combined = self.adapters(features, gates)
            # (4): half of the channels for each source. The release averages before the sigmoid.
            prompts = combined.unflatten(-1, (2, -1)).mean(-1).sigmoid()
            if control is not None:
                prompts = control(prompts)
            shift = sum(
                weight * self.source_embedding[ROUTED_TASKS.index(task)].sum(0)
                for task, weight in mix.items()
            )
            refined = prompts[..., :1] * a + prompts[..., 1:] * b + shift  # (5): h_a + h_b
            fused = self.fusion(refined.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            out = self.mixing * x + (1 - self.mixing) * torch.cat([fused, fused])  # (6)
            if self.restandardise:
                out = _standardised_like(out, x)
        report = LayerReport(prompts.permute(0, 3, 1, 2), gates.permute(0, 3, 1, 2), auxiliary)
        return out, report


def _standardised_like(x: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """x with the mean and standard deviation of `model`, taken within each sample."""
    std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
    model_std, model_mean = torch.std_mean(model, dim=(1, 2, 3), keepdim=True)
    return (x - mean) / (std + 1e-8) * model_std + model_mean
