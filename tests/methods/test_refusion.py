"""ReFusion's method: the meta-gradient by finite differences, who trains whom, the schedule."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fusionkit.losses import reconstruction_loss, sobel, weighted_fusion_loss
from fusionkit.methods.refusion import ReFusionMethod
from fusionkit.models.refusion import LossProposal, Reconstruction, ReFusion

SMALL = {"dim": 4, "heads": 2, "blocks": 1}
INNER_LR = 0.1


class TwoLayers(nn.Module):
    """Any network will do."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, 1, 3, padding=1)
        )

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([a, b], dim=1)).sigmoid()


NETWORKS = {"refusion": lambda: ReFusion(**SMALL), "two layers": TwoLayers}


def make_method(network: str = "two layers", dtype=torch.float64, seed: int = 0, **options):
    torch.manual_seed(seed)
    return ReFusionMethod(
        NETWORKS[network]().to(dtype),
        proposal=LossProposal(**SMALL).to(dtype),
        reconstruction=Reconstruction(**SMALL).to(dtype),
        **{"inner_lr": INNER_LR, **options},
    )


def make_batch(items: int = 4, size=(9, 10), dtype=torch.float64, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, items, 1, *size, generator=generator, dtype=dtype)
    return {"a": a, "b": b}


def halves(batch: dict) -> tuple[tuple, tuple]:
    a, b = batch["a"], batch["b"]
    return (a[::2], b[::2]), (a[1::2], b[1::2])


def vector(module: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]).detach()


def outer_loss(
    method: ReFusionMethod, meta_train: tuple, meta_test: tuple, create_graph: bool = False
) -> torch.Tensor:
    """L_r after the inner updates, as a function of P's present weights (equations 7, 8, 10)."""
    alpha1, alpha2, lr = method.alpha1, method.alpha2, method.inner_lr
    a, b = meta_train
    theta_f = dict(method.fusion.named_parameters())
    theta_r = dict(method.reconstruction.named_parameters())
    w, v = method.proposal(a, b, sobel(a), sobel(b))
    fused = method.fusion(a, b)
    loss_f = weighted_fusion_loss(a, b, fused, w, v, alpha1)
    loss_r = reconstruction_loss(a, b, *method.reconstruction(fused.detach()), alpha2)
    grads_f = torch.autograd.grad(loss_f, list(theta_f.values()), create_graph=create_graph)
    grads_r = torch.autograd.grad(loss_r, list(theta_r.values()))
    stepped_f = {n: p - lr * g for (n, p), g in zip(theta_f.items(), grads_f, strict=True)}
    stepped_r = {n: p - lr * g for (n, p), g in zip(theta_r.items(), grads_r, strict=True)}
    fused_test = functional_call(method.fusion, stepped_f, meta_test)
    hats = functional_call(method.reconstruction, stepped_r, (fused_test,))
    return reconstruction_loss(*meta_test, *hats, alpha2)


def slope(method: ReFusionMethod, direction: torch.Tensor, batch: dict, h: float) -> float:
    """Central difference of the outer loss along a direction of P's weights."""
    start, values = vector(method.proposal), []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * h * direction, method.proposal.parameters())
        values.append(outer_loss(method, *halves(batch)).item())
    nn.utils.vector_to_parameters(start, method.proposal.parameters())
    return (values[0] - values[1]) / (2 * h)


# The meta-gradient


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("alphas", [(1.0, 1.0), (0.3, 2.0)])
def test_meta_gradient_equals_finite_differences(network, alphas):
    method = make_method(network, alpha1=alphas[0], alpha2=alphas[1])
    batch = make_batch()
    gradients, losses = method.meta_gradients(*halves(batch))
    gradient = flat(gradients)
    assert losses["meta"] == pytest.approx(outer_loss(method, *halves(batch)).item(), rel=1e-10)

    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(3, gradient.numel(), generator=generator, dtype=gradient.dtype)
    directions = [gradient, *directions]
    # In several tensors of P, the single parameter with the largest slope.
    start, largest = 0, []
    for g in gradients:
        largest.append(start + g.abs().argmax().item())
        start += g.numel()
    largest.sort(key=lambda i: -gradient[i].abs())
    directions += [torch.eye(gradient.numel(), dtype=gradient.dtype)[i] for i in largest[:6]]
    for direction in directions:
        direction = direction / direction.norm()
        expected = (gradient @ direction).item()
        assert abs(expected) > 1e-9
        assert slope(method, direction, batch, 1e-4) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("items", [2, 5])
def test_meta_gradient_equals_a_second_backward_pass(network, items):
    method, batch = make_method(network), make_batch(items, size=(12, 8))
    gradients, _ = method.meta_gradients(*halves(batch))
    outer = outer_loss(method, *halves(batch), create_graph=True)
    expected = torch.autograd.grad(outer, list(method.proposal.parameters()))
    scale = flat(expected).abs().max().item()
    assert scale > 1e-9
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("network", NETWORKS)
def test_meta_gradient_in_float32_is_close(network):
    double, single = make_method(network), make_method(network)
    single.modules.float()
    batch = make_batch()
    expected = flat(double.meta_gradients(*halves(batch))[0])
    batch = {key: value.float() for key, value in batch.items()}
    ours = flat(single.meta_gradients(*halves(batch))[0]).double()
    assert (ours - expected).norm() < 1e-2 * expected.norm()


def test_the_first_order_direction_is_another_one():
    batch = make_batch()
    exact, rough = (
        flat(make_method(meta_gradient=kind).meta_gradients(*halves(batch))[0])
        for kind in ("exact", "first_order")
    )
    assert rough.norm() > 0
    assert torch.isfinite(rough).all()
    cosine = torch.cosine_similarity(exact, rough, dim=0)
    assert cosine < 0.99
    assert not torch.allclose(exact, rough, rtol=0.1)


@pytest.mark.parametrize("kind", ["exact", "first_order"])
def test_black_pictures_have_a_meta_gradient(kind):
    method = make_method("refusion", dtype=torch.float32, meta_gradient=kind)
    batch = make_batch(dtype=torch.float32)
    batch["a"][:2], batch["b"][:2] = 0, 0
    gradients, losses = method.meta_gradients(*halves(batch))
    assert torch.isfinite(flat(gradients)).all()
    assert flat(gradients).norm() < 1e3
    assert all(0 <= value < 1e3 for value in losses.values())


def test_the_meta_gradient_leaves_nothing_behind():
    method, batch = make_method(), make_batch()
    before = [vector(m) for m in method.modules.values()]
    method.meta_gradients(*halves(batch))
    for module, weights in zip(method.modules.values(), before, strict=True):
        torch.testing.assert_close(vector(module), weights, rtol=0, atol=0)
        assert all(p.grad is None for p in module.parameters())


def test_unknown_meta_gradient():
    with pytest.raises(ValueError, match="meta_gradient 'second'; expected one of exact, first"):
        make_method(meta_gradient="second")


# Who trains whom


@pytest.mark.parametrize("kind", ["exact", "first_order"])
def test_a_meta_step_moves_p_alone(kind):
    method, batch = make_method(meta_gradient=kind), make_batch()
    before = {name: vector(m) for name, m in method.modules.items()}
    losses = method.step(batch)
    assert losses.keys() == {"fusion", "reconstruction", "meta"}
    assert torch.equal(vector(method.fusion), before["fusion"])
    assert torch.equal(vector(method.reconstruction), before["reconstruction"])
    assert not torch.equal(vector(method.proposal), before["proposal"])


def test_a_meta_step_is_adams_along_the_meta_gradient():
    method, batch = make_method(lr=1e-3), make_batch()
    expected = copy.deepcopy(method.proposal)
    adam = torch.optim.Adam(expected.parameters(), lr=1e-3)
    gradients, _ = method.meta_gradients(*halves(batch))
    for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
        parameter.grad = gradient
    adam.step()
    method.step(batch)
    torch.testing.assert_close(vector(method.proposal), vector(expected), rtol=0, atol=1e-12)


def test_a_fusion_step_is_adams_on_both_losses():
    method, batch = make_method(lr=1e-3, meta_steps=0), make_batch()
    a, b = batch["a"], batch["b"]
    f, r = copy.deepcopy(method.fusion), copy.deepcopy(method.reconstruction)
    proposal = vector(method.proposal)
    with torch.no_grad():
        w, v = method.proposal(a, b, sobel(a), sobel(b))
        before = f(a, b)
    loss_f = weighted_fusion_loss(a, b, f(a, b), w, v)
    loss_r = reconstruction_loss(a, b, *r(before))
    for network, loss in ((f, loss_f), (r, loss_r)):
        adam = torch.optim.Adam(network.parameters(), lr=1e-3)
        loss.backward()
        adam.step()
    losses = method.step(batch)
    assert losses == pytest.approx({"fusion": loss_f.item(), "reconstruction": loss_r.item()})
    torch.testing.assert_close(vector(method.fusion), vector(f), rtol=0, atol=1e-12)
    torch.testing.assert_close(vector(method.reconstruction), vector(r), rtol=0, atol=1e-12)
    assert torch.equal(vector(method.proposal), proposal)


def test_the_reconstruction_loss_never_reaches_f():
    batch, results = make_batch(), []
    for seed in (1, 2):
        method = make_method(meta_steps=0)
        torch.manual_seed(seed)
        method.reconstruction.load_state_dict(Reconstruction(**SMALL).double().state_dict())
        for _ in range(3):
            method.step(batch)
        results.append(method)
    assert torch.equal(vector(results[0].fusion), vector(results[1].fusion))
    assert not torch.equal(vector(results[0].reconstruction), vector(results[1].reconstruction))


def test_fixed_weights_are_one_half_without_meta_steps():
    method, batch = make_method(learned=False, meta_steps=3, fusion_steps=2), make_batch()
    proposal = vector(method.proposal)
    for maps in method.weights(batch["a"], batch["b"]):
        assert maps.shape == (4, 2, 9, 10)
        assert (maps == 0.5).all()
    for _ in range(6):
        assert "meta" not in method.step(batch)
    assert torch.equal(vector(method.proposal), proposal)


# The schedule


def kinds(method: ReFusionMethod, steps: int) -> str:
    batch = make_batch(2, size=(8, 8))
    return "".join("M" if "meta" in method.step(batch) else "F" for _ in range(steps))


def test_meta_and_fusion_steps_alternate():
    assert kinds(make_method(meta_steps=2, fusion_steps=3), 12) == "MMFFFMMFFFMM"
    assert kinds(make_method(meta_steps=2, fusion_steps=1, warmup_steps=4), 9) == "FFFFMMFMM"
    assert kinds(make_method(meta_steps=0, fusion_steps=2), 4) == "FFFF"


def test_a_batch_is_split_into_even_and_odd_items(monkeypatch):
    method, batch, seen = make_method(), make_batch(5), []
    monkeypatch.setattr(method, "meta_step", lambda *halves: seen.append(halves) or {})
    method.step(batch)
    ((train, test),) = seen
    for key, ours, theirs in zip("ab", train, test, strict=True):
        assert torch.equal(ours, batch[key][[0, 2, 4]])
        assert torch.equal(theirs, batch[key][[1, 3]])


@pytest.mark.parametrize("kind", ["exact", "first_order"])
def test_a_single_pair_is_too_few_for_a_meta_step(kind):
    method = make_method(meta_gradient=kind)
    with pytest.raises(ValueError, match="a meta step needs two pairs or more"):
        method.step(make_batch(1))
    assert method.steps_taken == 0
    make_method(meta_steps=0).step(make_batch(1))


def rates(method: ReFusionMethod) -> dict[str, float]:
    return {name: o.param_groups[0]["lr"] for name, o in method.optimizers.items()}


def test_learning_rates():
    method = make_method(lr=1e-3, proposal_lr=1e-2)
    assert rates(method) == {"fusion": 1e-3, "reconstruction": 1e-3, "proposal": 1e-2}
    method.step(make_batch(2))
    assert rates(method)["proposal"] == 1e-2
    assert rates(make_method(lr=1e-3))["proposal"] == 1e-3


def test_the_inner_step_size_is_the_learning_rate_unless_given():
    assert make_method(lr=3e-3, inner_lr=None).inner_lr == 3e-3
    assert make_method(lr=3e-3, inner_lr=0.5).inner_lr == 0.5
    batch = make_batch()
    gradients, _ = make_method(inner_lr=0.0).meta_gradients(*halves(batch))
    assert flat(gradients).abs().max() == 0


def test_annealing_follows_half_a_cosine():
    method = make_method(lr=1e-3, proposal_lr=1e-2, anneal_steps=4, meta_steps=1, fusion_steps=1)
    batch, found = make_batch(2, size=(8, 8)), []
    for _ in range(6):
        method.step(batch)
        found.append(rates(method))
    factors = [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0, 0]
    assert [r["fusion"] for r in found] == pytest.approx([1e-3 * f for f in factors])
    assert [r["reconstruction"] for r in found] == pytest.approx([1e-3 * f for f in factors])
    assert [r["proposal"] for r in found] == pytest.approx([1e-2 * f for f in factors])
    before = vector(method.modules)
    method.step(batch)
    assert torch.equal(vector(method.modules), before)


@pytest.mark.parametrize("done", [3, 5])
def test_state_dict_round_trip_gives_identical_steps(done):
    options = {"meta_steps": 2, "fusion_steps": 2, "warmup_steps": 1, "anneal_steps": 20}
    method = make_method(**options)
    batches = [make_batch(seed=i) for i in range(done + 4)]
    for batch in batches[:done]:
        method.step(batch)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other = make_method(seed=9, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.steps_taken == done
    for batch in batches[done:]:
        assert method.step(batch) == other.step(batch)
    assert torch.equal(vector(method.modules), vector(other.modules))


# Training


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("options", [{}, {"meta_gradient": "first_order"}, {"learned": False}])
def test_the_losses_fall(network, options):
    method = make_method(network, torch.float32, lr=1e-2, meta_steps=1, fusion_steps=4, **options)
    columns = torch.linspace(0.2, 0.8, 12).expand(2, 1, 12, 12)
    batch = {"a": columns, "b": 1 - columns.mT}
    log = [method.step(batch) for _ in range(30)]
    for name in ("fusion", "reconstruction"):
        values = [losses[name] for losses in log if "meta" not in losses]
        assert all(torch.isfinite(torch.tensor(values)))
        assert values[-1] < 0.7 * values[0]
