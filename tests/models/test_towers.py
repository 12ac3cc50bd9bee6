"""What stands in for TC-MoA layers in the ablations: AdaptFormer's bottlenecks, or nothing."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from fusionkit.models.tcmoa import tcmoa_tiny
from fusionkit.models.towers import ParallelMlp, Tower


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, 1, 1, 40, 56, generator=generator))


def test_bottleneck_by_hand():
    torch.manual_seed(0)
    mlp, x = ParallelMlp(24, hidden_features=48), torch.randn(5, 24)
    plain = Mlp(24, hidden_features=48)
    plain.load_state_dict({k: v for k, v in mlp.state_dict().items() if k.startswith("fc")})
    assert mlp.down.out_features == 2
    expected = plain(x) + 0.1 * mlp.up(mlp.down(x).clamp_min(0))
    torch.testing.assert_close(mlp(x), expected)


@torch.inference_mode()
def test_adaptformer_starts_as_the_frozen_backbone():
    torch.manual_seed(0)
    adaptformer, linear = (
        tcmoa_tiny(tuning="adaptformer").eval(),
        tcmoa_tiny(tuning="linear").eval(),
    )
    shared = {k: v for k, v in adaptformer.state_dict().items() if ".mlp.up" not in k}
    linear.load_state_dict({k: v for k, v in shared.items() if ".mlp.down" not in k})
    a, b = pair()
    torch.testing.assert_close(adaptformer(a, b), linear(a, b))
    for block in adaptformer.encoder.blocks:
        nn.init.normal_(block.mlp.up.weight)
    assert not torch.allclose(adaptformer(a, b), linear(a, b))


@torch.inference_mode()
def test_sources_meet_after_the_encoder():
    network = tcmoa_tiny(tuning="linear").eval()
    a, b = pair()
    out = network.explain(a, b, "mfif")
    assert out.prompts == out.gates == {"encoder": (), "decoder": ()}
    assert out.auxiliary == 0
    assert not torch.allclose(out.fused, network(a, a))
    torch.testing.assert_close(out.fused, network(b, a))
    torch.testing.assert_close(out.fused, network(a, b, "ivif"))


def test_what_is_trained():
    names = {
        tuning: {k for k, p in tcmoa_tiny(tuning=tuning).named_parameters() if p.requires_grad}
        for tuning in ("adaptformer", "linear")
    }
    assert names["linear"] == {"decoder_pred.weight", "decoder_pred.bias"}
    parts = (".mlp.up.", ".mlp.down.", ".relative_position.")
    assert all(any(part in name for part in parts) for name in names["adaptformer"])
    assert len(names["adaptformer"]) == 12 * 4 + 6


@pytest.mark.parametrize("interval", [2, 4, 8])
def test_interval_decides_the_number_of_layers(interval):
    tower = Tower(
        32, 16, 2, interval, False, adapters=2, active=1, combine="log", restandardise=False
    )
    assert len(tower.layers) == 16 // interval


def test_bad_tuning():
    with pytest.raises(ValueError, match="unknown tuning 'lora'; expected one of tcmoa, adaptform"):
        tcmoa_tiny(tuning="lora")
