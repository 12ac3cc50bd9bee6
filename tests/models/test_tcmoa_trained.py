"""The TC-MoAs that ship: what their prompts and routers do to pictures they have not seen."""

from __future__ import annotations

import itertools

import pytest
import torch

from fusionkit.color import luminance
from fusionkit.datasets.embedded import EmbeddedPairs
from fusionkit.fuse import fuse
from fusionkit.models import create_model
from fusionkit.models.adapters import ROUTED_TASKS, PromptControl
from fusionkit.models.tcmoa import TCMoA, TCMoAOutput

SIZE = (112, 112)


@pytest.fixture(scope="module", params=["tcmoa_tiny", "tcmoa_small"])
def network(request) -> TCMoA:
    return create_model(request.param, pretrained=True).eval()


def sources(task: str, size=SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    pair = EmbeddedPairs(task, count=2, size=size, seed=1)[1]
    return tuple(luminance(pair[key])[None] for key in "ab")


@torch.inference_mode()
def controlled(network: TCMoA, task: str, alpha: float, beta: float) -> TCMoAOutput:
    return network.explain(*sources(task), task, PromptControl(alpha, beta))


@pytest.mark.parametrize("task", ROUTED_TASKS)
def test_beta_moves_the_picture_from_b_to_a(network, task):
    fused = [controlled(network, task, 1.0, beta).fused for beta in (-0.3, -0.15, 0.0, 0.15, 0.3)]
    to_a, to_b = ([(f - x).abs().mean().item() for f in fused] for x in sources(task))
    assert all(later < earlier for earlier, later in itertools.pairwise(to_a)), to_a
    assert all(later > earlier for earlier, later in itertools.pairwise(to_b)), to_b


@pytest.mark.parametrize("task", ROUTED_TASKS)
def test_alpha_spreads_the_prompts(network, task):
    spreads = []
    for alpha in (0.0, 0.5, 1.0, 2.0, 3.0):
        out = controlled(network, task, alpha, 0.0)
        prompts = torch.stack([p for ps in out.prompts.values() for p in ps])
        spreads.append((prompts - 0.5).abs().mean().item())
    assert spreads[0] < 1e-6
    assert all(later > earlier for earlier, later in itertools.pairwise(spreads)), spreads


@torch.inference_mode()
def test_router_shares_differ_by_task(network):
    a, b = sources("ivif")
    shares = {}
    for task in ROUTED_TASKS:
        gates = network.explain(a, b, task).gates
        shares[task] = torch.stack([g.mean((0, 2, 3)) for gs in gates.values() for g in gs])
    for one, other in itertools.combinations(ROUTED_TASKS, 2):
        assert (shares[one] - shares[other]).abs().sum(1).max() > 0.1, (one, other)


@torch.inference_mode()
def test_fused_picture_resembles_the_sources(network):
    """Not a test of quality: a network that lost its weights would fail it."""
    for task in ROUTED_TASKS:
        a, b = sources(task)
        fused = network(a, b, task)
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        outside = (low - fused).clamp(min=0) + (fused - high).clamp(min=0)
        assert outside.mean() < 0.03


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (57, 131)])
def test_any_size_gray_and_colour(network, size):
    pair = EmbeddedPairs("mfif", count=1, size=size, seed=2)[0]
    gray = [luminance(pair[key]) for key in "ab"]
    assert fuse(*gray, "mfif", model=network).shape == (1, *size)
    chroma = fuse(pair["a"], pair["b"], "mfif", model="tcmoa_tiny", device="cpu")
    assert chroma.shape == (3, *size)
    with torch.inference_mode():
        direct = network(pair["a"][None], pair["b"][None], "mfif")
    assert direct.shape == (1, 3, *size)
    assert 0 <= direct.min() < direct.max() <= 1
