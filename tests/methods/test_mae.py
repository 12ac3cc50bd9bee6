"""Masked autoencoders: masking, the loss by hand, training and resume, the way into TC-MoA."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from fusionkit.color import luminance
from fusionkit.datasets.embedded import EmbeddedPairs
from fusionkit.methods.mae import MAEMethod
from fusionkit.models.mae import MaskedAutoencoder, fill_backbone, load_mae
from fusionkit.models.registry import WEIGHTS
from fusionkit.models.tcmoa import TCMoA, tcmoa_base, tcmoa_tiny
from fusionkit.models.weight_files import read_state
from fusionkit.models.windows import sine_cosine_grid
from fusionkit.training import fit

SMALL = {
    "width": 32, "depth": 2, "heads": 2,
    "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2,
}  # fmt: skip


def make_autoencoder(seed: int = 0) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return MaskedAutoencoder(**SMALL)


def pictures(count: int = 2, channels: int = 1) -> torch.Tensor:
    """Smooth pictures (count, channels, 112, 112): waves of random direction."""
    generator = torch.Generator().manual_seed(4)
    fy, fx, phase = torch.rand(3, count, channels, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(112.0), torch.arange(112.0), indexing="ij")
    return 0.5 + 0.5 * torch.sin(0.2 * (fy * y + fx * x) + 6 * phase)


# The network


def test_patches_are_what_the_network_predicts():
    """The last layer's order of values is that of TC-MoA's picture."""
    autoencoder, network = make_autoencoder(), TCMoA(**SMALL)
    images = pictures(2, 3)
    values = autoencoder.patches(images)
    assert values.shape == (2, 196, 768)
    grid = values.unflatten(1, (14, 14)).unflatten(-1, (16, 16, 3))
    enlarged = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    expected = torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(enlarged * network.std + network.mean, expected)
    gray = pictures(1)
    torch.testing.assert_close(
        autoencoder.patches(gray), autoencoder.patches(gray.expand(-1, 3, -1, -1))
    )


def test_three_quarters_are_hidden_and_hidden_patches_do_not_matter():
    autoencoder, images = make_autoencoder(), pictures(2)
    torch.manual_seed(1)
    prediction, hidden = autoencoder(images)
    assert prediction.shape == (2, 196, 768)
    assert hidden.sum(1).tolist() == [147, 147]
    assert not torch.equal(hidden[0], hidden[1])
    torch.manual_seed(2)
    assert not torch.equal(autoencoder(images)[1], hidden)
    spoiled = images.clone()
    for picture, row in zip(spoiled, hidden, strict=True):
        for place in row.nonzero().flatten().tolist():
            y, x = 8 * (place // 14), 8 * (place % 14)
            # Enlarging looks half a pixel beyond a patch: spoil its inside.
            picture[:, y + 1 : y + 7, x + 1 : x + 7] = 0.0
    torch.manual_seed(1)
    torch.testing.assert_close(autoencoder(spoiled)[0], prediction)
    place = (~hidden[0]).nonzero()[0].item()
    spoiled[0, :, 8 * (place // 14) + 4, 8 * (place % 14) + 4] += 0.5
    torch.manual_seed(1)
    assert not torch.allclose(autoencoder(spoiled)[0], prediction)


def test_visible_tokens_keep_their_places():
    """Without any mask, the order in which tokens are drawn changes nothing."""
    autoencoder, images = make_autoencoder(), pictures(1)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        prediction, hidden = autoencoder(images, mask_ratio=0.0)
        assert not hidden.any()
        results.append(prediction)
    torch.testing.assert_close(*results)


def test_position_embeddings_are_fixed():
    autoencoder = make_autoencoder()
    assert torch.equal(autoencoder.encoder_position, sine_cosine_grid(32))
    assert not any("position" in name for name, _ in autoencoder.named_parameters())


@pytest.mark.parametrize("shape", [(1, 1, 96, 112), (1, 2, 112, 112), (1, 112, 112)])
def test_bad_pictures(shape):
    with pytest.raises(ValueError, match=r"expected \(B, 1 or 3, 112, 112\)"):
        make_autoencoder()(torch.rand(shape))


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_bad_ratio(ratio):
    with pytest.raises(ValueError, match=f"mask_ratio is {ratio}"):
        make_autoencoder()(pictures(1), ratio)


# Into TC-MoA


def neutral_network(**options) -> TCMoA:
    """TC-MoA without what it adds: no relative positions, and layers which pass tokens on."""
    network = TCMoA(**SMALL, restandardise=False, **options).eval()
    with torch.no_grad():
        for tower in (network.encoder, network.decoder):
            for layer in tower.layers:
                layer.mixing.fill_(1.0)
            for table in tower.relative_position:
                table.table.zero_()
    return network


def test_weights_mean_the_same_in_tcmoa():
    """One window of TC-MoA is an autoencoder that sees everything, shifted blocks included."""
    autoencoder = make_autoencoder()
    network = fill_backbone(neutral_network(), autoencoder)
    images = pictures(1, 3)
    with torch.no_grad():
        prediction, _ = autoencoder(images, mask_ratio=0.0)
        stem = network.stem(images, images)
        encoded, _ = network.encoder.rest(stem.tokens, network.task, None)
        decoded, _ = network.decode(encoded, network.task)
    grid = prediction.unflatten(1, (14, 14)).unflatten(-1, (16, 16, 3))
    expected = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


def test_file_and_module_fill_alike(tmp_path):
    autoencoder = make_autoencoder()
    path = tmp_path / "mae.safetensors"
    save_file(autoencoder.state_dict(), path)
    torch.manual_seed(5)
    before = TCMoA(**SMALL)
    torch.manual_seed(5)
    filled = load_mae(TCMoA(**SMALL), path)
    for name, value in autoencoder.state_dict().items():
        if name != "mask_token":
            assert torch.equal(filled.state_dict()[name], value)
    trained = {name for name, p in filled.named_parameters() if p.requires_grad}
    unchanged = {
        k for k, v in filled.state_dict().items() if torch.equal(v, before.state_dict()[k])
    }
    assert trained <= unchanged
    backbone = {name for name, p in filled.named_parameters() if not p.requires_grad}
    assert {name for name, _ in autoencoder.named_parameters()} - {"mask_token"} == backbone
    fill_backbone(TCMoA(**SMALL, tuning="adaptformer"), autoencoder)
    with pytest.raises(ValueError, match=r"mae.safetensors: not a masked autoencoder of this size"):
        load_mae(tcmoa_tiny(), path)
    with pytest.raises(ValueError, match=r"^not a masked autoencoder of this size"):
        fill_backbone(tcmoa_tiny(), autoencoder)


def test_shipped_autoencoder_gives_pictures_back():
    """What the tiny network starts from: a picture that it has not seen, with no patch hidden."""
    autoencoder = MaskedAutoencoder.like(tcmoa_tiny())
    state = read_state(WEIGHTS / "mae_tiny.safetensors")
    autoencoder.load_state_dict(state)
    pairs = EmbeddedPairs("mfif", count=4, size=(112, 112))
    images = torch.stack([luminance(pair["target"]) for pair in pairs])
    with torch.no_grad():
        prediction, _ = autoencoder(images, mask_ratio=0.0)
    error = (prediction - autoencoder.patches(images)).square().mean().item()
    assert error < 0.05 * autoencoder.patches(images).var().item()
    filled = load_mae(tcmoa_tiny())
    assert all(
        torch.equal(filled.state_dict()[k], v) for k, v in state.items() if k != "mask_token"
    )


def test_backbones_without_a_path(monkeypatch):
    with pytest.raises(ValueError, match="no autoencoder of width 32 is at hand, only of 64, 768"):
        load_mae(TCMoA(**SMALL))

    def refuse(name, **options):
        raise OSError(f"no route to {name}")

    monkeypatch.setattr(timm, "create_model", refuse)
    with torch.device("meta"):
        base = tcmoa_base()
    with pytest.raises(FileNotFoundError, match=r"vit_base_patch16_224.mae could not .*no route"):
        load_mae(base)


def test_like_a_network():
    network = tcmoa_tiny()
    autoencoder = MaskedAutoencoder.like(network)
    fill_backbone(network, autoencoder)
    assert autoencoder.decoder.blocks[0].attn.num_heads == 4
    assert len(autoencoder.encoder.blocks) == 8


# The method


class FixedPrediction(MaskedAutoencoder):
    """Predicts one value everywhere, and hides the first patches."""

    value = 0.0

    def forward(self, pictures, mask_ratio):
        hidden = torch.zeros(len(pictures), 196, dtype=torch.bool)
        hidden[:, : round(196 * mask_ratio)] = True
        return torch.full((len(pictures), 196, 768), self.value), hidden


def test_loss_by_hand():
    autoencoder = FixedPrediction(**SMALL)
    image = torch.full((1, 1, 112, 112), 0.485)
    image[:, :, :56] += 0.229  # one standard deviation of red in the upper half
    method = MAEMethod(autoencoder, steps=1, mask_ratio=0.25)
    losses = method.losses(image)
    targets = autoencoder.patches(image)
    torch.testing.assert_close(losses["hidden"], targets[:, :49].square().mean())
    torch.testing.assert_close(losses["visible"], targets[:, 49:].square().mean())
    red = targets.unflatten(-1, (256, 3))[..., 0]
    torch.testing.assert_close(red[:, :49], torch.ones(1, 49, 256))

    normalised = MAEMethod(autoencoder, steps=1, mask_ratio=0.75, normalise_patches=True)
    assert normalised.losses(pictures(1))["hidden"].item() == pytest.approx(1.0, abs=1e-2)
    autoencoder.value = 2.0
    assert normalised.losses(pictures(1))["hidden"].item() == pytest.approx(5.0, abs=1e-2)


@pytest.mark.parametrize("visible_weight", [0.0, 1.0])
def test_step_uses_every_picture_and_lowers_the_error(visible_weight):
    method = MAEMethod(
        make_autoencoder(), steps=60, warmup_steps=2, lr=3e-3, visible_weight=visible_weight
    )
    one, two, three = pictures(3).split(1)
    batch = {"ivif": {"a": one, "b": two, "name": ["x"]}, "image": three}
    seen = []
    losses_of = method.losses
    method.losses = lambda images: seen.append(images) or losses_of(images)
    reports = [method.step(batch) for _ in range(20)]
    assert torch.equal(seen[0], torch.cat([one, two, three]))
    first, last = (r["hidden"] + visible_weight * r["visible"] for r in (reports[0], reports[-1]))
    assert last < 0.85 * first
    assert method.steps_taken == 20


def test_without_weight_on_them_visible_patches_teach_nothing():
    gradients = []
    for weight in (0.0, 1.0):
        method = MAEMethod(make_autoencoder(), steps=10, visible_weight=weight)
        taken = []
        method.update = lambda name, g, taken=taken: taken.extend(g)
        torch.manual_seed(1)
        method.step({"image": pictures(1)})
        gradients.append(taken)
    torch.manual_seed(1)
    method = MAEMethod(make_autoencoder(), steps=10)
    torch.manual_seed(1)
    hidden = method.losses(pictures(1))["hidden"]
    expected = torch.autograd.grad(hidden, list(method.autoencoder.parameters()))
    for found, wanted in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert not torch.allclose(gradients[1][0], gradients[0][0])


def train(out_dir: Path, **options) -> MAEMethod:
    method = MAEMethod(make_autoencoder(), steps=6, warmup_steps=2, lr=1e-3, visible_weight=0.5)
    data = [{"a": a[None, 0], "b": a[None, 1]} for a in pictures(8).view(4, 2, 112, 112)]
    loader = DataLoader(data, batch_size=2, shuffle=True)
    settings = {"checkpoint_every": 2, "log_every": 1, "device": "cpu", "progress": False}
    log = fit(method, loader, out_dir=out_dir, **{**settings, **options})
    assert list(log.columns) == ["step", "hidden", "visible", "seconds"]
    return method


def test_resumed_run_equals_the_straight_one_bit_for_bit(tmp_path):
    straight = train(tmp_path / "straight", steps=5)
    train(tmp_path / "halves", steps=3)
    resumed = train(tmp_path / "halves", steps=5)
    ours, theirs = resumed.state_dict(), straight.state_dict()
    assert all(torch.equal(ours["modules"][k], v) for k, v in theirs["modules"].items())
    assert ours["steps_taken"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio is 0.0, expected more than 0"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0, .* less than 1"),
        ({"visible_weight": -1.0}, "visible_weight is -1.0, expected at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MAEMethod(make_autoencoder(), steps=1, **options)
