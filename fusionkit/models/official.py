"""The authors' released checkpoints: recognised by their keys, renamed, checked strictly."""

from __future__ import annotations

import re

import torch

from fusionkit.models.official_tcmoa import RELEASE_OPTIONS, convert_tcmoa, is_release

# The authors' names and ours; 1 and 2 in theirs are a and b in ours (see `_SIDE`).
_BLOCK = r"(encoder[12]|decoder)\.(\d)\."
_REFUSION = [
    (r"project_in_([12])\.weight", r"stem\1.weight"),
    (r"project_out_0\.weight", r"head.0.weight"),
    (r"project_out_1\.weight", r"head.2.weight"),
    (_BLOCK + r"norm(\d)\.body\.(weight|bias)", r"\1.\2.norm\3.\4"),
    (_BLOCK + r"attn\.temperature", r"\1.\2.attention.attend.temperature"),
    (_BLOCK + r"attn\.qkv\.weight", r"\1.\2.attention.qkv.0.weight"),
    (_BLOCK + r"attn\.qkv_dwconv\.weight", r"\1.\2.attention.qkv.1.weight"),
    (_BLOCK + r"attn\.project_out\.weight", r"\1.\2.attention.project.weight"),
    (_BLOCK + r"ffn\.project_in\.weight", r"\1.\2.feed_forward.expand.weight"),
    (_BLOCK + r"ffn\.dwconv\.weight", r"\1.\2.feed_forward.depthwise.weight"),
    (_BLOCK + r"ffn\.project_out\.weight", r"\1.\2.feed_forward.project.weight"),
    (r"FM\.temperature([12])", r"fusion.interaction.attend\1.temperature"),
    (r"FM\.qkv([12])\.weight", r"fusion.interaction.qkv\1.0.weight"),
    (r"FM\.qkv([12])_dwconv\.weight", r"fusion.interaction.qkv\1.1.weight"),
    (r"FM\.project_mid([12])\.weight", r"fusion.interaction.project\1.weight"),
    (r"FM\.project_E\.weight", r"fusion.gate.0.weight"),
    (r"FM\.project_E_d\.weight", r"fusion.gate.1.weight"),
    (r"FM\.project_E([12])\.weight", r"fusion.refine\1.value.0.weight"),
    (r"FM\.project_E([12])_d\.weight", r"fusion.refine\1.value.1.weight"),
    (r"FM\.project_out([12])\.weight", r"fusion.refine\1.project.weight"),
]
_UNIT = r"(unit|units\.\d)\."
_FRUFN = [
    (r"encoder1\.(.+)", r"base_encoder.\1"),
    (r"encoder2\.(.+)", r"guide_encoder.\1"),
    (r"(decoder\..+)", r"\1"),
    (_UNIT + r"(in|out)_conv\.weight", r"\1.transform.conv_\2.weight"),
    (_UNIT + r"(in|out)_ln\.(\w+)", r"\1.transform.attend.norm_\2.\3"),
    (_UNIT + r"glo\.(blocks\..+)", r"\1.transform.attend.\2"),
    (_UNIT + r"gs\.(in|out)_ln\.(\w+)", r"\1.mask.attend.norm_\2.\3"),
    (_UNIT + r"gs\.glo\.(blocks\..+)", r"\1.mask.attend.\2"),
    (_UNIT + r"gs\.proj_in\.(\w+)", r"\1.mask.project.\2"),
    (_UNIT + r"gs\.fe([248])\.(.+)", r"\1.mask.scales.\2.\3"),
    (_UNIT + r"gs\.tran\.(\w+)", r"\1.mask.merge.\2"),
    (_UNIT + r"gs\.proj_out1\.(\w+)", r"\1.mask.head.\2"),
]
_COLORNET = [
    (r"(in|out)_conv\.weight", r"conv_\1.weight"),
    (r"fuse\.(\d\..+)", r"blocks.\1"),
]
_CAF = [
    (r"(encoder[12]\..+)", r"\1"),
    (r"(dense\..+)", r"\1"),
    (r"fuse\.0\.0\.(\w+)", r"head.0.\1"),
    (r"fuse\.1\.([01]\..+)", r"head.2.\1"),
    (r"fuse\.2\.0\.(\w+)", r"head.3.\1"),
]
_CONVNEXT = {"dwconv": "conv_dw", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
_CONVNEXT |= {"grn.gamma": "mlp.grn.weight", "grn.beta": "mlp.grn.bias"}
# Tables and masks that are computed here, and convolutions that the authors' networks never call.
_FRUFN_UNUSED = re.compile(
    r".+\.(relative_coords_table|relative_position_index|attn_mask)"
    r"|update_block\.trans\.0\.weight|out_conv\.weight"
)
_SIDE = re.compile(r"\b(stem|encoder|attend|qkv|project|refine)([12])\b")


def convert_refusion(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ReFusion's and TDFusion's release (140 entries) to the names of `models.refusion.ReFusion`.

    The authors' convolution wrapper registers each weight twice, as `X.weight` and
    `X.conv.weight`: 54 of the entries are copies. They must agree.

    Raises:
        ValueError: two copies differ, or a key is not one of that release.
    """
    converted = {}
    for key, value in state.items():
        if key.endswith(".conv.weight"):
            original = key.removesuffix(".conv.weight") + ".weight"
            if original in state:
                if not torch.equal(value, state[original]):
                    raise ValueError(f"{key} and {original} should be the same weight, but differ")
                continue
            key = original
        converted[_rename(key, _REFUSION)] = value
    return converted


def convert_frufn(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """FRUFN's and EFRUFN's release to the names of `models.frufn`.

    Left out are the Swin blocks' buffers, and weights which never take part: EFRUFN's
    `update_block.trans` (18,432 numbers) and FRUFN's `out_conv` (288).

    Raises:
        ValueError: a key is not one of that release.
    """
    converted = {}
    for key, value in state.items():
        if _FRUFN_UNUSED.fullmatch(key):
            continue
        name = re.sub(r"^update_block\.", "unit.", key)
        name = re.sub(r"^fuser\.u(\d)\.", lambda unit: f"units.{int(unit[1]) - 1}.", name)
        name = _rename(name, _FRUFN).replace(".main.", ".body.")
        converted.update([_rename_convnext(name, value)])
    return converted


def convert_colornet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ColorNet's release to the names of `models.colornet.ColorNet`.

    Raises:
        ValueError: a key is not one of that release.
    """
    return dict(_rename_convnext(_rename(key, _COLORNET), v) for key, v in state.items())


def convert_caf(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CAF's release (46 entries) to the names of `models.caf.CAF`.

    The authors' `.pth` files hold a whole pickled module under the key `fuse`; what is renamed here
    is that module's `state_dict()`.

    Raises:
        ValueError: a key is not one of that release.
    """
    return {_rename(key, _CAF): value for key, value in state.items()}


def _rename_convnext(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    for theirs, ours in _CONVNEXT.items():
        if f".{theirs}" in name:
            value = value.flatten() if theirs.startswith("grn.") else value
            return name.replace(f".{theirs}", f".{ours}"), value
    return name, value


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, key):
            name = re.sub(pattern, replacement, key)
            return _SIDE.sub(lambda side: f"{side[1]}_{'ab'[int(side[2]) - 1]}", name)
    raise ValueError(f"unknown key {key}")


def to_ours(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of model `name` under our names, whichever names it came with."""
    if name == "refusion" and any(key.startswith(("project_in_", "FM.")) for key in state):
        return convert_refusion(state)
    if name in ("frufn", "efrufn") and any(
        k.startswith(("fuser.", "update_block.")) for k in state
    ):
        return convert_frufn(state)
    if name == "colornet" and any(key.startswith("fuse.") for key in state):
        return convert_colornet(state)
    if name == "caf" and any(key.startswith(("encoder1.", "fuse.")) for key in state):
        return convert_caf(state)
    if name.startswith("tcmoa") and is_release(state):
        return convert_tcmoa(state)
    return state


def release_options(name: str, state: dict[str, torch.Tensor]) -> dict:
    """Options with which model `name` behaves as the authors' does, if these are their weights."""
    return RELEASE_OPTIONS if name.startswith("tcmoa") and is_release(state) else {}
