"""Masked autoencoders' weights for the frozen part of TC-MoA."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from fusionkit.models.official_tcmoa import convert_vit
from fusionkit.models.registry import mismatch, read_state
from fusionkit.models.tcmoa import TCMoA


def load_mae(model: TCMoA, path: str | os.PathLike) -> TCMoA:
    """Fill the frozen part of `model` from a masked autoencoder's file (He et al., CVPR 2022).

    Such a file is `mae_visualize_vit_base.pth` or `mae_visualize_vit_large_ganloss.pth` of MAE's
    release, the latter being the paper's choice. An encoder's alone will do (the release's
    `mae_pretrain_vit_*.pth`, or timm's `vit_base_patch16_224.mae` and `vit_large_patch16_224.mae`):
    then the decoder stays as it is, with a warning. TC-MoA layers and relative position tables are
    not touched. The weights are under CC-BY-NC 4.0: not for commercial use.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of tensors, or not a masked autoencoder of this size.
    """
    path = Path(path)
    expected = {
        key: value
        for key, value in model.state_dict().items()
        if ".layers." not in key and ".relative_position." not in key
    }
    try:
        state = convert_vit(read_state(path))
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
