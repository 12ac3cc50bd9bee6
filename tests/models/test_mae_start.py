"""The linear start of a small masked autoencoder."""

from __future__ import annotations

import pytest
import torch

from fusionkit.color import luminance
from fusionkit.datasets.embedded import EmbeddedPairs
from fusionkit.models.mae import MaskedAutoencoder
from fusionkit.models.mae_start import linear_start
from fusionkit.models.tcmoa import tcmoa_tiny


def pictures(seed: int, count: int = 8) -> torch.Tensor:
    pairs = EmbeddedPairs("mfif", count=count, size=(112, 112), seed=seed)
    return torch.stack([luminance(pair["target"]) for pair in pairs])


@torch.no_grad()
def relative_error(autoencoder: MaskedAutoencoder, images: torch.Tensor) -> float:
    prediction, _ = autoencoder(images, mask_ratio=0.0)
    patches = autoencoder.patches(images)
    return ((prediction - patches).square().mean() / patches.var()).item()


def start(components: int) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return linear_start(MaskedAutoencoder.like(tcmoa_tiny()), pictures(0), components)


def test_new_pictures_come_back_and_more_components_bring_more_back():
    few, many = (relative_error(start(n), pictures(1)) for n in (4, 34))
    assert many < 0.01
    assert few > 3 * many


def test_blocks_add_nothing_and_can_learn():
    autoencoder = start(34)
    x = torch.randn(1, 196, 64)
    for block in autoencoder.encoder.blocks:
        torch.testing.assert_close(block(x), x, rtol=0, atol=0)
    torch.manual_seed(1)
    autoencoder(pictures(1, 1))[0].square().mean().backward()
    for block in (*autoencoder.encoder.blocks, *autoencoder.decoder.blocks):
        assert block.attn.proj.weight.grad.abs().max() > 0
        assert block.mlp.fc2.weight.grad.abs().max() > 0


@pytest.mark.parametrize("components", [0, 47])
def test_bad_number_of_components(components):
    with pytest.raises(ValueError, match=f"components is {components}; expected 1 to 46"):
        start(components)
