"""Stacks of frozen transformer blocks, and what is trained in them: TC-MoA layers or rivals."""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F

from fusionkit.models.adapters import LayerReport, PromptControl, RouterMix, TCMoALayer
from fusionkit.models.windows import WindowedBlocks

TUNINGS = ("tcmoa", "adaptformer", "linear")


class ParallelMlp(Mlp):
    """A block's MLP with a trained bottleneck beside it, which starts as nothing.

    MLP(x) + 0.1 · up(ReLU(down(x))), the bottleneck a twelfth as wide as the tokens. Source: Chen
    et al., AdaptFormer, NeurIPS 2022; 64 channels for 768 there.
    """

    def __init__(self, in_features: int, **options) -> None:
        super().__init__(in_features, **options)
        hidden = max(1, in_features // 12)
        self.down = nn.Linear(in_features, hidden)
        self.up = nn.Linear(hidden, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.1 * self.up(F.relu(self.down(x)))


class Tower(WindowedBlocks):
    """A stack of frozen blocks with a TC-MoA layer for each `interval` (τ) of them, and a norm.

    The layers stand after the blocks i with (i + 2) mod τ = τ - 1, as in the release: 1, 5, 9, …
    for τ = 4. With `first_only`, the second source stops at the last layer. A `tuning` other than
    "tcmoa" has no such layers; "adaptformer" has a bottleneck beside every MLP.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        interval: int,
        first_only: bool,
        tuning: str = "tcmoa",
        **layer,
    ) -> None:
        parallel = tuning == "adaptformer"
        super().__init__(width, depth, heads, ParallelMlp if parallel else Mlp)
        self.first_only = first_only
        self.places = [i for i in range(depth) if (i + 2) % interval == interval - 1]
        if tuning != "tcmoa":
            self.places = []
        elif not self.places:
            raise ValueError(f"{depth} blocks have no TC-MoA layer at an interval of {interval}")
        self.layers = nn.ModuleList(TCMoALayer(width, **layer) for _ in self.places)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if parallel:
            for block in self.blocks:
                nn.init.zeros_(block.mlp.up.weight)

    def added(self) -> list[nn.Module]:
        """What a masked autoencoder does not have: TC-MoA layers, bottlenecks, position tables."""
        mlps = [block.mlp for block in self.blocks if isinstance(block.mlp, ParallelMlp)]
        bottlenecks = [module for mlp in mlps for module in (mlp.down, mlp.up)]
        return [self.layers, self.relative_position, *bottlenecks]

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """The blocks before the first TC-MoA layer; all of them if there is none."""
        return self.run(x, range(self.places[0] + 1 if self.places else len(self.blocks)))

    def rest(
        self, x: torch.Tensor, mix: RouterMix, control: PromptControl | None
    ) -> tuple[torch.Tensor, list[LayerReport]]:
        """From the first TC-MoA layer to the norm; a report for each layer."""
        reports = []
        for j, (layer, place) in enumerate(zip(self.layers, self.places, strict=True)):
            x, report = layer(x, mix, control)
            reports.append(report)
            last = j == len(self.layers) - 1
            if self.first_only and last:
                x = x.chunk(2)[0]
            end = len(self.blocks) - 1 if last else self.places[j + 1]
            x = self.run(x, range(place + 1, end + 1))
        return self.norm(x), reports
