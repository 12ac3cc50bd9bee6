"""Masked autoencoders: the network, and their weights for the frozen part of TC-MoA.

Source: He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import timm
import torch
from torch import nn

from fusionkit.models.official_tcmoa import convert_vit
from fusionkit.models.patches import (
    MULTIPLE,
    PATCH,
    enlarged,
    register_normalisation,
    to_patches,
)
from fusionkit.models.registry import WEIGHTS
from fusionkit.models.tcmoa import TCMoA
from fusionkit.models.weight_files import mismatch, read_state
from fusionkit.models.windows import sine_cosine_grid, start_as_mae, transformer_blocks

TINY_WIDTH = 64
# timm's encoders by width. They come without a decoder, and are under CC-BY-NC 4.0.
HUB = {768: "vit_base_patch16_224.mae", 1024: "vit_large_patch16_224.mae"}


class _Stack(nn.Module):
    """Transformer blocks with attention among all tokens, and a norm; (B, tokens, C)."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = transformer_blocks(width, depth, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class MaskedAutoencoder(nn.Module):
    """Predicts the hidden patches of a picture from the others.

    It has exactly the frozen modules of `TCMoA`, under their names, and a mask token; no class
    token, which TC-MoA does not use. A picture of 112×112 is enlarged twofold, as TC-MoA does, to
    14×14 patches: one window of TC-MoA's. There the windowed attention is attention among all
    tokens, but for the relative positions, which start near zero and are trained later. So
    attention is global here, over the visible tokens alone in the encoder, and weights transfer as
    those of the released autoencoders do; and the pictures are as smooth as TC-MoA's.

    Args:
        width, depth, heads: of the encoder; with `decoder_` those of the decoder.
    """

    def __init__(
        self,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, PATCH, PATCH)
        nn.init.xavier_uniform_(self.patch_embed.weight.data.flatten(1))
        self.encoder = _Stack(width, depth, heads)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(decoder_width))
        self.decoder = _Stack(decoder_width, decoder_depth, decoder_heads)
        self.decoder_pred = nn.Linear(decoder_width, PATCH * PATCH * 3)
        start_as_mae(self)
        self.register_buffer("encoder_position", sine_cosine_grid(width))
        self.register_buffer("decoder_position", sine_cosine_grid(decoder_width))
        register_normalisation(self)

    @classmethod
    def like(cls, network: TCMoA) -> MaskedAutoencoder:
        """An autoencoder, with weights of its own, whose weights fit this network."""
        sizes = {}
        for prefix, tower in (("", network.encoder), ("decoder_", network.decoder)):
            sizes[f"{prefix}width"] = tower.norm.normalized_shape[0]
            sizes[f"{prefix}depth"] = len(tower.blocks)
            sizes[f"{prefix}heads"] = tower.blocks[0].attn.num_heads
        return cls(**sizes)

    def patches(self, pictures: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
        """(B, 1 or 3, 112, 112) in [0, 1] -> the enlarged, ImageNet-normalised patches.

        (B, 196, 768): in reading order, of each the pixels in reading order, of each the channels.
        `mode` is how they are enlarged, as in `torch.nn.functional.interpolate`.
        """
        return to_patches(self._normalised(pictures, mode)).flatten(1, 2)

    def forward(
        self, pictures: torch.Tensor, mask_ratio: float = 0.75
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hide a share of each picture's patches, another choice at every call, and predict all.

        Returns:
            prediction: (B, 196, 768), as `patches` orders them.
            hidden: (B, 196), whether the encoder did not see the patch.

        Raises:
            ValueError: pictures of another size; a ratio that is negative or leaves nothing.
        """
        x = self.patch_embed(self._normalised(pictures)).flatten(2).transpose(1, 2)
        batch, tokens, width = x.shape
        visible = round(tokens * (1 - mask_ratio))
        if not 1 <= visible <= tokens:
            raise ValueError(f"mask_ratio is {mask_ratio}, expected at least 0 and less than 1")
        x = x + self.encoder_position.flatten(2).transpose(1, 2)
        order = torch.rand(batch, tokens, device=x.device).argsort(dim=1)
        seen = order[:, :visible, None]
        x = self.decoder_embed(self.encoder(x.gather(1, seen.expand(-1, -1, width))))
        full = self.mask_token.to(x.dtype).expand(batch, tokens, -1)
        full = full.scatter(1, seen.expand_as(x), x)
        full = full + self.decoder_position.flatten(2).transpose(1, 2)
        hidden = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :visible], False)
        return self.decoder_pred(self.decoder(full)), hidden

    def _normalised(self, pictures: torch.Tensor, mode: str = "bilinear") -> torch.Tensor:
        sides = (MULTIPLE, MULTIPLE)
        if pictures.ndim != 4 or pictures.shape[1] not in (1, 3) or pictures.shape[2:] != sides:
            raise ValueError(
                f"pictures have shape {tuple(pictures.shape)}; "
                f"expected (B, 1 or 3, {MULTIPLE}, {MULTIPLE})"
            )
        return enlarged(pictures, self.mean, self.std, mode)


def fill_backbone(model: TCMoA, autoencoder: MaskedAutoencoder) -> TCMoA:
    """Copy an autoencoder's weights into the frozen part of `model`.

    Raises:
        ValueError: they differ in size.
    """
    state = _without_mask_token(autoencoder.state_dict())
    if complaint := mismatch(_backbone(model), state):
        raise ValueError(f"not a masked autoencoder of this size: {complaint}")
    model.load_state_dict(state, strict=False)
    return model


def load_mae(model: TCMoA, path: str | os.PathLike | None = None) -> TCMoA:
    """Fill the frozen part of `model` from a masked autoencoder's file.

    Without a path, `tcmoa_tiny` takes the weights that ship with fusionkit, and base and large take
    timm's encoders, which are downloaded.

    A file holds the state of a `MaskedAutoencoder`, or is `mae_visualize_vit_base.pth` or
    `mae_visualize_vit_large_ganloss.pth` of MAE's release, the latter being the paper's choice. An
    encoder's alone will do (the release's `mae_pretrain_vit_*.pth`, or timm's
    `vit_base_patch16_224.mae` and `vit_large_patch16_224.mae`): then the decoder stays as it is,
    with a warning. TC-MoA layers and relative position tables are not touched. The released weights
    are under CC-BY-NC 4.0: not for commercial use.

    Raises:
        FileNotFoundError: no such file; or no path, and the download failed.
        ValueError: not a file of tensors, or not a masked autoencoder of this size; or no path, and
            there is no autoencoder of this width.
    """
    expected = _backbone(model)
    if path is None:
        path = _at_hand(model.encoder.norm.normalized_shape[0])
    try:
        state = _download(path) if path in HUB.values() else read_state(Path(path))
        ours = "encoder_position" in state and "mask_token" in state
        state = _without_mask_token(state) if ours else convert_vit(state)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: not a masked autoencoder: {reason}") from error
    encoder_only = not any(key.startswith("decoder") for key in state)
    if encoder_only:
        expected = {k: v for k, v in expected.items() if not k.startswith("decoder")}
    if complaint := mismatch(expected, state):
        raise ValueError(f"{path}: not a masked autoencoder of this size: {complaint}")
    if encoder_only:
        warnings.warn(f"{path} holds no decoder; the model's stays as it is", stacklevel=2)
    model.load_state_dict(state, strict=False)
    return model


def _at_hand(width: int) -> str | Path:
    """The shipped file of an autoencoder of this width, or the name of timm's."""
    if width == TINY_WIDTH:
        return WEIGHTS / "mae_tiny.safetensors"
    if width not in HUB:
        known = ", ".join(map(str, (TINY_WIDTH, *HUB)))
        raise ValueError(
            f"no autoencoder of width {width} is at hand, only of {known}; name a path"
        )
    return HUB[width]


def _download(name: str) -> dict[str, torch.Tensor]:
    """The state of one of timm's pretrained encoders."""
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name} could not be downloaded ({reason}); name a path"
        ) from error


def _backbone(model: TCMoA) -> dict[str, torch.Tensor]:
    """What `model` has of a masked autoencoder."""
    added = (".layers.", ".relative_position.", ".mlp.down.", ".mlp.up.")
    return {k: v for k, v in model.state_dict().items() if not any(part in k for part in added)}


def _without_mask_token(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if key != "mask_token"}
