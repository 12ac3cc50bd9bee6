"""TC-MoA's released checkpoints and masked autoencoders' files: names, shapes, refusals."""

from __future__ import annotations

import re
import warnings

import pytest
import safetensors.torch
import timm
import torch

from fusionkit.models import create_model
from fusionkit.models.mae import load_mae
from fusionkit.models.official_tcmoa import convert_vit
from fusionkit.models.tcmoa import TCMoA, tcmoa_tiny
from fusionkit.models.weight_files import save_weights

LAYER = r"(encoder|decoder)\.layers\.(\d+)\."
AUTHORS = [  # ours, the encoder's name, the decoder's name
    (r"patch_embed\.(.+)", r"patch_embed.proj.\1", ""),
    (r"(decoder_embed|decoder_pred)\.(.+)", r"\1.\2", ""),
    (r"(?:en|de)coder_position", "pos_embed", "decoder_pos_embed"),
    (r"(?:en|de)coder\.norm\.(.+)", r"norm.\1", r"decoder_norm.\1"),
    (r"(?:en|de)coder\.(blocks\..+)", r"\1", r"decoder_\1"),
    (
        r"(?:en|de)coder\.relative_position\.(\d+)\.table",
        r"en_relative_position.\1.relative_position_bias_table",
        r"de_relative_position.\1.relative_position_bias_table",
    ),
]
INSIDE = {
    "reduce.0": "blocks_MoA.{}.norm1",
    "reduce.1": "blocks_MoA.{}.dimReduction",
    "reduce.2": "blocks_MoA.{}.norm2",
    "routers.gate": "blocks_MoA.{}.MoA.w_gate",
    "routers.noise": "blocks_MoA.{}.MoA.w_noise",
}
INSIDE |= {
    f"adapters.{k}.{n}": f"blocks_MoA.{{}}.MoA.experts.{k}.fc{1 + n // 2}"
    for k in range(4)
    for n in (0, 2)
}
CONVOLUTIONS = {f"fusion.{n}": f"FusionLayer.{{}}.conv{n + 1}" for n in range(3)}


def random_network(**options) -> TCMoA:
    torch.manual_seed(3)
    network = tcmoa_tiny(**options)
    with torch.no_grad():  # no two tensors alike, so that any mix-up shows
        for tensor in network.state_dict().values():
            tensor.normal_()
    return network


def with_class_token(grid: torch.Tensor) -> torch.Tensor:
    rows = grid.flatten(2).transpose(1, 2)
    return torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)


def authors_state(network: TCMoA, embeddings: bool = True) -> dict[str, torch.Tensor]:
    """The weights under the authors' names, written down apart from the converter's rules."""
    state, width = {}, network.patch_embed.out_channels
    mixing: dict[str, list[torch.Tensor]] = {"encoder": [], "decoder": []}
    for key, value in network.state_dict().items():
        decoder = key.startswith("decoder.") or key == "decoder_position"
        if key.endswith("_position"):
            value = with_class_token(value)
        if inside := re.match(LAYER, key):
            rest, j = key[inside.end() :], inside[2]
            part = rest if rest in INSIDE else rest.rpartition(".")[0]
            suffix = rest.removeprefix(part)
            prefix = "decoder_" if decoder else ""
            if rest == "mixing":
                mixing[inside[1]].append(1 - value)
            elif rest == "source_embedding":
                for i, row in enumerate(value.flatten(0, 1) if embeddings else ()):
                    state[f"{prefix}blocks_MoA.{j}.modal_shifts.{i}"] = row
            elif part in INSIDE:
                state[prefix + INSIDE[part].format(j) + suffix] = value
            else:
                name = CONVOLUTIONS[part].format(j) + suffix
                state[("de_" if decoder else "") + name] = value
            continue
        for ours, encoders, decoders in AUTHORS:
            if re.fullmatch(ours, key):
                state[re.sub(ours, decoders if decoder else encoders, key)] = value
    for tower in (network.encoder, network.decoder):
        prefix = "decoder_" if tower is network.decoder else ""
        for j in range(len(tower.layers)):
            state[f"{prefix}blocks_MoA.{j}.MoA.mean"] = torch.zeros(1)
            state[f"{prefix}blocks_MoA.{j}.MoA.std"] = torch.ones(1)
        for i, table in enumerate(tower.relative_position):
            name = f"{'de' if prefix else 'en'}_relative_position.{i}.relative_position_index"
            state[name] = table.index
    state |= {f"Alpha_{tower}": torch.stack(values) for tower, values in mixing.items()}
    state["cls_token"] = torch.zeros(1, 1, width)
    return {key: value.clone() for key, value in state.items()}


def assert_same(network: TCMoA, expected: dict[str, torch.Tensor]) -> None:
    found = network.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=key)


# Released checkpoints


def test_names_and_shapes_are_those_of_the_authors_classes(shared):
    real = safetensors.torch.load_file(shared / "weights" / "tcmoa_tiny.safetensors")
    state = authors_state(random_network())
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in real.items()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_authors_names_are_converted(tmp_path, wrapped):
    network = random_network()
    state = authors_state(network)
    path = tmp_path / "x.pth"
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}} if wrapped else state, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = create_model("tcmoa_tiny", checkpoint=path)
    assert_same(loaded, network.state_dict())


def test_authors_weights_choose_the_authors_behaviour(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(authors_state(random_network()), path)
    loaded = create_model("tcmoa_tiny", checkpoint=path)
    assert loaded.transposed_positions
    assert loaded.reduction == "nearest"
    assert [layer.restandardise for layer in loaded.encoder.layers] == [False, False]
    assert loaded.decoder.layers[0].restandardise
    assert loaded.encoder.layers[0].adapters.combine == "log"
    options = {"restandardise": False, "combine": "sum", "task": "meif"}
    loaded = create_model("tcmoa_tiny", checkpoint=path, **options)
    assert not loaded.decoder.layers[0].restandardise
    assert loaded.encoder.layers[0].adapters.combine == "sum"
    assert loaded.task == {"meif": 1.0}


def test_source_embeddings_that_the_release_lacks_are_drawn_with_a_seed(tmp_path):
    network = random_network()
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(authors_state(network, embeddings=False), path)
    with pytest.warns(UserWarning, match="holds no source embeddings for 3 TC-MoA layers"):
        first, second = (create_model("tcmoa_tiny", checkpoint=path).state_dict() for _ in "ab")
    for key, value in network.state_dict().items():
        if key.endswith("source_embedding"):
            assert 0.015 < first[key].std() < 0.025
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
        else:
            torch.testing.assert_close(first[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"blocks_MoA.0.extra": torch.zeros(1)}, "unknown key blocks_MoA.0.extra"),
        (lambda s: _without(s, "norm.weight"), "missing keys encoder.norm.weight"),
        (lambda s: _without(s, "Alpha_decoder"), "missing keys decoder.layers.0.mixing"),
        (lambda s: _without(s, "blocks_MoA.1.modal_shifts.4"), "source_embedding.4"),
        (lambda s: s | {"pos_embed": torch.zeros(1, 196, 64)}, r"pos_embed has shape \(1, 196"),
        (lambda s: s | {"norm.bias": torch.zeros(9)}, r"encoder.norm.bias has shape \(9,\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, message):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(change(authors_state(random_network())), path)
    with pytest.raises(ValueError, match=message) as caught:
        create_model("tcmoa_tiny", checkpoint=path)
    assert str(path) in str(caught.value)


def _without(state: dict, key: str) -> dict:
    return {k: v for k, v in state.items() if k != key}


def test_our_own_weights_keep_our_defaults(tmp_path):
    network = random_network()
    path = save_weights(network, tmp_path / "x.safetensors")
    loaded = create_model("tcmoa_tiny", checkpoint=path)
    assert_same(loaded, network.state_dict())
    assert not loaded.transposed_positions


# Masked autoencoders


def mae_state(network: TCMoA, decoder: bool = True) -> dict[str, torch.Tensor]:
    """A masked autoencoder's file, or one of an encoder's alone, with this network's weights."""
    state = {
        key: value
        for key, value in authors_state(network).items()
        if not re.search("MoA|FusionLayer|relative_position|Alpha", key)
    }
    if not decoder:
        return {k: v for k, v in state.items() if not k.startswith("decoder")}
    return state | {"mask_token": torch.zeros(1, 1, 48)}


@pytest.mark.parametrize("decoder", [True, False], ids=["whole", "encoder only"])
def test_mae_fills_what_is_frozen(tmp_path, decoder):
    source = random_network()
    path = tmp_path / "mae_visualize_vit_tiny.pth"
    torch.save({"model": mae_state(source, decoder)}, path)
    network = tcmoa_tiny()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_mae(network, path) is network
    messages = [str(w.message) for w in caught]
    assert messages == ([] if decoder else [f"{path} holds no decoder; the model's stays as it is"])
    filled = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    frozen = {k for k, p in network.named_parameters() if not p.requires_grad}
    frozen |= {"encoder_position", "decoder_position"}
    assert filled == {k for k in frozen if decoder or not k.startswith("decoder")}
    for key in filled:
        torch.testing.assert_close(network.state_dict()[key], source.state_dict()[key])


def test_mae_of_timm_has_the_names_of_the_encoder():
    theirs = timm.create_model("vit_base_patch16_224.mae").state_dict()
    with torch.device("meta"):
        ours = create_model("tcmoa_base").state_dict()
    converted = convert_vit(theirs)
    frozen = {k for k in ours if k.startswith(("encoder", "patch_embed"))}
    frozen = {k for k in frozen if ".layers." not in k and ".relative_position." not in k}
    assert {k: v.shape for k, v in converted.items()} == {k: ours[k].shape for k in frozen}


def test_other_files_are_no_masked_autoencoder(tmp_path):
    path = tmp_path / "x.safetensors"
    for state, message in (
        (authors_state(random_network()), "not a masked autoencoder: unknown key"),
        (_without(mae_state(random_network()), "norm.bias"), "missing keys encoder.norm.bias"),
        (mae_state(random_network(depth=4)), "of this size: missing keys encoder.blocks.4"),
    ):
        safetensors.torch.save_file(state, path)
        with pytest.raises(ValueError, match=message) as caught:
            load_mae(tcmoa_tiny(), path)
        assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_mae(tcmoa_tiny(), tmp_path / "nowhere.pth")
