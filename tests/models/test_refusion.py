"""ReFusion's networks: the authors' outputs with the authors' weights, variants, sizes, limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusionkit.losses import sobel
from fusionkit.models import create_model
from fusionkit.models.refusion import AdaptiveFusion, LossProposal, Reconstruction, ReFusion

TASKS = ("ivif", "mfif", "meif", "mif")


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def pair(height: int = 16, width: int = 16, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    return tuple(torch.rand(2, batch, 1, height, width, generator=generator))


def detailed_and_flat(side: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """A fine checkerboard and a flat picture."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    board = ((rows // 2 + columns // 2) % 2).float()[None, None]
    return board, torch.full_like(board, 0.5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("task", TASKS)
@torch.inference_mode()
def test_authors_weights_give_the_authors_pictures(shared, task, memory_format):
    weights = shared / "weights" / f"refusion_{task}.safetensors"
    network = create_model("refusion", checkpoint=weights).eval().to(memory_format=memory_format)
    golden, odd = (np.load(shared / "golden" / f"refusion_{task}{x}.npz") for x in ("", "_odd"))
    triples = [[golden[f"{key}{i}"] for key in ("a", "b", "out")] for i in range(2)]
    triples.append([odd[key] for key in ("a", "b", "out")])
    for a, b, expected in triples:
        a, b = (torch.from_numpy(x).to(memory_format=memory_format) for x in (a, b))
        torch.testing.assert_close(
            network(a, b), torch.from_numpy(expected), rtol=0, atol=1e-5, check_stride=False
        )


def test_parameter_count_is_the_papers():
    assert count(ReFusion()) == 59_856


def test_ablations_run_and_differ():
    options = [{}, {"interaction": False}, {"gating": False}]
    options += [{"interaction": False, "gating": False}, {"blocks": 1}]
    networks = [ReFusion(**o) for o in options]
    assert len({count(n) for n in networks}) == len(networks)
    a, b = pair()
    for network in networks:
        assert network(a, b).shape == a.shape


def test_without_interaction_and_gating_the_fusion_module_concatenates():
    a, b = torch.rand(2, 1, 4, 5, 6)
    fused = AdaptiveFusion(4, 2, interaction=False, gating=False)(a, b)
    torch.testing.assert_close(fused, torch.cat([a, b], dim=1), rtol=0, atol=0)


def test_decision_map_mixes_the_sources():
    torch.manual_seed(0)
    plain, decision = ReFusion(), ReFusion(decision=True)
    decision.load_state_dict(plain.state_dict())
    a, b = pair()
    d = plain(a, b)
    torch.testing.assert_close(decision(a, b), d * a + (1 - d) * b)
    torch.testing.assert_close(decision(a, a), a)
    fused = decision(a, b)
    assert (fused >= torch.minimum(a, b) - 1e-6).all()
    assert (fused <= torch.maximum(a, b) + 1e-6).all()


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (7, 5), (1, 1), (17, 8)])
def test_any_size_keeps_its_shape(size):
    a, b = pair(*size, batch=2)
    fused = ReFusion(dim=4, heads=2, blocks=1)(a, b)
    assert fused.shape == (2, 1, *size)
    assert ((fused > 0) & (fused < 1)).all()


def test_pictures_of_a_batch_do_not_mix():
    torch.manual_seed(0)
    network = ReFusion()
    a, b = pair(batch=3)
    one_by_one = torch.cat([network(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(network(a, b), one_by_one, rtol=0, atol=1e-5)


PRIOR = {"intensity_prior": 6.0, "gradient_prior": 6.0}


@pytest.mark.parametrize("prior", [{}, PRIOR], ids=["neutral", "leaning"])
def test_proposed_weights_sum_to_one(prior):
    torch.manual_seed(0)
    a, b = pair(9, 13, batch=2)
    for maps in LossProposal(dim=4, heads=2, blocks=1, **prior)(a, b, sobel(a), sobel(b)):
        assert maps.shape == (2, 2, 9, 13)
        assert (maps >= 0).all()
        torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 9, 13))


def test_without_a_prior_the_weights_start_near_one_half():
    torch.manual_seed(0)
    a, b = pair(24, 24)
    for maps in LossProposal()(a, b, sobel(a), sobel(b)):
        assert (maps - 0.5).abs().mean() < 0.1


def test_the_prior_weighs_the_more_detailed_source_more():
    torch.manual_seed(0)
    proposal = LossProposal(**PRIOR)
    detailed, flat = detailed_and_flat()
    for maps in proposal(detailed, flat, sobel(detailed), sobel(flat)):
        assert maps[:, 0].mean() > 0.8
    for maps in proposal(flat, detailed, sobel(flat), sobel(detailed)):
        assert maps[:, 1].mean() > 0.8


def test_the_prior_is_undecided_between_equal_gradients():
    torch.manual_seed(0)
    detailed, flat = detailed_and_flat()
    plain, leaning = LossProposal(), LossProposal(**PRIOR)
    leaning.load_state_dict(plain.state_dict())
    for x in (detailed, flat):
        given = (x, x, sobel(x), sobel(x))
        for with_prior, without in zip(leaning(*given), plain(*given), strict=True):
            torch.testing.assert_close(with_prior, without)


def test_prior_adds_no_weights():
    assert LossProposal(**PRIOR).state_dict().keys() == LossProposal().state_dict().keys()


@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_reconstruction_gives_two_pictures(size):
    torch.manual_seed(0)
    fused, _ = pair(*size, batch=2)
    a_hat, b_hat = Reconstruction(dim=4, heads=2, blocks=1)(fused)
    for picture in (a_hat, b_hat):
        assert picture.shape == fused.shape
        assert ((picture > 0) & (picture < 1)).all()
    assert not torch.allclose(a_hat, b_hat)


def networks_on_one_pair() -> dict:
    return {
        "fusion": (ReFusion(), lambda f, a, b: f(a, b)),
        "proposal": (LossProposal(), lambda p, a, b: torch.cat(p(a, b, sobel(a), sobel(b)))),
        "reconstruction": (Reconstruction(), lambda r, a, b: torch.cat(r((a + b) / 2))),
    }


def first_and_second_gradients(name: str, a, b) -> list[torch.Tensor]:
    torch.manual_seed(0)
    network, call = networks_on_one_pair()[name]
    network = network.to(a.dtype)
    parameters = list(network.parameters())
    out = call(network, a, b)
    target = torch.linspace(0, 1, out.numel(), dtype=a.dtype).view_as(out)
    first = torch.autograd.grad((out - target).square().mean(), parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
    return [g.detach() for g in (*first, *second)]


@pytest.mark.parametrize("black", ["both", "one item of the batch"])
@pytest.mark.parametrize("name", ["fusion", "proposal", "reconstruction"])
def test_black_pictures_have_first_and_second_gradients(name, black):
    """A length of zero in the attention makes them NaN, or rubbish in float32."""
    a, b = pair(8, 8, batch=2)
    dark = slice(None) if black == "both" else slice(0, 1)
    a[dark], b[dark] = 0, 0
    single = first_and_second_gradients(name, a, b)
    double = first_and_second_gradients(name, a.double(), b.double())
    for gradient, expected in zip(single, double, strict=True):
        assert torch.isfinite(gradient).all()
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-3 * scale + 1e-6)
