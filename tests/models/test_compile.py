"""Compiled networks are the same networks, also where second derivatives are taken."""

from __future__ import annotations

import copy
import shutil
import sys

import pytest
import torch
from torch import nn

from fusionkit.methods.bilevel import directional_derivative
from fusionkit.methods.refusion import ReFusionMethod
from fusionkit.models import create_model
from fusionkit.models.refusion import LossProposal, Reconstruction
from fusionkit.models.weight_files import save_weights

TINY = {"dim": 4, "heads": 2, "blocks": 1}


@pytest.fixture
def traced(monkeypatch):
    """Compilation by tracing alone, which takes no C++ compiler; how often a graph was made."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    own = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: own(self, backend=backend, **options)
    )
    torch.compiler.reset()
    yield graphs
    torch.compiler.reset()


def network(**options) -> nn.Module:
    torch.manual_seed(0)
    return create_model("refusion", **TINY, **options)


def test_a_compiled_network_is_the_same_network(traced, tmp_path):
    plain, compiled = network(), network(compile=True)
    assert type(compiled) is type(plain)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    a, b = torch.rand(2, 1, 1, 12, 20)
    with torch.no_grad():
        for height, width in ((12, 20), (9, 16)):
            found = compiled(a[..., :height, :width], b[..., :height, :width])
            expected = plain(a[..., :height, :width], b[..., :height, :width])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert traced
        made = len(traced)
        torch.testing.assert_close(compiled.stream(a, b, tile=8), plain(a, b), rtol=0, atol=1e-5)
    assert len(traced) == made
    path = save_weights(compiled, tmp_path / "weights.safetensors")
    again = create_model("refusion", checkpoint=path, compile=True, **TINY)
    torch.testing.assert_close(again.state_dict(), plain.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        copy.deepcopy(compiled)(a, b)  # copies are not compiled, but do work


def test_a_derivative_along_a_direction_steps_aside(traced):
    plain, compiled = network().double(), network(compile=True).double()
    a, b, direction = torch.rand(3, 1, 1, 8, 9, dtype=torch.float64)
    expected = directional_derivative(lambda x: plain(x, b), [a], [direction])
    found = directional_derivative(lambda x: compiled(x, b), [a], [direction])
    assert not traced
    torch.testing.assert_close(found, expected)


def test_meta_learning_takes_compiled_networks(traced):
    batch = dict(zip("ab", torch.rand(2, 4, 1, 8, 10), strict=True))
    weights = []
    for compile in (False, True):
        fusion = network(compile=compile)
        proposal, reconstruction = LossProposal(**TINY), Reconstruction(**TINY)
        parts = {"proposal": proposal, "reconstruction": reconstruction}
        method = ReFusionMethod(
            fusion, **parts, meta_steps=1, fusion_steps=1, inner_lr=0.5, lr=1e-2
        )
        method.step(batch)
        weights.append(torch.cat([p.detach().flatten() for p in method.modules.parameters()]))
    assert traced
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-5)


@pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("g++") or shutil.which("clang++")),
    reason="needs a C++ compiler",
)
def test_inductor_gives_the_same_picture():
    torch.manual_seed(0)
    compiled = create_model("caf", dim=4, steps=1, compile=True).eval()
    a, b = torch.rand(2, 1, 1, 12, 20)
    with torch.no_grad():
        found = compiled(a, b)
        expected = compiled.forward(a, b)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
