"""The authors' released checkpoints: recognised by their keys, renamed, checked strictly."""

from __future__ import annotations

import re

import torch

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
    return state
