"""CAF: the authors' output with the authors' weights, their names, sizes, batch norm, refusals."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.func import functional_call

from fusionkit import fuse
from fusionkit.models import create_model
from fusionkit.models.caf import CAF

SMALL = {"dim": 4, "steps": 2}
THEIRS = (
    ("encoder_a", "encoder1"),
    ("encoder_b", "encoder2"),
    ("head.0", "fuse.0.0"),
    ("head.2", "fuse.1"),
    ("head.3", "fuse.2.0"),
)


def pair(height: int = 16, width: int = 24, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(height * width)
    return tuple(torch.rand(2, batch, 1, height, width, generator=generator))


def authors_state(network: CAF) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in network.state_dict().items():
        for ours, theirs in THEIRS:
            key = key.replace(ours, theirs)
        state[key] = value.clone()
    return state


@pytest.mark.parametrize("guide", ["det", "seg"])
@torch.inference_mode()
def test_authors_pictures(shared, guide):
    weights = shared / "weights" / f"caf_{guide}.safetensors"
    network = create_model("caf", "ivif", checkpoint=weights).eval()
    golden = np.load(shared / "golden" / f"caf_{guide}.npz")
    for i in range(3):
        a, b, expected = (torch.from_numpy(golden[f"{key}{i}"]) for key in ("a", "b", "out"))
        torch.testing.assert_close(network(a, b), expected, rtol=0, atol=1e-5)


def test_the_output_goes_below_zero_and_fuse_clips_it(shared):
    weights = shared / "weights" / "caf_seg.safetensors"
    golden = np.load(shared / "golden" / "caf_seg.npz")
    assert golden["out2"].min() < -0.2
    fused = fuse(golden["a2"][0, 0], golden["b2"][0, 0], model="caf", checkpoint=weights)
    expected = torch.from_numpy(golden["out2"][0]).clamp(0, 1)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-5)


def test_parameters_and_buffers_are_the_releases():
    network = create_model("caf")
    assert sum(p.numel() for p in network.parameters()) == 148_321
    assert sum(b.numel() for b in network.buffers()) == 326
    assert len(network.state_dict()) == 46


def test_authors_names_in_the_real_file(shared):
    state = safetensors.torch.load_file(shared / "weights" / "caf_det.safetensors")
    assert state.keys() == authors_state(CAF()).keys()


def test_authors_names_are_converted_strictly(tmp_path):
    torch.manual_seed(0)
    network = CAF(**SMALL)
    with torch.no_grad():  # no two tensors alike, so that any mix-up shows
        for parameter in network.parameters():
            parameter.normal_()
    state = authors_state(network)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(state, path)
    loaded = create_model("caf", checkpoint=path, **SMALL).state_dict()
    for key, value in network.state_dict().items():
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=0)
    safetensors.torch.save_file({**state, "fuse.3.0.bias": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"not a checkpoint of caf: unknown key fuse\.3\.0\.bias"):
        create_model("caf", checkpoint=path, **SMALL)
    safetensors.torch.save_file({k: v for k, v in state.items() if "running_var" not in k}, path)
    with pytest.raises(ValueError, match=r"missing keys dense\.0\.1\.running_var"):
        create_model("caf", checkpoint=path, **SMALL)


class Trap(CAF):
    def __setstate__(self, state):
        builtins.trap_sprung = True


def test_a_pickled_module_is_not_unpickled_and_the_way_out_is_told(tmp_path):
    torch.save({"fuse": Trap(**SMALL)}, tmp_path / "detection.pth")
    with pytest.raises(ValueError, match=r"detection\.pth.*net\.state_dict\(\)") as caught:
        create_model("caf", checkpoint=tmp_path / "detection.pth", **SMALL)
    assert "never loads them" in str(caught.value)
    assert not hasattr(builtins, "trap_sprung")
    # What the message says to do works.
    torch.save(CAF(**SMALL).state_dict(), tmp_path / "weights.pth")
    create_model("caf", checkpoint=tmp_path / "weights.pth", **SMALL)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 13)])
def test_any_size_keeps_its_shape_and_has_gradients(size):
    torch.manual_seed(0)
    network = CAF(**SMALL)
    fused = network(*pair(*size))
    assert fused.shape == (2, 1, *size)
    assert fused.abs().max() < 1
    fused.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_the_sources_have_encoders_of_their_own():
    torch.manual_seed(0)
    network = CAF(**SMALL).eval()
    a, b = pair()
    assert not torch.allclose(network(a, b), network(b, a))


def test_batch_norm_follows_the_mode():
    torch.manual_seed(0)
    network = CAF(**SMALL)
    a, b = pair()
    alone = network.eval()(a[:1], b[:1])
    torch.testing.assert_close(network(a, b)[:1], alone)
    training = network.train()(a, b)[:1]
    assert not torch.allclose(training, alone, atol=1e-3)
    assert network.encoder_a[1].num_batches_tracked == 1


def test_a_step_on_copied_weights_differentiates():
    """What a bilevel search needs: the task loss after one step, by the weight of a loss term."""
    torch.manual_seed(0)
    network = CAF(**SMALL).eval().double()
    a, b = (source.double() for source in pair(8, 8))
    parameters = dict(network.named_parameters())

    def after_a_step(weight: torch.Tensor) -> torch.Tensor:
        loss = weight * (network(a, b) - a).square().mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        stepped = {k: v - 0.1 * g for (k, v), g in zip(parameters.items(), gradients, strict=True)}
        return (functional_call(network, stepped, (a, b)) - b).square().mean()

    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(after_a_step(weight), weight)[0]
    steps = [after_a_step(weight.detach() + e).item() for e in (1e-5, -1e-5)]
    assert slope.item() == pytest.approx((steps[0] - steps[1]) / 2e-5, rel=1e-4)
    assert abs(slope) > 1e-6


@pytest.mark.parametrize("tile", [7, 16, 64])
def test_tiles_give_the_whole_picture(tile):
    torch.manual_seed(0)
    network = CAF(dim=4, steps=2)
    a, b = torch.rand(2, 2, 1, 33, 50)
    network(a, b)  # running statistics of its own
    network.eval()
    with torch.no_grad():
        expected = network(a, b)
    torch.testing.assert_close(network.stream(a, b, tile), expected, rtol=0, atol=1e-6)
