"""Gradient transfer: every term by hand and by the release's values, the teacher, the schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fusionkit.losses import sobel, ssim
from fusionkit.methods.gradient_transfer import GradientTransferMethod
from fusionkit.models.frufn import EFRUFN, FRUFN
from fusionkit.training import fit

SIZE = (16, 24)


class ThreeLayers(nn.Module):
    """Any network will do."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([a, b], dim=1))


class Fixed(nn.Module):
    """Returns the same picture, its only weight, whatever the sources."""

    def __init__(self, picture: torch.Tensor) -> None:
        super().__init__()
        self.picture = nn.Parameter(picture.clone())

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.picture


class Autoencoder(ThreeLayers):
    """A network that offers `autoencode`, by one of its layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return super().forward(self.code(a), self.code(b))

    def autoencode(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.code(a), self.code(b)


NETWORKS = {
    "three layers": ThreeLayers,
    "frufn": lambda: FRUFN(width=8, heads=2, units=2),
    "efrufn": lambda: EFRUFN(width=8, heads=2, max_evaluations=3),
}


def build(network: str = "three layers", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[network]()


def pictures(count: int = 4, items: int = 2, size=SIZE, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, items, 1, *size, generator=torch.Generator().manual_seed(seed))


def make_batch(items: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(zip(("a", "b", "target"), pictures(3, items, seed=seed), strict=True))


def vector(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


# The terms


@pytest.mark.parametrize("task", ["mfif", "meif"])
def test_supervised_terms_by_hand(task):
    a, b, fused, taught = pictures()
    target = pictures(1, seed=1)[0]
    method = GradientTransferMethod(Fixed(fused), task=task, teacher=Fixed(taught))
    terms = method.losses(a, b, target)
    assert terms.keys() == {"reconstruction", "transfer"}
    close(terms["reconstruction"], 1 - ssim(fused, target))
    lacking = F.relu(sobel(taught) - sobel(fused)).mean()
    close(terms["transfer"], 0.5 * lacking)
    alone = GradientTransferMethod(Fixed(fused), task=task).losses(a, b, target)
    assert alone.keys() == {"reconstruction"}


def test_unsupervised_terms_by_hand():
    a, b, fused, taught = pictures()
    method = GradientTransferMethod(Fixed(fused), task="ivif", teacher=Fixed(taught))
    terms = method.losses(a, b)
    assert terms.keys() == {"intensity", "texture", "structure", "transfer"}
    close(terms["intensity"], (fused - torch.maximum(a, b)).abs().mean())
    strongest = torch.maximum(sobel(a), sobel(b))
    close(terms["texture"], 5 * (sobel(fused) - strongest).abs().mean())
    close(terms["structure"], 2.5 * (1 - ssim(fused, a) + 1 - ssim(fused, b)))
    close(terms["transfer"], 2 * F.relu(sobel(taught) - sobel(fused)).mean())


def test_weights_scale_their_terms():
    a, b, fused, taught = pictures()
    weights = {"texture_weight": 0.5, "structure_weight": 3.0, "transfer_weight": 0.25}
    options = {"task": "ivif", "teacher": Fixed(taught)}
    usual = GradientTransferMethod(Fixed(fused), **options).losses(a, b)
    terms = GradientTransferMethod(Fixed(fused), **options, **weights, spread_weight=1.5)
    terms = terms.losses(a, b)
    close(terms["texture"], usual["texture"] / 10)
    close(terms["structure"], usual["structure"] * 3 / 2.5)
    close(terms["transfer"], usual["transfer"] / 8)
    close(terms["spread"], -1.5 * fused.flatten(1).std(dim=1, correction=0).mean())
    options["transfer_weight"] = 0
    assert "transfer" not in GradientTransferMethod(Fixed(fused), **options).losses(a, b)


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "frufn_extra.npz") as file:
        return {key[2:]: torch.from_numpy(file[key]) for key in file.files if key[:2] == "l_"}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("fusion_med", {}),  # 20, 100, 50 and -50
        ("fusion_vif", {"texture_weight": 1, "structure_weight": 0.5, "spread_weight": 0}),
    ],
)
def test_released_totals(golden, name, weights):
    """The released loss of infrared-visible pairs is twenty times the released form."""
    a, b, fused, taught = (golden[key] for key in ("a", "b", "f", "t"))
    options = {"task": "ivif", "form": "released", **weights}
    terms = GradientTransferMethod(Fixed(fused), **options).losses(a, b)
    assert 20 * sum(terms.values()).item() == pytest.approx(golden[name].item(), rel=1e-5)
    method = GradientTransferMethod(Fixed(fused), **options, teacher=Fixed(taught))
    transfer = 20 * method.losses(a, b)["transfer"].item()
    assert transfer == pytest.approx(40 * golden["gt_grad"].item(), rel=1e-5)


@pytest.mark.parametrize("task", ["mfif", "meif"])
def test_released_supervised_total(golden, task):
    """Twice the released form; the true picture is the teacher's here."""
    a, b, fused, taught = (golden[key] for key in ("a", "b", "f", "t"))
    options = {"task": task, "form": "released", "teacher": Fixed(taught)}
    terms = GradientTransferMethod(Fixed(fused), **options).losses(a, b, taught)
    expected = 2 * golden["ssim_loss_valid"] + golden["gt_grad"]
    assert 2 * sum(terms.values()).item() == pytest.approx(expected.item(), rel=1e-5)


def test_bf16_changes_the_networks_alone():
    batch = make_batch()
    method = GradientTransferMethod(build(), task="meif", teacher=build(seed=1))
    exact = method.losses(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = method.losses(**batch)
    for name, value in exact.items():
        assert rough[name].dtype == torch.float32
        assert rough[name].item() == pytest.approx(value.item(), rel=0.02, abs=0.02)


# Errors


@pytest.mark.parametrize("task", ["mfif", "meif"])
def test_a_missing_target_is_an_error(task):
    method = GradientTransferMethod(build(), task=task, teacher=build())
    a, b = pictures(2)
    with pytest.raises(ValueError, match=f"task '{task}' needs pairs with a 'target'"):
        method.step({"a": a, "b": b})
    assert method.steps_taken == 0


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"unknown task 'mif'.*mfif, meif, ivif"):
        GradientTransferMethod(build(), task="mif")
    with pytest.raises(ValueError, match=r"unknown form 'official'.*paper, released"):
        GradientTransferMethod(build(), task="ivif", form="official")


# The teacher


def test_the_teacher_is_a_frozen_copy():
    teacher, batch = build(seed=1), make_batch()
    before = vector(teacher)
    method = GradientTransferMethod(build(), task="ivif", teacher=teacher, lr=1e-2)
    assert all(p.requires_grad for p in teacher.parameters())  # the caller's stays as it is
    assert not any(p.requires_grad for p in method.teacher.parameters())
    first = method.losses(batch["a"], batch["b"])["transfer"]
    with torch.no_grad():
        teacher.layers[0].weight.zero_()
    assert torch.equal(method.losses(batch["a"], batch["b"])["transfer"], first)
    for _ in range(3):
        method.step(batch)
    assert torch.equal(vector(method.teacher), before)


def test_the_teacher_is_neither_optimised_nor_saved():
    method = GradientTransferMethod(build(), task="ivif", teacher=build(seed=1))
    names = {name for name, _ in build().named_parameters()}
    assert method.state_dict()["modules"].keys() == {f"fusion.{name}" for name in names}
    groups = method.optimizers["fusion"].param_groups
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in method.fusion.parameters()
    }


def test_any_order_of_stages_and_any_teacher():
    """Other orders than the paper's, and a teacher of another kind than the student."""
    batch = make_batch()
    for task in ("mfif", "meif", "ivif"):
        method = GradientTransferMethod(build(), task=task, teacher=build("efrufn"))
        assert method.step(batch)["transfer"] > 0


def test_the_network_may_start_as_its_own_teacher():
    """As in the release's third stage: the copy stays when the student moves."""
    network, batch = build(), make_batch()
    method = GradientTransferMethod(network, task="ivif", teacher=network, lr=1e-2)
    assert method.step(batch)["transfer"] == 0
    assert method.step(batch)["transfer"] > 0


# Steps


def test_a_step_is_adams_on_the_sum_of_the_terms():
    batch = make_batch()
    expected = build()
    adam = torch.optim.Adam(expected.parameters(), lr=1e-3)
    options = {"task": "meif", "teacher": build(seed=1), "lr": 1e-3}
    sum(GradientTransferMethod(expected, **options).losses(**batch).values()).backward()
    adam.step()
    method = GradientTransferMethod(build(), **options)
    losses = method.step(batch)
    assert losses.keys() == {"reconstruction", "transfer"}
    torch.testing.assert_close(vector(method.fusion), vector(expected), rtol=0, atol=1e-7)


def test_clip_bounds_the_norm_of_the_gradient(monkeypatch):
    seen = []

    def watched(method):
        optimizer = method.optimizers["fusion"]
        step = optimizer.step

        def spy():
            seen.append(torch.cat([p.grad.flatten() for p in method.fusion.parameters()]))
            step()

        monkeypatch.setattr(optimizer, "step", spy)
        return method

    for clip in (None, 1e-3, 1e6):
        watched(GradientTransferMethod(build(), task="mfif", clip=clip)).step(make_batch())
    free, clipped, wide = seen
    assert free.norm() > 1e-2
    assert clipped.norm().item() == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm())
    torch.testing.assert_close(wide, free)


def test_the_average_over_processes_is_clipped(monkeypatch):
    """Not each process's share, or two of them would train otherwise than one."""
    method = GradientTransferMethod(build(), task="mfif", clip=1e-3)
    norms = []

    def averaged(tensors):
        return [1e-6 * t for t in tensors]  # as if the other processes' gradients were opposite

    def spy():
        norms.append(torch.cat([p.grad.flatten() for p in method.fusion.parameters()]).norm())

    monkeypatch.setattr(method, "average", averaged)
    monkeypatch.setattr(method.optimizers["fusion"], "step", spy)
    method.step(make_batch())
    assert 0 < norms[0] < 1e-4


def test_annealing_follows_half_a_cosine():
    method = GradientTransferMethod(build(), task="mfif", lr=1e-3, anneal_steps=4)
    rates = []
    for _ in range(6):
        method.step(make_batch())
        rates.append(method.optimizers["fusion"].param_groups[0]["lr"])
    factors = [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0, 0]
    assert rates == pytest.approx([1e-3 * f for f in factors])


# The warm-up


def test_warmup_trains_the_autoencoder_alone():
    torch.manual_seed(0)
    network, batch = Autoencoder(), make_batch()
    method = GradientTransferMethod(network, task="mfif", warmup_steps=2)
    layers = vector(network.layers)
    expected = F.l1_loss(network.code(batch["a"]), batch["a"])
    expected = expected + F.l1_loss(network.code(batch["b"]), batch["b"])
    first = method.step(batch)
    assert first == {"autoencoder": pytest.approx(expected.item())}
    assert method.step(batch)["autoencoder"] < first["autoencoder"]
    assert torch.equal(vector(network.layers), layers)
    # What had no part in the warm-up starts afresh: Adam's first step is about lr for each weight.
    assert method.step(batch).keys() == {"reconstruction"}
    moved = (vector(network.layers) - layers).abs()
    assert moved.max().item() == pytest.approx(1e-4, rel=0.05)


def test_networks_without_an_autoencoder_have_no_warmup():
    method = GradientTransferMethod(build(), task="mfif", warmup_steps=5)
    assert method.step(make_batch()).keys() == {"reconstruction"}


@pytest.mark.parametrize("base", ["a", "b"])
@pytest.mark.parametrize("network", [FRUFN, EFRUFN])
def test_unfolding_networks_offer_the_autoencoder(network, base):
    torch.manual_seed(0)
    network = network(width=8, heads=2, base=base)
    a, b = pictures(2, size=(13, 18))
    a_hat, b_hat = network.autoencode(a, b)
    assert a_hat.shape == b_hat.shape == a.shape
    encoders = {"a": network.guide_encoder, "b": network.guide_encoder, base: network.base_encoder}
    for source, picture, found in (("a", a, a_hat), ("b", b, b_hat)):
        padded = F.pad(picture, (0, 6, 0, 3), mode="replicate")
        expected = network.decoder(encoders[source](padded))[..., :13, :18]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, check_stride=False)


# Training


def make_loader(count: int = 12) -> DataLoader:
    items = pictures(3, count, seed=3).transpose(0, 1)
    items = [dict(zip(("a", "b", "target"), item, strict=True)) for item in items]
    return DataLoader(items, batch_size=2, shuffle=True)


@pytest.mark.parametrize(("network", "task"), [("efrufn", "meif"), ("three layers", "ivif")])
def test_a_stage_resumes_bit_for_bit(tmp_path, network, task):
    def train(out_dir, steps, seed=0):
        method = GradientTransferMethod(
            build(network, seed), task=task, teacher=build(network, seed=1), lr=1e-2,
            anneal_steps=8, clip=0.5, warmup_steps=2,
        )  # fmt: skip
        settings = {"steps": steps, "seed": 4, "log_every": 1, "device": "cpu", "progress": False}
        return method, fit(method, make_loader(), out_dir=tmp_path / out_dir, **settings)

    straight, expected = train("straight", 6)
    train("halves", 3)
    halves, log = train("halves", 6, seed=9)  # other weights, which the checkpoint replaces
    assert torch.equal(vector(halves.fusion), vector(straight.fusion))
    assert log.drop(columns="seconds").equals(expected.drop(columns="seconds"))


def untouched(network: nn.Module, **options) -> set[str]:
    """The top modules of a network of which a step moves no parameter, if all or none move."""
    method = GradientTransferMethod(network, teacher=build("efrufn", seed=1), lr=1e-3, **options)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    method.step(make_batch())
    still = {name for name, p in network.named_parameters() if torch.equal(p, before[name])}
    modules = {name.split(".")[0] for name in still}
    assert still == {name for name in before if name.split(".")[0] in modules}
    return modules


@pytest.mark.parametrize("task", ["meif", "ivif"])
@pytest.mark.parametrize("network", ["frufn", "efrufn"])
def test_gradients_reach_every_parameter(network, task):
    assert untouched(build(network), task=task) == set()


@pytest.mark.filterwarnings("ignore::fusionkit.models.fixed_point.FixedPointWarning")
def test_the_papers_rule_never_trains_the_bases_encoder_but_in_the_warmup():
    """Equation 16 sees the base in its start alone, and equations 19 and 20 end at the fixed point.

    One more sign that the authors' weights come from another rule.
    """
    network = EFRUFN(width=8, heads=2, rule="paper")
    assert untouched(network, task="ivif") == {"base_encoder"}
    assert untouched(network, task="ivif", warmup_steps=1) == {"unit"}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("task", ["mfif", "ivif"])
@pytest.mark.filterwarnings("ignore::fusionkit.models.fixed_point.FixedPointWarning")
def test_the_loss_falls(network, task):
    batch = make_batch(items=1)
    batch["target"] = (batch["a"] + batch["b"]) / 2
    teacher = Fixed(torch.maximum(batch["a"], batch["b"]))
    method = GradientTransferMethod(build(network), task=task, teacher=teacher, lr=3e-3)
    totals = [sum(method.step(batch).values()) for _ in range(20)]
    assert np.isfinite(totals).all()
    assert totals[-1] < 0.65 * totals[0]
