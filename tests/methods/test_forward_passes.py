"""No network sees a batch twice with the same weights in one step.

One pass in forward mode is the exception: it needs what happens inside the network beside its
tangents, which no backward pass keeps for it.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from fusionkit.methods.caf import CAFSearch
from fusionkit.methods.refusion import ReFusionMethod
from fusionkit.methods.tdfusion import TDFusionMethod
from fusionkit.models.loss_generator import LossGenerator
from fusionkit.models.refusion import LossProposal, Reconstruction, ReFusion

from .perception_cases import TinySegmentation, make_batch

TINY = {"dim": 4, "heads": 2, "blocks": 1}


def passes(network: nn.Module) -> Counter:
    """Counts the network's calls by weights, input and mode, from now on."""
    found: Counter = Counter()

    def count(module, inputs):
        with torch.no_grad(), torch._C._DisableFuncTorch():
            weights = sum(_value(p) for p in module.parameters())
            pictures = tuple(_value(x) for x in inputs if isinstance(x, torch.Tensor))
        found[weights, pictures, torch._C._are_functorch_transforms_active()] += 1

    network.register_forward_pre_hook(count)
    return found


def _value(x: torch.Tensor) -> float:
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.detach().double().sum().item()


def refusion(meta_gradient: str) -> ReFusionMethod:
    own = {"proposal": LossProposal(**TINY), "reconstruction": Reconstruction(**TINY)}
    options = {"meta_steps": 1, "fusion_steps": 1, "inner_lr": 0.5, "lr": 1e-2}
    return ReFusionMethod(ReFusion(**TINY), meta_gradient=meta_gradient, **own, **options)


def tdfusion(**options) -> TDFusionMethod:
    generator = LossGenerator(**TINY)
    options = {"meta_steps": 1, "fusion_steps": 1, "inner_lr": 0.5, "inner_task_lr": 0.5, **options}
    return TDFusionMethod(
        ReFusion(**TINY), TinySegmentation(), generator=generator, lr=1e-2, **options
    )


def caf(product: str) -> CAFSearch:
    options = {"inner_lr": 0.5, "lr": 1e-2, "product": product}
    return CAFSearch(ReFusion(**TINY), TinySegmentation(), **options)


# By method and step: the calls of each network, and how many of them are in forward mode.
STEPS = {
    "refusion": (
        lambda: refusion("exact"),
        [
            {"fusion": (2, 1), "proposal": (1, 0), "reconstruction": (2, 0)},
            {"fusion": (1, 0), "proposal": (1, 0), "reconstruction": (1, 0)},
        ],
    ),
    "refusion first order": (
        lambda: refusion("first_order"),
        [{"fusion": (2, 0), "proposal": (1, 0), "reconstruction": (2, 0)}],
    ),
    "tdfusion": (
        tdfusion,
        [
            {"fusion": (2, 1), "task": (2, 0), "generator": (1, 0)},
            {"fusion": (1, 0), "task": (1, 0), "generator": (1, 0)},
        ],
    ),
    "tdfusion, crops": (  # the crop and the whole are two inputs
        lambda: tdfusion(crop_size=8),
        [{"fusion": (3, 1), "task": (2, 0), "generator": (1, 0)}],
    ),
    "caf, difference": (  # F at ω, after its update, after the virtual step, and at ω ± δv
        lambda: caf("finite_difference"),
        [{"fusion": (5, 0), "task": (2, 0)}],
    ),
    "caf, exact": (
        lambda: caf("exact"),
        [{"fusion": (3, 1), "task": (2, 0)}],
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_no_pass_is_computed_twice(name):
    torch.manual_seed(0)
    build, steps = STEPS[name]
    method = build()
    counts = {key: passes(method.modules[key]) for key in steps[0]}
    for expected in steps:
        for found in counts.values():
            found.clear()
        method.step(make_batch(size=(12, 12), dtype=torch.float32))
        for key, found in counts.items():
            assert max(found.values()) == 1, key
            forward_mode = sum(tangents for *_, tangents in found)
            assert (len(found) - forward_mode, forward_mode) == expected[key], key
