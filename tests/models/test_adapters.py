"""The TC-MoA layer's parts: routers, adapters, prompts and their control, fusion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fusionkit.models import create_model
from fusionkit.models.adapters import (
    ROUTED_TASKS,
    AdapterBank,
    PromptControl,
    RouterBank,
    TCMoALayer,
    noisy_top_k,
    squared_variation,
)


def routers(seed: int = 0) -> RouterBank:
    torch.manual_seed(seed)
    bank = RouterBank(8, adapters=4, active=2)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    return bank


def layer(restandardise: bool = False, combine: str = "log") -> TCMoALayer:
    torch.manual_seed(0)
    made = TCMoALayer(32, adapters=4, active=2, combine=combine, restandardise=restandardise)
    with torch.no_grad():
        made.routers.gate.normal_()
        made.source_embedding.normal_()
    return made


# The authors' router


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, torch.Tensor]:
    values = np.load(shared / "golden" / "tcmoa_tiny.npz")
    return {k: torch.from_numpy(np.asarray(values[k])) for k in values if k.startswith("gate_")}


@pytest.mark.parametrize("mode", ["train", "eval"])
@torch.no_grad()
def test_authors_router(shared, golden, monkeypatch, mode):
    weights = shared / "weights" / "tcmoa_tiny.safetensors"
    tested = create_model("tcmoa_tiny", checkpoint=weights).encoder.layers[0].train(mode == "train")
    monkeypatch.setattr(torch, "randn_like", lambda x: golden["gate_noise"])
    x = golden["gate_x"]
    gates, auxiliary = tested.routers(x, {ROUTED_TASKS[1]: 1.0})
    for found, key in (
        (gates, "gates"),
        (auxiliary, "aux"),
        (tested.adapters(x, gates), "y"),
    ):
        expected = golden[f"gate_{key}_{mode}_task1"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    scale = F.softplus(x @ tested.routers.noise[1]) + 0.1
    noise = (scale, golden["gate_noise"]) if mode == "train" else (None, None)
    _, load = noisy_top_k(x @ tested.routers.gate[1], 2, *noise)
    expected = golden[f"gate_load_{mode}_task1"].to(load.dtype)
    torch.testing.assert_close(load, expected, rtol=1e-5, atol=1e-5)


# Routing


def test_shares_sum_to_one_and_exactly_k_are_not_zero():
    torch.manual_seed(0)
    logits = torch.randn(7, 5, 4)
    gates, load = noisy_top_k(logits, 2)
    torch.testing.assert_close(gates.sum(-1), torch.ones(7, 5))
    assert ((gates > 0).sum(-1) == 2).all()
    chosen = logits.masked_select(gates > 0).view(7, 5, 2)
    others = logits.masked_select(gates == 0).view(7, 5, 2)
    assert (chosen.amin(-1) >= others.amax(-1)).all()
    torch.testing.assert_close(gates.masked_select(gates > 0).view(7, 5, 2), chosen.softmax(-1))
    torch.testing.assert_close(load, (gates > 0).sum((0, 1)).float())


def test_equal_logits_still_choose_k():
    gates, _ = noisy_top_k(torch.zeros(6, 4), 2)
    assert ((gates > 0).sum(-1) == 2).all()


def test_expected_load_is_the_probability_to_be_chosen():
    """Against draws of each adapter's own noise, with that of the others held."""
    torch.manual_seed(0)
    logits, scale, noise = torch.randn(3, 4), torch.rand(3, 4) + 0.5, torch.randn(3, 4)
    _, load = noisy_top_k(logits, 2, scale, noise)
    counted = torch.zeros(4)
    draws = torch.randn(20_000, 3)
    for i in range(4):
        noisy = (logits + scale * noise).expand(20_000, 3, 4).clone()
        noisy[..., i] = logits[:, i] + scale[:, i] * draws
        chosen = noisy.topk(2).indices
        counted[i] = (chosen == i).any(-1).float().mean(0).sum()
    torch.testing.assert_close(load, counted, rtol=0, atol=0.03)


def test_all_adapters_active_is_a_softmax():
    logits = torch.randn(5, 4)
    gates, load = noisy_top_k(logits, 4, torch.ones(5, 4), torch.zeros(5, 4))
    torch.testing.assert_close(gates, logits.softmax(-1))
    assert load.tolist() == [5, 5, 5, 5]


def test_noise_in_training_only():
    bank, x = routers(), torch.randn(50, 8)
    torch.manual_seed(1)
    first, second = (bank.train()(x, {"ivif": 1.0}).gates for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    torch.testing.assert_close(bank(x, {"ivif": 1.0}).gates, first, rtol=0, atol=0)
    state = torch.get_rng_state()
    first, second = (bank.eval()(x, {"ivif": 1.0}).gates for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_tasks_have_their_own_routers_and_a_mixture_averages_them():
    bank, x = routers().eval(), torch.randn(50, 8)
    ivif, mfif = (bank(x, {task: 1.0}) for task in ("ivif", "mfif"))
    assert not torch.allclose(ivif.gates, mfif.gates)
    mixed = bank(x, {"ivif": 0.7, "mfif": 0.3})
    torch.testing.assert_close(mixed.gates, 0.7 * ivif.gates + 0.3 * mfif.gates)
    torch.testing.assert_close(mixed.auxiliary, 0.7 * ivif.auxiliary + 0.3 * mfif.auxiliary)
    assert ((mixed.gates > 0).sum(-1) <= 4).all()


def test_balance_loss_trains_gate_and_noise():
    bank, x = routers().train(), torch.randn(50, 8)
    bank(x, {"meif": 1.0}).auxiliary.backward()
    for parameter in bank.parameters():
        trained = parameter.grad.abs().amax((1, 2)) > 0
        assert trained.tolist() == [task == "meif" for task in ROUTED_TASKS]


def test_squared_variation():
    torch.testing.assert_close(squared_variation(torch.tensor([1.0, 3.0])), torch.tensor(0.5))
    assert squared_variation(torch.tensor([5.0])) == 0


# Adapters


@pytest.mark.parametrize("combine", ["sum", "log"])
def test_combination(combine):
    torch.manual_seed(0)
    bank, x = AdapterBank(8, 3, 4, combine), torch.randn(6, 8)
    gates, _ = noisy_top_k(torch.randn(6, 4), 2)
    outputs = [a[2](a[0](x).relu()) for a in bank]
    if combine == "sum":
        expected = sum(g[:, None] * y for g, y in zip(gates.T, outputs, strict=True))
    else:
        expected = sum(g[:, None] * y.exp() for g, y in zip(gates.T, outputs, strict=True)).log()
    torch.testing.assert_close(bank(x, gates), expected)


def test_log_combination_neither_overflows_nor_meets_what_is_not_chosen():
    bank = AdapterBank(2, 1, 3, "log")
    biases = (100.0, 300.0, 900.0)
    with torch.no_grad():
        for adapter, bias in zip(bank, biases, strict=True):
            for parameter in adapter.parameters():
                parameter.zero_()
            adapter[2].bias.fill_(bias)
    out = bank(torch.zeros(1, 2), torch.tensor([[0.4, 0.6, 0.0]]))
    torch.testing.assert_close(out, torch.full((1, 2), 300 + math.log(0.6)))
    out.sum().backward()
    assert [a[2].bias.grad.sum().item() for a in bank] == [0.0, 2.0, 0.0]


def test_log_combination_leaves_out_the_smallest_shares():
    """The authors' numbers for `224x112_MFF` need it, where one token has a share of 4.7e-5."""
    torch.manual_seed(0)
    x, outputs = torch.randn(1, 8), []
    for second in (2e-4, 5e-5, 4e-5):
        torch.manual_seed(0)
        bank = AdapterBank(8, 3, 2, "log")
        outputs.append(bank(x, torch.tensor([[0.9, second]])))
    torch.testing.assert_close(outputs[1], outputs[2], rtol=0, atol=0)
    assert not torch.equal(outputs[0], outputs[1])


def test_log_combination_has_gradients_for_gates_and_adapters():
    torch.manual_seed(0)
    bank = AdapterBank(4, 2, 4, "log").double()
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, z: bank(x, noisy_top_k(z, 2)[0]), (x, logits))
    assert torch.autograd.gradgradcheck(lambda x, z: bank(x, noisy_top_k(z, 2)[0]), (x, logits))


# Control


def test_control_is_equation_8():
    prompts = torch.rand(2, 3, 4, 2)
    out = PromptControl(alpha=2.0, beta=0.1, mu=0.4)(prompts)
    torch.testing.assert_close(out[..., 0], 0.4 + 2 * (prompts[..., 0] - 0.4) + 0.1)
    torch.testing.assert_close(out[..., 1], 0.4 + 2 * (prompts[..., 1] - 0.4) - 0.1)


def test_neutral_control_is_exactly_the_identity():
    prompts = torch.rand(100, 2)
    assert torch.equal(PromptControl(1.0, 0.0)(prompts), prompts)
    assert torch.equal(PromptControl(alpha=0.0)(prompts), torch.full_like(prompts, 0.5))


@pytest.mark.parametrize("name", ["alpha", "beta", "mu"])
def test_control_must_be_finite(name):
    with pytest.raises(ValueError, match=f"prompt control {name} is nan; expected a finite"):
        PromptControl(**{name: math.nan})


# The layer


@pytest.mark.parametrize("combine", ["sum", "log"])
def test_layer_is_equations_2_to_6(combine):
    tested, x = layer(combine=combine).eval(), torch.randn(4, 3, 5, 32)
    with torch.no_grad():
        tested.mixing.fill_(0.8)
    out, report = tested(x, {"mfif": 1.0})
    a, b = x.chunk(2)
    norm_1, linear, norm_2 = tested.reduce
    features = norm_2(linear(norm_1(torch.cat([a, b], dim=-1))))  # (2)
    gates, auxiliary = tested.routers(features, {"mfif": 1.0})  # (3)
    combined = tested.adapters(features, gates)
    prompt_a, prompt_b = (h.mean(-1).sigmoid() for h in combined.chunk(2, dim=-1))  # (4)
    shift_a, shift_b = tested.source_embedding[ROUTED_TASKS.index("mfif")]
    h_a, h_b = prompt_a[..., None] * a + shift_a, prompt_b[..., None] * b + shift_b  # (5)
    fused = tested.fusion((h_a + h_b).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = torch.cat([0.8 * source + 0.2 * fused for source in (a, b)])  # (6)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(report.prompts, torch.stack([prompt_a, prompt_b], dim=1))
    torch.testing.assert_close(report.gates, gates.permute(0, 3, 1, 2))
    torch.testing.assert_close(report.auxiliary, auxiliary)


def test_control_reaches_the_features():
    tested, x = layer().eval(), torch.randn(2, 3, 5, 32)
    control = PromptControl(3.0, -0.3)
    out, report = tested(x, {"ivif": 1.0})
    controlled, controlled_report = tested(x, {"ivif": 1.0}, control)
    expected = control(report.prompts.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(controlled_report.prompts, expected)
    assert not torch.allclose(out, controlled)


def test_source_embeddings_take_part_and_are_trained():
    tested, x = layer(), torch.randn(2, 3, 5, 32)
    tested(x, {"meif": 0.5, "ivif": 0.5})[0].square().mean().backward()
    trained = tested.source_embedding.grad.abs().amax((1, 2)) > 0
    assert trained.tolist() == [True, True, False]


def test_restandardised_sources_keep_mean_and_deviation():
    x = 3 + 2 * torch.randn(4, 3, 5, 32)
    plain, kept = (layer(r).eval()(x, {"ivif": 1.0})[0] for r in (False, True))
    for statistic in (torch.mean, torch.std):
        before, after = (statistic(t.flatten(1), dim=1) for t in (x, kept))
        torch.testing.assert_close(after, before)
        assert not torch.allclose(statistic(plain.flatten(1), dim=1), before)


def test_layer_stays_in_float32_under_autocast():
    tested, x = layer().eval(), torch.randn(2, 3, 5, 32)
    expected = tested(x, {"ivif": 1.0})[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, report = tested(x, {"ivif": 1.0})
    assert report.prompts.dtype == torch.float32
    torch.testing.assert_close(out, expected)
