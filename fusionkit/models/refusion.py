"""ReFusion's three networks: fusion F, loss proposal P and reconstruction R.

Source: Bai et al., ReFusion: Learning Image Fusion from Reconstruction with Learnable Loss via
Meta-Learning, IJCV 2024. TDFusion (CVPR 2025) fuses with the same F.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from fusionkit.models.blocks import (
    ChannelAttention,
    ProjectedQKV,
    conv1x1,
    conv3x3,
    parts_pay,
    restormer_stage,
)
from fusionkit.models.onednn import depthwise_gelu, depthwise_times, pointwise
from fusionkit.models.streaming import Walk

FULL_PRECISION_PIXELS = 2**24  # a picture's features take 2 GiB of float32 there


class GatedProjection(nn.Module):
    """One source's share of the gated refinement: value × gate, projected to 2·dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.value = nn.Sequential(conv1x1(dim, 4 * dim), conv3x3(4 * dim, 4 * dim, 4 * dim))
        self.project = conv1x1(4 * dim, 2 * dim)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        expand, depthwise = self.value
        return self.project(depthwise_times(expand(x), depthwise.weight, gate))


class CrossAttention(nn.Module):
    """Each source asks the other: queries of one on keys and values of the other, added to it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attend_a, self.attend_b = ChannelAttention(heads), ChannelAttention(heads)
        self.qkv_a, self.qkv_b = ProjectedQKV(dim), ProjectedQKV(dim)
        self.project_a, self.project_b = conv1x1(dim, dim), conv1x1(dim, dim)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (qa, ka, va), (qb, kb, vb) = self.qkv_a(a), self.qkv_b(b)
        return (
            a + self.attend_a(qb, ka, va, self.project_a),
            b + self.attend_b(qa, kb, vb, self.project_b),
        )

    def queries_keys(
        self, a: torch.Tensor, b: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the two attentions compare."""
        (qa, ka), (qb, kb) = self.qkv_a.queries_keys(a), self.qkv_b.queries_keys(b)
        return [(qb, ka), (qa, kb)]

    def finish(
        self, a: torch.Tensor, b: torch.Tensor, statistics: list[tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` with the `channel_statistics` of `queries_keys` given."""
        va, vb = self.qkv_a.values(a), self.qkv_b.values(b)
        return (
            a + self.attend_a.with_statistics(statistics[0], va, self.project_a),
            b + self.attend_b.with_statistics(statistics[1], vb, self.project_b),
        )


class AdaptiveFusion(nn.Module):
    """The adaptive fusion module (AFM): cross-attention, concatenation, gated refinement.

    Two maps (B, dim, H, W) -> one (B, 2·dim, H, W). Without `interaction` and without `gating` it
    is plain concatenation (rows III to V of the paper's Table 4).
    """

    def __init__(self, dim: int, heads: int, interaction: bool = True, gating: bool = True) -> None:
        super().__init__()
        self.interaction = CrossAttention(dim, heads) if interaction else None
        self.gate = None
        if gating:
            gates = 8 * dim  # 4·dim for each source
            self.gate = nn.Sequential(conv1x1(2 * dim, gates), conv3x3(gates, gates, gates))
            self.refine_a, self.refine_b = GatedProjection(dim), GatedProjection(dim)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.interaction is not None:
            a, b = self.interaction(a, b)
        return self.refine(a, b)

    def refine(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Concatenation and gated refinement of what the cross-attention returned."""
        joint = torch.cat([a, b], dim=1)
        if self.gate is None:
            return joint
        gate_a, gate_b = self._gates(joint)
        return joint + self.refine_a(a, gate_a) + self.refine_b(b, gate_b)

    def _gates(self, joint: torch.Tensor) -> Sequence[torch.Tensor]:
        """GELU of each source's half of the gate's channels."""
        if not parts_pay(joint):
            return F.gelu(self.gate(joint)).chunk(2, dim=1)
        (weight_a, weight_b), (taps_a, taps_b) = (layer.weight.chunk(2) for layer in self.gate)
        gate_a = depthwise_gelu(pointwise(joint, weight_a), taps_a)
        return gate_a, depthwise_gelu(pointwise(joint, weight_b), taps_b)


class PictureHead(nn.Sequential):
    """Features to a picture: 3×3 to 16 channels, LeakyReLU, 3×3 to 1, sigmoid. Range (0, 1)."""

    def __init__(self, in_dim: int, dim: int = 16) -> None:
        super().__init__(conv3x3(in_dim, dim), nn.LeakyReLU(0.01), conv3x3(dim, 1), nn.Sigmoid())


class ReFusion(nn.Module):
    """The fusion module F (59,856 parameters at its defaults).

    Args:
        dim: width of each source's encoder; the decoder is twice as wide.
        heads: attention heads everywhere.
        blocks: Restormer blocks a stage.
        interaction, gating: parts of the adaptive fusion module, for the ablations.
        decision: the head's output is a decision map D, and the fused picture D·a + (1 - D)·b
            (row II of Table 4), instead of the picture itself.

    Attributes:
        cpu_tile: side of the tiles in which it streams fastest on a CPU, in whose cache they stay.
    """

    cpu_tile = 128

    def __init__(
        self,
        dim: int = 16,
        heads: int = 8,
        blocks: int = 2,
        interaction: bool = True,
        gating: bool = True,
        decision: bool = False,
    ) -> None:
        super().__init__()
        self.decision = decision
        self.stem_a, self.stem_b = conv3x3(1, dim), conv3x3(1, dim)
        self.encoder_a = restormer_stage(dim, heads, blocks)
        self.encoder_b = restormer_stage(dim, heads, blocks)
        self.fusion = AdaptiveFusion(dim, heads, interaction, gating)
        self.decoder = restormer_stage(2 * dim, heads, blocks)
        self.head = PictureHead(2 * dim, dim)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Luminances a, b (B, 1, H, W) in [0, 1] -> fused (B, 1, H, W) in (0, 1); any H and W."""
        features = self.fusion(self.encoder_a(self.stem_a(a)), self.encoder_b(self.stem_b(b)))
        out = self.head(self.decoder(features))
        return out * a + (1 - out) * b if self.decision else out

    @torch.no_grad()
    def stream(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        tile: int = 256,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """`forward`'s result without its memory: no gradients, any size, exact to rounding.

        Attention over channels sees the whole picture, so tiles cannot be fused one by one. Here
        every stage walks over tiles of side `tile`; 2·dim channels of type `dtype` are held at full
        size, and nothing else is. By default that is float32 up to 16 megapixels, and beyond, where
        it would fill gibibytes, float16.
        """
        if dtype is None:
            dtype = torch.float32 if a.numel() <= FULL_PRECISION_PIXELS else torch.float16
        walk = Walk(*a.shape[-2:], tile)
        channels = 2 * self.stem_a.out_channels
        features = torch.empty(
            (len(a), channels, *a.shape[-2:]),
            dtype=dtype,
            device=a.device,
            memory_format=torch.channels_last,
        )
        halves = features.chunk(2, dim=1)
        for source, stem, encoder, half in zip(
            (a, b),
            (self.stem_a, self.stem_b),
            (self.encoder_a, self.encoder_b),
            halves,
            strict=True,
        ):
            walk.read(stem, source, half, halo=1)
            for block in encoder:
                walk.attend(half, block.queries_keys, block.finish)
        fusion = self.fusion
        if fusion.interaction is None:
            walk.update(lambda x: fusion(*x.chunk(2, dim=1)), features, halo=1)
        else:
            walk.attend(
                features,
                lambda x: fusion.interaction.queries_keys(*x.chunk(2, dim=1)),
                lambda x, s: fusion.refine(*fusion.interaction.finish(*x.chunk(2, dim=1), s)),
            )
        for block in self.decoder:
            walk.attend(features, block.queries_keys, block.finish)
        out = torch.empty_like(a)
        walk.read(self.head, features, out, halo=2)
        return out * a + (1 - out) * b if self.decision else out


class LossProposal(nn.Module):
    """The loss proposal module P: {[W_a, W_b], [V_a, V_b]} = P(I_a, I_b, ∇I_a, ∇I_b).

    The authors have not released it. This one has the trunk of TDFusion's loss generator (by the
    same first author), one two-channel stem for each source (the picture and its gradient), and
    a head for W and one for V.

    Args:
        intensity_prior, gradient_prior: how far W and V lean, before P has learned anything, to
            the source with more detail: the logits start at ±prior/2 times the contrast
            (∇I_a - ∇I_b) / (∇I_a + ∇I_b), for W that of the 7×7 neighbourhood. 0 is the paper's P,
            which starts near 1/2 everywhere; a few thousand steps of meta-learning do not take it
            far from there.
    """

    def __init__(
        self,
        dim: int = 16,
        heads: int = 8,
        blocks: int = 2,
        intensity_prior: float = 0.0,
        gradient_prior: float = 0.0,
    ) -> None:
        super().__init__()
        self.intensity_prior, self.gradient_prior = intensity_prior, gradient_prior
        self.stem_a, self.stem_b = conv3x3(2, dim), conv3x3(2, dim)
        self.encoder_a = restormer_stage(dim, heads, blocks)
        self.encoder_b = restormer_stage(dim, heads, blocks)
        self.decoder = restormer_stage(2 * dim, heads, blocks)
        self.intensity_head = _logit_head(2 * dim, dim)
        self.gradient_head = _logit_head(2 * dim, dim)

    def forward(
        self, a: torch.Tensor, b: torch.Tensor, grad_a: torch.Tensor, grad_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Four (B, 1, H, W) -> W and V, (B, 2, H, W) each; channel 0 belongs to a, 1 to b."""
        features_a = self.encoder_a(self.stem_a(torch.cat([a, grad_a], dim=1)))
        features_b = self.encoder_b(self.stem_b(torch.cat([b, grad_b], dim=1)))
        features = self.decoder(torch.cat([features_a, features_b], dim=1))
        w, v = self.intensity_head(features), self.gradient_head(features)
        gradients = torch.cat([grad_a, grad_b], dim=1)
        if self.intensity_prior:
            blurred = F.avg_pool2d(gradients, 7, stride=1, padding=3, count_include_pad=False)
            w = w + self.intensity_prior / 2 * _contrast(blurred)
        if self.gradient_prior:
            v = v + self.gradient_prior / 2 * _contrast(gradients)
        return w.softmax(dim=1), v.softmax(dim=1)


def _logit_head(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(conv3x3(in_dim, dim), nn.PReLU(), conv3x3(dim, 2))


def _contrast(gradients: torch.Tensor) -> torch.Tensor:
    """±(∇a - ∇b) / (∇a + ∇b) of (B, 2, H, W); 0.1 keeps flat, noisy regions undecided."""
    difference = gradients[:, :1] - gradients[:, 1:]
    contrast = difference / (gradients.sum(dim=1, keepdim=True) + 0.1)
    return torch.cat([contrast, -contrast], dim=1)


class Reconstruction(nn.Module):
    """The reconstruction module R: both sources back from the fused picture.

    Not released either: a stem, then for each source a branch of Restormer blocks and F's head.
    """

    def __init__(self, dim: int = 16, heads: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.stem = conv3x3(1, dim)
        self.branch_a = nn.Sequential(restormer_stage(dim, heads, blocks), PictureHead(dim, dim))
        self.branch_b = nn.Sequential(restormer_stage(dim, heads, blocks), PictureHead(dim, dim))

    def forward(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused (B, 1, H, W) -> the reconstructed a and b, (B, 1, H, W) each, in (0, 1)."""
        features = self.stem(fused)
        return self.branch_a(features), self.branch_b(features)
