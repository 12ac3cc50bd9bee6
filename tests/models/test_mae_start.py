"""Starts of small networks: the autoencoder as a linear code, TC-MoA as the average."""

from __future__ import annotations

import copy

import pytest
import torch

from fusionkit.color import luminance
from fusionkit.datasets.embedded import EmbeddedPairs
from fusionkit.models.mae import MaskedAutoencoder, fill_backbone
from fusionkit.models.mae_start import average_start, fit_last_layer, linear_start
from fusionkit.models.tcmoa import TCMoA, tcmoa_small, tcmoa_tiny


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


COMPONENTS = 60


@pytest.fixture(scope="module")
def wide() -> MaskedAutoencoder:
    torch.manual_seed(0)
    autoencoder = MaskedAutoencoder.like(tcmoa_small())
    return linear_start(autoencoder, pictures(0, 16), COMPONENTS, carrier_length=48.0)


def test_wide_tokens_lose_next_to_nothing(wide):
    assert relative_error(wide, pictures(1)) < 0.001


def averaging(autoencoder: MaskedAutoencoder) -> TCMoA:
    network = fill_backbone(tcmoa_small(reduction="area"), autoencoder)
    return average_start(network, COMPONENTS).eval()


def mean_squared(x: torch.Tensor) -> float:
    return x.square().mean().item()


@torch.no_grad()
def test_fusion_starts_as_the_average(wide):
    """Even where nothing of it has been trained, and with every prompt at a half."""
    network = averaging(fit_last_layer(copy.deepcopy(wide), pictures(0, 16), mode="nearest"))
    a, b = pictures(1, 4), pictures(2, 4)
    average = (a + b) / 2
    for task in ("ivif", "mfif"):
        out = network.explain(a, b, task)
        assert mean_squared(out.fused - average) < 0.02 * average.var()
        for prompts in (*out.prompts["encoder"], *out.prompts["decoder"]):
            torch.testing.assert_close(prompts, torch.full_like(prompts, 0.5))


def test_fusion_that_starts_as_the_average_can_learn(wide):
    torch.manual_seed(0)
    network = averaging(wide).train()
    network(pictures(1, 1), pictures(2, 1)).square().mean().backward()
    for layer in (*network.encoder.layers, *network.decoder.layers):
        for adapter in layer.adapters:
            assert adapter[-1].weight.grad.abs().max() > 0
        # Also the channels that the projection leaves free.
        assert layer.fusion[-1].weight.grad.flatten(1).abs().amax(0).min() > 0
        assert layer.mixing.grad != 0


@torch.no_grad()
def test_last_layer_for_sharp_pictures(wide):
    """Averaging 2×2 pixels of what was enlarged smoothly blurs; of repeated pixels it does not."""
    x = pictures(1)
    errors = {}
    for mode in ("bilinear", "nearest"):
        autoencoder = fit_last_layer(copy.deepcopy(wide), pictures(0, 16), mode)
        patches = autoencoder(x, mask_ratio=0.0)[0].unflatten(-1, (16, 16, 3))
        gray = (patches * autoencoder.std.view(3) + autoencoder.mean.view(3)).mean(-1)
        small = torch.nn.functional.avg_pool2d(gray, 2).unflatten(1, (14, 14))
        errors[mode] = mean_squared(small.transpose(2, 3).flatten(3).flatten(1, 2)[:, None] - x)
    assert errors["nearest"] < errors["bilinear"] / 2
