"""Training a fusion network with given weights of CAF's loss terms, whoever found them.

Source: Liu et al., Where Elegance Meets Precision (CAF), IJCAI 2024, section 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fusionkit.methods.base import Method
from fusionkit.methods.caf_terms import (
    Features,
    fixed_terms,
    placed,
    searched_terms,
    term_names,
)
from fusionkit.methods.perception import on_device, weight_gradients
from fusionkit.names import check_name


class WeightedLossTraining(Method):
    """Trains a fusion network with given loss weights: the first stage of section 3.4.

    No labels are needed.

    Args:
        fusion: the fusion network.
        weights: of each loss term by its name, of `caf_terms.TERMS`; terms without one count
            nothing. Such as `CAFSearch.loss_weights()` or `caf_terms.fixed_weights`.
        features, detached: as in `caf_terms.searched_terms`. The features are no part of a
            checkpoint.
        lr: Adam's learning rate.

    Raises:
        ValueError: a weight for no known term, or for a perceptual one without features.
    """

    accumulates = True

    def __init__(
        self,
        fusion: nn.Module,
        weights: Mapping[str, float],
        *,
        features: Features | None = None,
        detached: bool = False,
        lr: float = 1e-4,
    ) -> None:
        known = term_names(features)
        for name in weights:
            check_name(name, known, "loss term")
        super().__init__(
            {"fusion": fusion}, {"fusion": torch.optim.Adam(fusion.parameters(), lr=lr)}
        )
        self.fusion, self.weights = fusion, dict(weights)
        self.features, self.detached = features, detached

    def step(self, batch: dict) -> dict[str, float]:
        """One update of the network; the loss is `fusion`."""
        self.fusion.train()
        batch = on_device(batch, self.device)
        a, b = batch["a"], batch["b"]
        fused = self.fusion(a, b)
        features = placed(self.features, fused)
        terms = searched_terms(a, b, fused, features, self.detached)
        loss = sum(weight * terms[name] for name, weight in self.weights.items())
        loss = loss + fixed_terms(a, b, fused)
        self.update("fusion", weight_gradients(loss, self.trained("fusion")))
        self.steps_taken += 1
        return {"fusion": loss.item()}
