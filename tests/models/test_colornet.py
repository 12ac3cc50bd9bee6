"""ColorNet: the authors' output with the authors' class's weights, sizes, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch

from fusionkit.models import create_model
from fusionkit.models.colornet import ColorNet

SMALL = {"width": 8, "blocks": 2}


def given(height: int = 16, width: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    sizes = ((2, c, height, width) for c in (1, 2, 2))
    return [torch.rand(size, generator=generator) for size in sizes]


@torch.inference_mode()
def test_authors_colours_with_random_weights(shared):
    weights = shared / "weights" / "colornet_random.safetensors"
    network = create_model("colornet", checkpoint=weights).eval()
    golden = np.load(shared / "golden" / "frufn_extra.npz")
    y, cr_a, cb_a, cr_b, cb_b = torch.from_numpy(golden["color_in"]).split(1, dim=1)
    cbcr = network(y, torch.cat([cb_a, cr_a], dim=1), torch.cat([cb_b, cr_b], dim=1))
    expected = torch.from_numpy(golden["color_out"])  # Cr, Cb
    torch.testing.assert_close(cbcr[:, :1], expected[:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(cbcr[:, 1:], expected[:, :1], rtol=0, atol=1e-5)


def test_parameter_count_is_the_papers():
    assert sum(p.numel() for p in ColorNet().parameters()) == 132_336


def test_authors_names_are_converted(tmp_path):
    torch.manual_seed(0)
    network = ColorNet(**SMALL)
    names = {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2", "norm": "norm"}
    state = {}
    for key, value in network.state_dict().items():
        torch.nn.init.normal_(value)
        key = key.replace("blocks", "fuse").replace("conv_in", "in_conv")
        key = key.replace("conv_out", "out_conv")
        if "mlp.grn" in key:
            key = key.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
            value = value.view(1, 1, 1, -1)
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = value.clone()
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(state, path)
    loaded = create_model("colornet", checkpoint=path, **SMALL).state_dict()
    for key, value in network.state_dict().items():
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=0)
    safetensors.torch.save_file({**state, "fuse.9": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"unknown key fuse\.9"):
        create_model("colornet", checkpoint=path, **SMALL)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (1, 1)])
def test_any_size_keeps_its_shape(size):
    network = ColorNet(**SMALL)
    cbcr = network(*given(*size))
    assert cbcr.shape == (2, 2, *size)
    cbcr.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_new_weights_give_the_mean_and_leave_it_by_training():
    torch.manual_seed(0)
    network = ColorNet(**SMALL)
    y, a, b = given()
    torch.testing.assert_close(network(y, a, b), (a + b) / 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(2):  # the blocks' share of the output is 0 until the last convolution moves
        optimizer.zero_grad()
        network(y, a, b).square().mean().backward()
        optimizer.step()
    still = [name for name, p in network.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_the_sources_have_different_roles():
    network = ColorNet(**SMALL)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    y, a, b = given()
    assert not torch.allclose(network(y, a, b), network(y, b, a))


def test_wrong_channels_are_refused():
    y, a, _ = given()
    with pytest.raises(
        ValueError, match=r"\[2, 1, 2\] channels; expected luminance 1 and chroma 2"
    ):
        ColorNet(**SMALL)(a, y, a)
