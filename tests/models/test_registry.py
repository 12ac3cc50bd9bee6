"""Models by name, and their weights on disk: every layout that is read, and every refusal."""

from __future__ import annotations

import errno
import json
import pickle
import re

import pytest
import safetensors
import safetensors.torch
import torch

from fusionkit.models import create_model, list_models, registry, weight_files
from fusionkit.models.refusion import ReFusion
from fusionkit.models.weight_files import save_weights
from fusionkit.versus import Apart

LOADS = """
import json
import fusionkit
from fusionkit._apart import peak_resident

def growth(path, options):
    before = peak_resident()
    network = fusionkit.create_model("tcmoa_tiny", checkpoint=path, **json.loads(options))
    return peak_resident() - before
"""
SMALL = {"dim": 4, "heads": 2, "blocks": 1}


@pytest.fixture
def network() -> ReFusion:
    torch.manual_seed(3)
    return ReFusion(**SMALL)


def load(path, **options) -> ReFusion:
    torch.manual_seed(4)
    return create_model("refusion", checkpoint=path, **{**SMALL, **options})


def assert_same_weights(loaded: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    assert loaded.state_dict().keys() == state.keys()
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def complaint(path, error: type[Exception] = ValueError, **options) -> str:
    with pytest.raises(error) as caught:
        load(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Names


def test_list_models():
    names = list_models()
    assert "refusion" in names
    assert names == sorted(names)
    assert list_models("refus*") == ["refusion"]
    assert list_models("nothing*") == []


def test_list_of_pretrained_models(tmp_path, monkeypatch, network):
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    assert list_models(pretrained=True) == []
    save_weights(network, tmp_path / "refusion_mif.safetensors")
    save_weights(network, tmp_path / "refusion_ivif.safetensors")
    assert list_models(pretrained=True) == ["refusion_ivif", "refusion_mif"]
    assert list_models("*_mif", pretrained=True) == ["refusion_mif"]


def test_one_network_for_all_tasks_has_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tcmoa_tiny\.safetensors: no weights"):
        create_model("tcmoa_tiny", pretrained=True)
    trained = create_model("tcmoa_tiny")
    save_weights(trained, tmp_path / "tcmoa_tiny.safetensors")
    save_weights(trained, tmp_path / "mae_tiny.safetensors")  # no model of the registry
    assert list_models(pretrained=True) == ["tcmoa_tiny"]
    for task, expected in ((None, "ivif"), ("mfif", "mfif"), ("mif", "ivif")):
        loaded = create_model("tcmoa_tiny", task, pretrained=True)
        assert_same_weights(loaded, trained.state_dict())
        assert loaded.task == {expected: 1.0}
        assert loaded.reduction == "area"
    nearest = create_model("tcmoa_tiny", pretrained=True, reduction="nearest")
    assert nearest.reduction == "nearest"


@pytest.mark.parametrize(
    "name", ["refusion", "caf", "frufn", "efrufn", "colornet", "tcmoa_tiny", "tcmoa_small"]
)
def test_no_part_of_a_model_hides_what_modules_have(name):
    model, seen = create_model(name), []
    model.apply(lambda module: seen.append(type(module)))
    assert len(seen) == len(list(model.modules()))


def test_create_model_passes_options():
    assert isinstance(create_model("refusion"), ReFusion)
    assert create_model("refusion", dim=4, heads=2, decision=True).decision
    assert create_model("refusion", task="mfif", **SMALL).stem_a.out_channels == 4


def test_unknown_model_names_it_and_those_there_are():
    with pytest.raises(ValueError, match=r"unknown model 'refusoin'.*'refusion'.*expected one of"):
        create_model("refusoin")
    with pytest.raises(ValueError, match=r"unknown model 'xyz'; expected one of.*refusion"):
        create_model("xyz")


def test_unknown_task_names_it_and_those_there_are():
    with pytest.raises(ValueError, match=r"unknown task 'ivf'.*'ivif'.*ivif, mfif, meif, mif"):
        create_model("refusion", task="ivf")
    with pytest.raises(ValueError, match="unknown task 'nightvision'; expected"):
        create_model("refusion", task="nightvision", pretrained=True)


def test_pretrained_and_checkpoint_exclude_each_other(tmp_path, network):
    path = save_weights(network, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="pretrained=True or a checkpoint, not both"):
        create_model("refusion", task="ivif", pretrained=True, checkpoint=path)


def test_pretrained_needs_a_task():
    with pytest.raises(ValueError, match="refusion need a task: ivif, mfif, meif, mif"):
        create_model("refusion", pretrained=True)


def test_pretrained_weights_by_task(tmp_path, monkeypatch, network):
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    save_weights(network, tmp_path / "refusion_mif.safetensors")
    loaded = create_model("refusion", "mif", pretrained=True, **SMALL)
    assert_same_weights(loaded, network.state_dict())
    with pytest.raises(FileNotFoundError, match=r"refusion_ivif\.safetensors.*'ivif'"):
        create_model("refusion", "ivif", pretrained=True, **SMALL)


# Layouts which are read


def test_round_trip(tmp_path, network):
    path = save_weights(network, tmp_path / "new" / "x.safetensors", {"task": "ivif"})
    assert_same_weights(load(path), network.state_dict())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"task": "ivif"}


def test_half_precision_is_for_the_file_alone(tmp_path, network):
    halved = [key for key in network.state_dict() if key.endswith("weight")]
    whole = save_weights(network, tmp_path / "whole.safetensors")
    path = save_weights(network, tmp_path / "half.safetensors", half=halved)
    assert path.stat().st_size < 0.7 * whole.stat().st_size
    expected = network.state_dict()
    expected |= {key: expected[key].half().float() for key in halved}
    loaded = load(path)
    assert_same_weights(loaded, expected)
    assert all(value.dtype == torch.float32 for value in loaded.state_dict().values())


def test_loading_keeps_what_a_network_is_built_with(tmp_path):
    built = create_model("tcmoa_tiny")
    path = save_weights(built, tmp_path / "x.safetensors")
    torch.manual_seed(7)
    loaded = create_model("tcmoa_tiny", checkpoint=path)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    torch.testing.assert_close(drawn, torch.rand(1))  # weights that are read need not be drawn
    assert_same_weights(loaded, built.state_dict())
    for (name, parameter), expected in zip(
        loaded.named_parameters(), built.parameters(), strict=True
    ):
        assert parameter.requires_grad == expected.requires_grad, name
        assert isinstance(parameter, torch.nn.Parameter)
    for name, buffer in built.named_buffers():  # also those that are not in the file
        torch.testing.assert_close(loaded.get_buffer(name), buffer)


def test_a_loaded_network_does_not_hang_on_its_file(tmp_path, network):
    path = save_weights(network, tmp_path / "x.safetensors")
    loaded = load(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # in place
    assert_same_weights(loaded, network.state_dict())


def test_a_network_is_built_where_torch_is_told_to(tmp_path, network):
    path = save_weights(network, tmp_path / "x.safetensors")
    with torch.device("meta"):
        loaded = load(path)
    assert {x.device.type for x in loaded.state_dict().values()} == {"meta"}


def test_weights_that_share_memory_in_a_file_are_their_own_in_the_network(tmp_path, network):
    """Tied tensors, a slice of a larger one, and one that repeats itself: all may be trained."""
    state = network.state_dict()
    keys = [key for key in state if ".norm" in key]
    large = torch.rand(1000)
    state |= dict.fromkeys(keys[:2], torch.rand(SMALL["dim"]))
    state[keys[2]] = large[: SMALL["dim"]]
    state[keys[3]] = torch.tensor(0.5).expand(SMALL["dim"])
    torch.save(state, tmp_path / "x.pth")
    loaded = load(tmp_path / "x.pth")
    assert_same_weights(loaded, state)
    parameters = [loaded.get_parameter(key) for key in keys[:4]]
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)
    assert len({p.data_ptr() for p in parameters}) == len(parameters)
    with torch.no_grad():
        parameters[3] += torch.arange(SMALL["dim"])


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path, network, monkeypatch):
    path = save_weights(network, tmp_path / "x.safetensors")
    opened = []

    def replaced(*args):
        if opened:
            save_weights(ReFusion(**SMALL), path)
        opened.append(args)
        return safetensors.safe_open(*args)

    monkeypatch.setattr(weight_files, "safe_open", replaced)
    assert "replaced while it was read" in complaint(path)


def test_weights_are_in_memory_once_while_they_load(tmp_path):
    wide = {"width": 768, "depth": 4, "decoder_width": 64, "decoder_depth": 2}
    path = save_weights(create_model("tcmoa_tiny", **wide), tmp_path / "x.safetensors")
    script = tmp_path / "loads.py"
    script.write_text(LOADS)
    with Apart(f"{script}:growth", [str(path), json.dumps(wide)]) as apart:
        apart()
        growth = float(apart.output())
    assert 0.5 < growth / path.stat().st_size < 1.5


def test_round_trip_from_channels_last(tmp_path, network):
    path = save_weights(network.to(memory_format=torch.channels_last), tmp_path / "x.safetensors")
    assert_same_weights(load(path), network.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"module." + k: v for k, v in s.items()},
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {"module." + k: v for k, v in s.items()}},
        lambda s: {
            "method": {
                "modules": {
                    **{"fusion." + k: v for k, v in s.items()},
                    "proposal.stem_a.weight": torch.zeros(1),
                },
                "optimizers": {"fusion": {"state": {}, "param_groups": []}},
                "steps_taken": 3,
            },
            "step": 3,
        },
    ],
    ids=["plain", "data parallel", "model", "state_dict", "both", "training checkpoint"],
)
def test_pth_layouts(tmp_path, network, wrap):
    path = tmp_path / "x.pth"
    torch.save(wrap(network.state_dict()), path)
    assert_same_weights(load(path), network.state_dict())


# Refusals


def test_missing_and_unknown_keys_are_named(tmp_path, network):
    path = tmp_path / "x.safetensors"
    state = network.state_dict()
    del state["head.0.weight"]
    safetensors.torch.save_file(state, path)
    assert "missing keys head.0.weight" in complaint(path)
    state = {**network.state_dict(), "head.9.weight": torch.zeros(1)}
    safetensors.torch.save_file(state, path)
    assert "unknown keys head.9.weight" in complaint(path)


def test_wrong_shape_is_named(tmp_path, network):
    path = save_weights(network, tmp_path / "x.safetensors")
    message = complaint(path, dim=6)
    assert "stem_a.weight has shape (4, 1, 3, 3), expected (6, 1, 3, 3)" in message


def test_another_network_is_refused(tmp_path):
    path = save_weights(torch.nn.Conv2d(1, 1, 3), tmp_path / "x.safetensors")
    message = complaint(path)
    assert "not a checkpoint of refusion" in message
    assert "missing keys" in message
    assert "unknown keys bias, weight" in message


def test_a_refused_file_leaves_the_network_alone(tmp_path, network):
    path = tmp_path / "x.safetensors"
    before = {k: v.clone() for k, v in network.state_dict().items()}
    state = {k: torch.zeros_like(v) for k, v in before.items()}
    state["head.2.weight"] = torch.zeros(1)
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError, match=r"head\.2\.weight has shape"):
        registry.load_checkpoint(network, "refusion", path)
    assert_same_weights(network, before)


def test_nonexistent_file(tmp_path):
    assert "no such checkpoint" in complaint(tmp_path / "nowhere.safetensors", FileNotFoundError)
    assert "no such checkpoint" in complaint(tmp_path, FileNotFoundError)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.99])
def test_truncated_file(tmp_path, network, suffix, share):
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save(network.state_dict(), path)
    else:
        save_weights(network, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "not a readable file of weights" in complaint(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_file_of_something_else(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"<html>404: not found</html>" * 100)
    assert "not a readable file of weights" in complaint(path)


@pytest.mark.parametrize(
    "content",
    [{"lr": 0.1}, [torch.zeros(1)], torch.zeros(3)],
    ids=["numbers", "list", "tensor"],
)
def test_pth_without_a_dictionary_of_tensors(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    assert "expected a dictionary of tensors" in complaint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "content", [{"method": {}}, {"method": 3}, {0: torch.zeros(1)}], ids=["method", "int", "key"]
)
def test_pth_of_an_odd_layout(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    complaint(tmp_path / "x.pth")


class Trap:
    def __reduce__(self):
        return exec, ("import builtins; builtins.trap_sprung = True",)


def test_a_pickle_with_code_is_refused(tmp_path, network):
    import builtins

    path = tmp_path / "x.pth"
    torch.save({**network.state_dict(), "trap": Trap()}, path)
    assert "not a readable file of weights" in complaint(path)
    path.write_bytes(pickle.dumps(Trap()))
    assert "not a readable file of weights" in complaint(path)
    assert not hasattr(builtins, "trap_sprung")


# The authors' names

INVERSE = [
    (r"stem(\d)\.", r"project_in_\1."),
    (r"head\.0\.", "project_out_0."),
    (r"head\.2\.", "project_out_1."),
    (r"\.norm(\d)\.", r".norm\1.body."),
    (r"\.attention\.attend\.temperature", ".attn.temperature"),
    (r"\.attention\.qkv\.0\.", ".attn.qkv."),
    (r"\.attention\.qkv\.1\.", ".attn.qkv_dwconv."),
    (r"\.attention\.project\.", ".attn.project_out."),
    (r"\.feed_forward\.expand\.", ".ffn.project_in."),
    (r"\.feed_forward\.depthwise\.", ".ffn.dwconv."),
    (r"\.feed_forward\.project\.", ".ffn.project_out."),
    (r"fusion\.interaction\.attend(\d)\.temperature", r"FM.temperature\1"),
    (r"fusion\.interaction\.qkv(\d)\.0\.", r"FM.qkv\1."),
    (r"fusion\.interaction\.qkv(\d)\.1\.", r"FM.qkv\1_dwconv."),
    (r"fusion\.interaction\.project(\d)\.", r"FM.project_mid\1."),
    (r"fusion\.gate\.0\.", "FM.project_E."),
    (r"fusion\.gate\.1\.", "FM.project_E_d."),
    (r"fusion\.refine(\d)\.value\.0\.", r"FM.project_E\1."),
    (r"fusion\.refine(\d)\.value\.1\.", r"FM.project_E\1_d."),
    (r"fusion\.refine(\d)\.project\.", r"FM.project_out\1."),
]


def authors_name(key: str) -> str:
    key = re.sub(r"_([ab])\b", lambda side: "12"["ab".index(side[1])], key)
    for pattern, replacement in INVERSE:
        key = re.sub(pattern, replacement, key)
    return key


def authors_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in network.state_dict().items():
        name = authors_name(key)
        state[name] = value.clone()
        if value.ndim == 4:  # their convolution wrapper holds its weight twice
            state[name.removesuffix("weight") + "conv.weight"] = value.clone()
    return state


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_authors_names_are_converted(tmp_path, suffix):
    torch.manual_seed(0)
    network = ReFusion()
    with torch.no_grad():  # no two tensors alike, so that any mix-up shows
        for parameter in network.parameters():
            parameter.normal_()
    state = authors_state(network)
    assert len(state) == 140
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save({"model": {"module." + k: v for k, v in state.items()}}, path)
    else:
        safetensors.torch.save_file(state, path)
    assert_same_weights(create_model("refusion", checkpoint=path), network.state_dict())


def test_authors_names_in_the_real_file(shared):
    with safetensors.safe_open(shared / "weights" / "refusion_ivif.safetensors", "pt") as file:
        assert set(file.keys()) == authors_state(ReFusion()).keys()


def test_either_copy_alone_is_enough(tmp_path, network):
    state = authors_state(network)
    path = tmp_path / "x.safetensors"
    for without in (
        {k: v for k, v in state.items() if not k.endswith(".conv.weight")},
        {k: v for k, v in state.items() if k[: -len("weight")] + "conv.weight" not in state},
    ):
        assert len(without) < len(state)
        safetensors.torch.save_file(without, path)
        assert_same_weights(load(path), network.state_dict())


def test_copies_that_differ_are_refused(tmp_path, network):
    state = authors_state(network)
    state["FM.project_E.conv.weight"] += 1
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(state, path)
    message = complaint(path)
    assert "FM.project_E.conv.weight and FM.project_E.weight" in message
    assert "differ" in message


def test_unknown_and_missing_authors_keys_are_named(tmp_path, network):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({**authors_state(network), "FM.extra": torch.zeros(1)}, path)
    assert "unknown key FM.extra" in complaint(path)
    state = authors_state(network)
    del state["FM.temperature2"]
    safetensors.torch.save_file(state, path)
    assert "missing keys fusion.interaction.attend_b.temperature" in complaint(path)


# A full disk


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("exists", [True, False])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, network, call, exists):
    path = tmp_path / "x.safetensors"
    if exists:
        save_weights(network, path)
    before = path.read_bytes() if exists else None

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"os.{call}", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(ReFusion(**SMALL), path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ([path.name] if exists else [])
    if exists:
        assert path.read_bytes() == before
