"""Gradients of parts of a batch add up to the whole batch's, where a method says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import DataLoader

from fusionkit.batches import parts_of
from fusionkit.methods.base import Method
from fusionkit.methods.caf_terms import fixed_weights, term_names
from fusionkit.methods.gradient_transfer import GradientTransferMethod
from fusionkit.methods.refusion import ReFusionMethod
from fusionkit.methods.weighted_loss import WeightedLossTraining
from fusionkit.models.frufn import FRUFN
from fusionkit.models.refusion import ReFusion
from fusionkit.training import fit


def refusion(seed: int = 0) -> ReFusion:
    torch.manual_seed(seed)
    return ReFusion(dim=4, heads=2, blocks=1).double()


def frufn() -> FRUFN:
    torch.manual_seed(0)
    return FRUFN(width=8, heads=2, units=1).double()


def pictures(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    a, b, target = torch.rand(3, count, 1, 16, 24, dtype=torch.float64, generator=generator)
    return {"a": a, "b": b, "target": target}


METHODS = {
    "ivif": lambda: GradientTransferMethod(refusion(), task="ivif", lr=1e-2, clip=1e-3),
    "mfif": lambda: GradientTransferMethod(refusion(), task="mfif", lr=1e-2, anneal_steps=5),
    "taught": lambda: GradientTransferMethod(refusion(), task="ivif", teacher=refusion(1), lr=1e-2),
    "autoencoder": lambda: GradientTransferMethod(frufn(), task="ivif", warmup_steps=5, lr=1e-2),
    "weighted": lambda: WeightedLossTraining(
        refusion(), fixed_weights("average", term_names(None)), lr=1e-2
    ),
}


def weights(method: Method) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in method.modules.parameters()])


@pytest.mark.parametrize("parts", [2, 3])  # of equal and of unequal parts
@pytest.mark.parametrize("name", METHODS)
def test_parts_give_the_update_of_the_whole(name, parts):
    whole, cut = METHODS[name](), METHODS[name]()
    start = weights(whole)
    for _ in range(2):
        expected = whole.step(pictures(4))
        found = cut.step_in_parts(pictures(4), parts)
    assert found == pytest.approx(expected, rel=1e-9)
    assert whole.steps_taken == cut.steps_taken == 2
    assert (weights(whole) - start).abs().max() > 1e-3
    torch.testing.assert_close(weights(cut), weights(whole), rtol=0, atol=1e-9)


def test_fit_accumulates(tmp_path):
    stacked = pictures(6)
    items = [{key: value[i] for key, value in stacked.items()} for i in range(6)]
    loader = DataLoader(items, batch_size=4)  # the second batch has two items: parts of one
    found = {}
    for parts in (1, 4):
        method = METHODS["mfif"]()
        sizes = []
        method.fusion.register_forward_hook(
            lambda m, inputs, out, sizes=sizes: sizes.append(len(out))
        )
        out = tmp_path / str(parts)
        fit(method, loader, steps=4, out_dir=out, accumulate=parts, device="cpu", progress=False)
        found[parts] = weights(method), sizes
    assert found[1][1] == [4, 2, 4, 2]
    assert found[4][1] == [1] * 12
    torch.testing.assert_close(found[4][0], found[1][0], rtol=0, atol=1e-9)


def test_a_failing_part_leaves_no_trace():
    method, undisturbed = METHODS["mfif"](), METHODS["mfif"]()
    with pytest.raises(ValueError, match="needs pairs with a 'target'"):
        method.step_in_parts({k: v for k, v in pictures(4).items() if k != "target"}, 2)
    method.step(pictures(4))
    undisturbed.step(pictures(4))
    assert torch.equal(weights(method), weights(undisturbed))


def test_meta_learning_does_not_accumulate(tmp_path):
    method = ReFusionMethod(refusion())
    before = copy.deepcopy(method.fusion.state_dict())
    message = "ReFusionMethod does not accumulate gradients: .*expected accumulate=1"
    with pytest.raises(ValueError, match=message):
        method.step_in_parts(pictures(4), 2)
    loader = DataLoader([pictures(1)], batch_size=1)
    with pytest.raises(ValueError, match=message):
        fit(method, loader, steps=1, out_dir=tmp_path, accumulate=2, device="cpu")
    with pytest.raises(ValueError, match="accumulate is 0, expected at least 1"):
        fit(method, loader, steps=1, out_dir=tmp_path, accumulate=0, device="cpu")
    torch.testing.assert_close(method.fusion.state_dict(), before, rtol=0, atol=0)


def test_parts_of_nested_batches_and_lists():
    batch = {"ivif": {"a": torch.arange(5)}, "boxes": ["p", "q", "r", "s", "t"]}
    pieces = parts_of(batch, 2)
    assert [piece["ivif"]["a"].tolist() for piece, _ in pieces] == [[0, 1], [2, 3, 4]]
    assert [piece["boxes"] for piece, _ in pieces] == [["p", "q"], ["r", "s", "t"]]
    assert [share for _, share in pieces] == [0.4, 0.6]
    assert len(parts_of(batch, 9)) == 5
