"""Blocks that are computed again: the same gradients from less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.utils.data import DataLoader

from fusionkit.checkpointing import blocks, recomputed
from fusionkit.memory import saved_bytes
from fusionkit.methods.gradient_transfer import GradientTransferMethod
from fusionkit.methods.refusion import ReFusionMethod
from fusionkit.models.blocks import RestormerBlock
from fusionkit.models.caf import CAF
from fusionkit.models.frufn import FRUFN
from fusionkit.models.refusion import ReFusion
from fusionkit.models.tcmoa import tcmoa_tiny
from fusionkit.training import fit

NETWORKS = {
    "refusion": lambda: ReFusion(dim=8, heads=2),
    "frufn": lambda: FRUFN(width=8, heads=2, units=3),
    "tcmoa": lambda: tcmoa_tiny(),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def pair(side: int = 32) -> torch.Tensor:
    return torch.rand(2, 1, 1, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_equal_and_less_is_kept(name):
    model = network(name).train()
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        torch.manual_seed(5)  # the routers' noise
        loss = model(*pair()).square().mean()
        return torch.autograd.grad(loss, trained, materialize_grads=True)

    plain, memory = gradients(), saved_bytes(lambda: model(*pair()))
    with recomputed(model):
        again, less = gradients(), saved_bytes(lambda: model(*pair()))
    torch.testing.assert_close(again, plain)
    assert less < 0.6 * memory
    assert not any("forward" in vars(module) for module in model.modules())


def test_weights_of_a_functional_call_are_those_computed_again():
    model = network("refusion").double()
    theta = {n: (1.3 * p).detach().requires_grad_() for n, p in model.named_parameters()}

    def gradients():
        fused = functional_call(model, theta, tuple(pair().double()))
        first = torch.autograd.grad(fused.square().mean(), list(theta.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), list(theta.values()))
        return [*first, *second]

    plain = gradients()
    with recomputed(model):
        again = gradients()
    torch.testing.assert_close(again, plain)


def test_forward_mode_passes():
    model, (a, b) = network("refusion"), pair()
    with recomputed(model):
        _, found = jvp(lambda x: model(x, b), (a,), (b,))
    _, expected = jvp(lambda x: model(x, b), (a,), (b,))
    torch.testing.assert_close(found, expected)


def test_which_blocks():
    found = blocks(ReFusion(dim=8, heads=2))
    assert len(found) == 6
    assert all(isinstance(block, RestormerBlock) for block in found)
    assert blocks(CAF()) == []  # batch norm
    model = FRUFN(width=8, heads=2, units=3)
    assert [block for block in blocks(model) if block in list(model.units)] == list(model.units)


@pytest.mark.parametrize("method", ["meta", "transfer"])
def test_fit_trains_the_same(tmp_path, method):
    items = [dict(zip("ab", pair(16)[:, 0] * (1 - 0.1 * i), strict=True)) for i in range(4)]
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = ReFusion(dim=4, heads=2, blocks=1)
        built = (
            ReFusionMethod(model, lr=1e-2, inner_lr=0.1, meta_steps=1, fusion_steps=1)
            if method == "meta"
            else GradientTransferMethod(model, task="ivif", lr=1e-2)
        )
        fit(
            built,
            DataLoader(items, batch_size=2),
            steps=2,
            out_dir=tmp_path / str(checkpointing),
            checkpointing=checkpointing,
            device="cpu",
            progress=False,
        )
        found.append(torch.cat([p.detach().flatten() for p in built.modules.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
