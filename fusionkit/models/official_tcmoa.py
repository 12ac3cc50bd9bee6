"""TC-MoA's released checkpoints and masked autoencoders' files, by the names of `tcmoa.TCMoA`."""

from __future__ import annotations

import re
import warnings

import torch

# What `create_model` builds for the authors' weights: the behaviour they were trained with. Files
# of the first public version (2024) need restandardise=False; nothing in them tells.
RELEASE_OPTIONS = {
    "combine": "log",
    "restandardise": True,
    "transposed_positions": True,
    "reduction": "nearest",
}

_VIT = [
    (r"patch_embed\.proj\.(weight|bias)", r"patch_embed.\1"),
    (r"(decoder_embed|decoder_pred)\.(weight|bias)", r"\1.\2"),
]
_MIXTURE = []
for _tower, _prefix, _short, _fusion in (
    ("encoder", "", "en_", ""),
    ("decoder", "decoder_", "de_", "de_"),
):
    _VIT += [
        (_prefix + r"pos_embed", _tower + r"_position"),
        (_prefix + r"norm\.(weight|bias)", _tower + r".norm.\1"),
        (_prefix + r"(blocks\.\d+\..+)", _tower + r".\1"),
    ]
    _layer = _prefix + r"blocks_MoA\.(\d+)\."
    _MIXTURE += [
        (
            _short + r"relative_position\.(\d+)\.relative_position_bias_table",
            _tower + r".relative_position.\1.table",
        ),
        (_layer + r"norm1\.(weight|bias)", _tower + r".layers.\1.reduce.0.\2"),
        (_layer + r"dimReduction\.weight", _tower + r".layers.\1.reduce.1.weight"),
        (_layer + r"norm2\.(weight|bias)", _tower + r".layers.\1.reduce.2.\2"),
        (_layer + r"MoA\.w_(gate|noise)", _tower + r".layers.\1.routers.\2"),
        (_layer + r"MoA\.experts\.(\d+)\.fc1\.(.+)", _tower + r".layers.\1.adapters.\2.0.\3"),
        (_layer + r"MoA\.experts\.(\d+)\.fc2\.(.+)", _tower + r".layers.\1.adapters.\2.2.\3"),
        (_layer + r"modal_shifts\.(\d+)", _tower + r".layers.\1.source_embedding.\2"),
        (_fusion + r"FusionLayer\.(\d+)\.conv1\.weight", _tower + r".layers.\1.fusion.0.weight"),
        (_fusion + r"FusionLayer\.(\d+)\.conv2\.weight", _tower + r".layers.\1.fusion.1.weight"),
        (_fusion + r"FusionLayer\.(\d+)\.conv3\.weight", _tower + r".layers.\1.fusion.2.weight"),
    ]
# Tokens that fusion does not use, constants, index tables, a classifier's last layer.
_UNUSED = re.compile(
    r"cls_token|mask_token|.+\.relative_position_index|.+\.MoA\.(mean|std)|(fc_norm|head)\..+"
)
_EMBEDDINGS = 6  # two sources in each of three tasks


def is_release(state: dict[str, torch.Tensor]) -> bool:
    """Whether the keys are those of TC-MoA's authors."""
    return any(key.startswith(("blocks_MoA.", "Alpha_encoder")) for key in state)


def convert_tcmoa(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint of the release to the names of `tcmoa.TCMoA`.

    The release's λ weighs the fused features where equation 6 weighs the source's, so it becomes
    1 - λ. Its source embeddings are neither trained nor saved, and redrawn at every start: they are
    drawn here from N(0, 0.02²) with a fixed seed, with a warning.

    Raises:
        ValueError: a key is not one of that release.
    """
    state = dict(state)
    converted = {}
    for tower in ("encoder", "decoder"):
        mixing = state.pop(f"Alpha_{tower}", torch.empty(0))
        converted |= {
            f"{tower}.layers.{j}.mixing": 1 - value for j, value in enumerate(mixing.flatten())
        }
    converted |= convert_vit(state, _VIT + _MIXTURE)
    return _with_source_embeddings(converted)


def convert_vit(
    state: dict[str, torch.Tensor], rules: list[tuple[str, str]] = _VIT
) -> dict[str, torch.Tensor]:
    """A masked autoencoder's weights, or an encoder's alone, to the names of `tcmoa.TCMoA`.

    The class token's row of a position embedding (1, 1 + side², C) is dropped, and the rest becomes
    a grid (1, C, side, side).

    Raises:
        ValueError: a key that `rules` do not know.
    """
    converted = {}
    for key, value in state.items():
        if _UNUSED.fullmatch(key):
            continue
        name = _rename(key, rules)
        if name.endswith("_position"):
            value = _grid(key, value)
        converted[name] = value
    return converted


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, replacement, key)
    raise ValueError(f"unknown key {key}")


def _grid(key: str, value: torch.Tensor) -> torch.Tensor:
    side = int((value.shape[1] - 1) ** 0.5) if value.ndim == 3 else 0
    if side == 0 or side * side + 1 != value.shape[1]:
        raise ValueError(f"{key} has shape {tuple(value.shape)}; expected (1, 1 + side², width)")
    return value[:, 1:].transpose(1, 2).unflatten(2, (side, side)).contiguous()


def _with_source_embeddings(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join each layer's six source embeddings as (tasks, 2, C); draw those that are not there."""
    generator = torch.Generator().manual_seed(0)
    drawn = 0
    for fusion in [key for key in state if key.endswith(".fusion.0.weight")]:
        name = fusion.replace("fusion.0.weight", "source_embedding")
        keys = [f"{name}.{i}" for i in range(_EMBEDDINGS)]
        if any(key in state for key in keys):
            missing = [key for key in keys if key not in state]
            if missing:
                raise ValueError(f"missing keys {', '.join(missing)}")
            embeddings = torch.stack([state.pop(key) for key in keys])
        else:
            width = state[fusion].shape[1]
            embeddings = 0.02 * torch.randn(_EMBEDDINGS, width, generator=generator)
            drawn += 1
        state[name] = embeddings.unflatten(0, (-1, 2))
    if drawn:
        warnings.warn(
            f"the checkpoint holds no source embeddings for {drawn} TC-MoA layers (the authors "
            "neither train nor save them); they are drawn from N(0, 0.02²) with seed 0",
            stacklevel=2,
        )
    return state
