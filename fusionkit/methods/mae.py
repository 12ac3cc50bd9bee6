"""Pretraining of a masked autoencoder, whose weights become TC-MoA's frozen backbone.

Source: He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fusionkit.methods.base import Method, decay_groups, warmup_cosine
from fusionkit.models.mae import MaskedAutoencoder


class MAEMethod(Method):
    """Hide most patches of every picture and learn to predict them.

    A picture is a picture: of pairs, both sources are used, each for itself.

    Args:
        autoencoder: what is trained; afterwards `models.mae.fill_backbone` copies its weights.
        steps: after which the learning rate has come down to zero, along half a cosine.
        warmup_steps: over which it rises at first; by default a twentieth of `steps`, as in the
            paper.
        lr: AdamW's largest learning rate; the paper's is 1.5e-4 for each 256 pictures of a batch.
        weight_decay: not on biases, norms and the mask token.
        mask_ratio: share of hidden patches.
        normalise_patches: predict each patch less its mean, over its standard deviation, as the
            paper's better variant does. TC-MoA needs pixels, hence not by default.
        visible_weight: how much the error on visible patches counts beside that on hidden ones. The
            paper's 0 leaves the decoder free to paint anything there; but in TC-MoA every patch is
            visible, and the frozen last layer must give it back.

    Raises:
        ValueError: a setting is out of range.
    """

    accumulates = True

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        *,
        steps: int,
        warmup_steps: int | None = None,
        lr: float = 1.5e-4,
        weight_decay: float = 0.05,
        mask_ratio: float = 0.75,
        normalise_patches: bool = False,
        visible_weight: float = 0.0,
    ) -> None:
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio is {mask_ratio}, expected more than 0 and less than 1")
        if visible_weight < 0:
            raise ValueError(f"visible_weight is {visible_weight}, expected at least 0")
        groups = decay_groups(autoencoder.parameters(), weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
        super().__init__({"autoencoder": autoencoder}, {"autoencoder": optimizer})
        self.autoencoder = autoencoder
        self.lr, self.steps = lr, steps
        self.warmup_steps = steps // 20 if warmup_steps is None else warmup_steps
        self.mask_ratio, self.normalise_patches = mask_ratio, normalise_patches
        self.visible_weight = visible_weight

    def step(self, batch: dict) -> dict[str, float]:
        """One update on all pictures of the batch; the mean squared errors by name.

        Args:
            batch: tensors (B, 1 or 3, 112, 112) in [0, 1] under the keys `a`, `b` or `image`, at
                any depth, as in the batches of `TCMoAMethod`.
        """
        share = warmup_cosine(self.steps_taken, self.warmup_steps, self.steps)
        self.set_lr({"autoencoder": self.lr * share})
        pictures = torch.cat(list(_pictures(batch))).to(self.device)
        losses = self.losses(pictures)
        total = losses["hidden"] + self.visible_weight * losses["visible"]
        self.update("autoencoder", torch.autograd.grad(total, self.trained("autoencoder")))
        self.steps_taken += 1
        return {name: loss.item() for name, loss in losses.items()}

    def losses(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean squared error over the "hidden" and over the "visible" patches.

        In units of ImageNet's standard deviations, or of each patch's with `normalise_patches`.
        """
        prediction, hidden = self.autoencoder(pictures, self.mask_ratio)
        target = self.autoencoder.patches(pictures)
        if self.normalise_patches:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction.float() - target).square().mean(dim=-1)
        # Every picture hides equally many patches, so the mean is that of the pictures' means.
        return {"hidden": error[hidden].mean(), "visible": error[~hidden].mean()}


def _pictures(batch: dict) -> Iterator[torch.Tensor]:
    for key, value in batch.items():
        if isinstance(value, dict):
            yield from _pictures(value)
        elif key in ("a", "b", "image"):
            yield value
