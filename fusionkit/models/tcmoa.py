"""TC-MoA: a frozen masked autoencoder that mixtures of adapters turn into a fusion network.

Source: Zhu et al., Task-Customized Mixture of Adapters for General Image Fusion, CVPR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fusionkit.models.adapters import LayerReport, PromptControl, RouterMix, router_mix
from fusionkit.models.patches import (
    ENLARGEMENT,
    MULTIPLE,
    PATCH,
    TOKEN,
    enlarged,
    from_patches,
    register_normalisation,
)
from fusionkit.models.towers import TUNINGS, Tower
from fusionkit.models.windows import mirrored, sine_cosine_grid
from fusionkit.names import check_name

SMALLEST = 32


class Stem(NamedTuple):
    """What neither task nor control change: the tokens before the first TC-MoA layer.

    tokens: (2B, h, w, C), source a's before source b's; size: (H, W) of the pictures; gray:
    whether they had one channel.
    """

    tokens: torch.Tensor
    size: tuple[int, int]
    gray: bool


@dataclass(frozen=True)
class TCMoAOutput:
    """A fused picture and how it came about.

    Attributes:
        fused: (B, 1 or 3, H, W) in [0, 1].
        prompts: for "encoder" and "decoder" one tensor (B, 2, ⌈H/8⌉, ⌈W/8⌉) a TC-MoA layer, as it
            was used (after a `PromptControl`); channel 0 belongs to a, 1 to b; in (0, 1) without
            control.
        gates: likewise, (B, adapters, ⌈H/8⌉, ⌈W/8⌉): each token's routing shares, which sum to one.
        auxiliary: the load-balancing loss, summed over all layers.
    """

    fused: torch.Tensor
    prompts: dict[str, tuple[torch.Tensor, ...]]
    gates: dict[str, tuple[torch.Tensor, ...]]
    auxiliary: torch.Tensor


class TCMoA(nn.Module):
    """The fusion network of TC-MoA.

    Both sources go through the same frozen blocks in one batch; the picture is predicted from the
    stream of the first, `a` (`x` in the release). Trainable are the TC-MoA layers and the relative
    position tables; everything that a masked autoencoder's file holds is frozen, and starts at
    random: load such a file (`mae.load_mae`) or a checkpoint, or train all of it after
    `requires_grad_(True)`.

    Args:
        width, depth, heads: of the encoder; with `decoder_` those of the decoder.
        adapters, active: N adapters in each TC-MoA layer, of which a token uses K.
        interval: τ, blocks for each TC-MoA layer.
        task: what `forward` does if it is given no task.
        combine: how adapters are combined. "sum" is equation 4; "log" adds up exponentials, as the
            release does, and all published weights and numbers come from it.
        restandardise: the decoder's layers keep each source's mean and standard deviation, as in
            the release since 2025; False is the first public version.
        transposed_positions: repeat a slip of the release, which resizes the position embedding to
            (columns, rows); it matters for pictures that are not square.
        reduction: how the prediction, which has twice the sources' size, gets down to it: "nearest"
            is the authors', in training and prediction; "area" averages 2×2 pixels.
        tuning: "tcmoa", or a rival of the paper's Table 5 on the same frozen blocks: "adaptformer"
            trains a bottleneck beside every MLP and the position tables, "linear" the last linear
            layer alone. The paper does not say where the sources meet in these; here the decoder
            gets the mean of their encoded tokens. They know neither tasks nor prompts.

    Attributes:
        cpu_tile: side of the tiles in which `fuse` cuts large pictures on a CPU.

    Raises:
        ValueError: an option is not one of those named.
    """

    cpu_tile = 5 * MULTIPLE

    def __init__(
        self,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        adapters: int = 4,
        active: int = 2,
        interval: int = 4,
        task: str | RouterMix = "ivif",
        combine: str = "log",
        restandardise: bool = True,
        transposed_positions: bool = False,
        reduction: str = "nearest",
        tuning: str = "tcmoa",
    ) -> None:
        super().__init__()
        if not 1 <= active <= adapters:
            raise ValueError(f"{active} active adapters; expected 1 to {adapters}")
        self.task = router_mix(task)
        self.transposed_positions = transposed_positions
        self.reduction = check_name(reduction, ("nearest", "area"), "reduction")
        self.tuning = check_name(tuning, TUNINGS, "tuning")
        layer = {
            "tuning": tuning,
            "adapters": adapters,
            "active": active,
            "combine": check_name(combine, ("log", "sum"), "combine"),
        }
        self.patch_embed = nn.Conv2d(3, width, PATCH, PATCH)
        self.encoder = Tower(
            width, depth, heads, interval, first_only=False, restandardise=False, **layer
        )
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder = Tower(
            decoder_width,
            decoder_depth,
            decoder_heads,
            interval,
            first_only=True,
            restandardise=restandardise,
            **layer,
        )
        self.decoder_pred = nn.Linear(decoder_width, PATCH * PATCH * 3)
        self.register_buffer("encoder_position", sine_cosine_grid(width))
        self.register_buffer("decoder_position", sine_cosine_grid(decoder_width))
        register_normalisation(self)
        self.requires_grad_(False)
        trained = [*self.encoder.added(), *self.decoder.added()]
        for module in [self.decoder_pred] if tuning == "linear" else trained:
            module.requires_grad_(True)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that training changes, for an optimiser."""
        return (p for p in self.parameters() if p.requires_grad)

    def forward(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        task: str | RouterMix | None = None,
        control: PromptControl | None = None,
    ) -> torch.Tensor:
        """Two registered pictures -> the fused one, (B, 1 or 3, H, W) in [0, 1] all three.

        Of gray sources, which fill all three channels, the mean of the predicted channels is
        returned. Pictures are mirrored at the bottom and on the right up to sides that are
        multiples of 112, and the result is cropped.

        Args:
            a, b: infrared and visible, near and far, or under- and over-exposed; 32×32 or larger.
            task: `ivif`, `mfif`, `meif`, or `mif`, which takes the router of `ivif` as the paper
                does (4.6); or a mixture of them, weights that sum to one, {"ivif": 0.7, "mfif":
                0.3}, by which routing shares and source embeddings are mixed. By default the
                network's own.
            control: equation 8, applied to the prompts of every layer.

        Raises:
            ValueError: shapes that differ, are too small or have another number of channels; an
                unknown task; weights that are negative or do not sum to one.
        """
        return self.explain(a, b, task, control).fused

    def explain(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        task: str | RouterMix | None = None,
        control: PromptControl | None = None,
    ) -> TCMoAOutput:
        """`forward`, and with it the prompts, routing shares and balance loss of the same pass."""
        return self.finish(self.stem(a, b), task, control)

    def stem(self, a: torch.Tensor, b: torch.Tensor) -> Stem:
        """The part that neither task nor control change; `finish(stem, ...)` does the rest."""
        _check_pair(a, b)
        height, width = a.shape[-2:]
        x = enlarged(mirrored(torch.cat([a, b]), MULTIPLE), self.mean, self.std)
        tokens = self.patch_embed(x).permute(0, 2, 3, 1)
        tokens = tokens + self._position(self.encoder_position, *tokens.shape[1:3])
        return Stem(self.encoder.stem(tokens), (height, width), a.shape[1] == 1)

    def finish(
        self,
        stem: Stem,
        task: str | RouterMix | None = None,
        control: PromptControl | None = None,
    ) -> TCMoAOutput:
        """From the first TC-MoA layer on: a slider over α and β need not compute `stem` again."""
        mix = self.task if task is None else router_mix(task)
        encoded, encoder_reports = self.encoder.rest(stem.tokens, mix, control)
        if self.tuning != "tcmoa":
            encoded = sum(encoded.chunk(2)) / 2
        rows, columns = (math.ceil(side / TOKEN) for side in stem.size)
        prediction, decoder_reports = self.decode(encoded, mix, control, (rows, columns))
        reports = {"encoder": encoder_reports, "decoder": decoder_reports}
        return TCMoAOutput(
            self._picture(prediction, stem),
            {k: tuple(r.prompts[..., :rows, :columns] for r in v) for k, v in reports.items()},
            {k: tuple(r.gates[..., :rows, :columns] for r in v) for k, v in reports.items()},
            sum((r.auxiliary for r in encoder_reports + decoder_reports), prediction.new_zeros(())),
        )

    def decode(
        self,
        encoded: torch.Tensor,
        mix: RouterMix,
        control: PromptControl | None = None,
        wanted: tuple[int | None, int | None] = (None, None),
    ) -> tuple[torch.Tensor, list[LayerReport]]:
        """Encoded tokens (2B, h, w, C) -> the prediction (B, 3, 16h, 16w), normalised pixels.

        `wanted` are the (rows, columns) of tokens to predict, from the top left; None is all.
        """
        x = self.decoder_embed(encoded)
        x = x + self._position(self.decoder_position, *x.shape[1:3])
        x, reports = self.decoder.rest(self.decoder.stem(x), mix, control)
        rows, columns = wanted
        return from_patches(self.decoder_pred(x[:, :rows, :columns])), reports

    def _picture(self, prediction: torch.Tensor, stem: Stem) -> torch.Tensor:
        height, width = stem.size
        if self.reduction == "area":
            picture = F.avg_pool2d(prediction, ENLARGEMENT)
        else:
            picture = prediction[..., ::ENLARGEMENT, ::ENLARGEMENT]
        picture = (picture * self.std + self.mean).clamp(0, 1)[..., :height, :width]
        return picture.mean(dim=1, keepdim=True) if stem.gray else picture

    def _position(self, grid: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """A position embedding resized to the tokens' grid: (1, rows, columns, C)."""
        size = (columns, rows) if self.transposed_positions else (rows, columns)
        resized = F.interpolate(grid, size=size, mode="bilinear").permute(0, 2, 3, 1)
        return resized.reshape(1, rows, columns, -1)


def _check_pair(a: torch.Tensor, b: torch.Tensor) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[-2:]) < SMALLEST:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected (B, 1 or 3, H, W) with sides of at "
                f"least {SMALLEST}"
            )
    if a.shape != b.shape:
        raise ValueError(f"a is {tuple(a.shape)} but b is {tuple(b.shape)}; expected one shape")


def tcmoa_tiny(**options) -> TCMoA:
    """A network of 0.64 M parameters for quick runs; `MaskedAutoencoder.like` pretrains it."""
    encoder = {"width": 64, "depth": 8, "heads": 4}
    decoder = {"decoder_width": 48, "decoder_depth": 4, "decoder_heads": 4}
    return TCMoA(**encoder | decoder | options)


def tcmoa_small(**options) -> TCMoA:
    """A network of 2.2 M parameters, shallow and wide: a token holds all gray values it stands for.

    Blocks are few, but a TC-MoA layer hands on a quarter of the channels, here 64 for 8×8 pixels.
    """
    encoder = {"width": 256, "depth": 2, "heads": 4}
    decoder = {"decoder_width": 96, "decoder_depth": 2, "decoder_heads": 4}
    return TCMoA(**encoder | decoder | options)


def tcmoa_base(**options) -> TCMoA:
    """TC-MoA on MAE ViT-base: 115.5 M parameters, of which 3.9 M are trainable."""
    return TCMoA(**{"width": 768, "depth": 12, "heads": 12} | options)


def tcmoa_large(**options) -> TCMoA:
    """TC-MoA on MAE ViT-large: 340.6 M parameters, of which 11.4 M are trainable."""
    network = TCMoA(**{"width": 1024, "depth": 24, "heads": 16} | options)
    network.cpu_tile = 4 * MULTIPLE  # what fits in 3 GiB beside its weights
    return network
