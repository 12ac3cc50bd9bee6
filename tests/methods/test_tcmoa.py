"""TC-MoA's method: what is trained, in which order, at which rate; averages, resume, ablations.

Run as a script, this file is the training program that a test kills.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fusionkit.datasets import RandomCrops
from fusionkit.datasets.embedded import EmbeddedPairs
from fusionkit.datasets.task_crops import TaskCrops
from fusionkit.methods.base import decay_groups, warmup_cosine
from fusionkit.methods.tcmoa import TCMoAMethod
from fusionkit.methods.tcmoa_losses import WARMUP_WEIGHTS, tcmoa_loss
from fusionkit.models.adapters import PromptControl
from fusionkit.models.tcmoa import TCMoA
from fusionkit.models.weight_files import read_state
from fusionkit.training import fit

TASKS = ("ivif", "meif", "mfif")
SMALL = {
    "width": 32, "depth": 4, "heads": 2,
    "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2,
}  # fmt: skip


def make_network(seed: int = 0, **options) -> TCMoA:
    torch.manual_seed(seed)
    network = TCMoA(**{**SMALL, **options})
    with torch.no_grad():  # into the range of pixels, so that little is clipped
        network.decoder_pred.weight.mul_(0.2)
    return network


def make_method(network: nn.Module | None = None, **options) -> TCMoAMethod:
    network = make_network() if network is None else network
    return TCMoAMethod(
        network, **{"steps_per_epoch": 2, "epochs": 4, "warmup_epochs": 1, **options}
    )


class Pairs(Dataset):
    def __init__(self, side: int = 32, count: int = 4) -> None:
        generator = torch.Generator().manual_seed(3)
        self.pairs = torch.rand(count, 3, 2, 1, side, side, generator=generator)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, k: int) -> dict:
        pairs = self.pairs[k].flip(-1) if torch.rand(()) < 0.5 else self.pairs[k]
        return {task: {"a": a, "b": b} for task, (a, b) in zip(TASKS, pairs, strict=True)}


def make_batch(side: int = 32, items: int = 1) -> dict:
    return next(iter(DataLoader(Pairs(side), batch_size=items)))


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


def trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


# What is trained


def test_backbone_stays_bit_for_bit():
    method = make_method()
    before = snapshot(method.fusion)
    for _ in range(3):
        method.step(make_batch())
    moved = changed(method.fusion, before)
    assert moved <= trained(method.fusion)
    assert all(".layers." in name or ".relative_position." in name for name in moved)
    # All of them, unless a bottleneck of one ReLU never opened.
    still = trained(method.fusion) - moved
    assert all(".adapters." in name for name in still)
    assert len(still) <= 4
    held = {id(p) for group in method.optimizers["fusion"].param_groups for p in group["params"]}
    assert held == {id(p) for p in method.fusion.parameters() if p.requires_grad}


@pytest.mark.parametrize("task", TASKS)
def test_gradients_reach_every_kind_of_part(task):
    method = make_method(warmup_epochs=0)
    network, index = method.fusion, TASKS.index(task)
    with torch.no_grad():
        for tower in (network.encoder, network.decoder):
            for layer in tower.layers:
                layer.routers.gate.normal_()
    network.train()
    sources = make_batch(112, 2)[task]
    loss, _ = method.loss(task, sources["a"], sources["b"])
    loss.backward()
    for tower in (network.encoder, network.decoder):
        for layer in tower.layers:
            assert layer.mixing.grad.abs() > 0
            assert all(p.grad.abs().max() > 0 for p in layer.fusion.parameters())
            assert all(p.grad.abs().max() > 0 for p in layer.reduce.parameters())
            assert sum(p.grad.abs().sum() for p in layer.adapters.parameters()) > 0
            for bank in (layer.routers.gate, layer.routers.noise, layer.source_embedding):
                assert bank.grad[index].abs().max() > 0
                others = [i for i in range(3) if i != index]
                assert (bank.grad[others] == 0).all()
        assert all(table.table.grad.abs().max() > 0 for table in tower.relative_position)
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


def test_weight_decay_spares_biases_norms_and_lambda():
    method = make_method(lr=0.1, weight_decay=0.5)
    decayed, spared = method.optimizers["fusion"].param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    assert decayed["betas"] == (0.9, 0.95)
    names = {id(p): name for name, p in method.fusion.named_parameters()}
    for p in spared["params"]:
        name = names[id(p)]
        assert name.endswith((".bias", ".mixing")) or ".reduce.0." in name or ".reduce.2." in name
    assert not any(names[id(p)].endswith((".bias", ".mixing")) for p in decayed["params"])
    groups = decay_groups([nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))], 0.1)
    assert [len(group["params"]) for group in groups] == [1, 1]


# The order and the schedule


def test_one_update_a_task_in_the_paper_s_order():
    method, manual = make_method(), make_network()
    batch = make_batch()
    optimizer = torch.optim.AdamW(
        decay_groups((p for p in manual.parameters() if p.requires_grad), 0.05),
        lr=3e-4 / 2, betas=(0.9, 0.95),
    )  # fmt: skip
    manual.train()
    torch.manual_seed(1)
    expected = {}
    for task in ("ivif", "meif", "mfif"):
        a, b = batch[task]["a"], batch[task]["b"]
        out = manual.explain(a, b, task)
        loss, _ = tcmoa_loss(task, a, b, out, epoch=0, warmup=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected[task] = loss.item()
    torch.manual_seed(1)
    report = method.step(dict(reversed(batch.items())))  # the batch's own order does not matter
    assert {task: report[task] for task in TASKS} == pytest.approx(expected, rel=1e-6)
    for ours, theirs in zip(method.fusion.parameters(), manual.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    assert list(report) == [*TASKS, "mir", "balance"]


def test_learning_rate_rises_then_falls_along_a_cosine():
    method = make_method(steps_per_epoch=10, epochs=6, warmup_epochs=2, lr=1.0, final_lr=0.1)
    rates = []
    for method.steps_taken in range(65):
        rates.append(method.learning_rate())
    assert rates[:20] == pytest.approx([(k + 1) / 20 for k in range(20)])
    assert rates[20] == 1.0
    assert rates[40] == pytest.approx(0.55)
    assert rates[60] == rates[64] == pytest.approx(0.1)
    assert all(x > y for x, y in pairwise(rates[20:61]))
    assert warmup_cosine(0, 0, 10) == 1.0


def test_warm_up_losses_then_the_tasks_and_less_balance_with_each_epoch():
    method = make_method(network=make_network().eval(), steps_per_epoch=1, warmup_epochs=2)
    sources = make_batch()["ivif"]
    out = method.fusion.explain(sources["a"], sources["b"], "ivif")
    for epoch in range(4):
        method.steps_taken = epoch
        loss, terms = method.loss("ivif", sources["a"], sources["b"])
        expected = tcmoa_loss(
            "ivif", sources["a"], sources["b"], out, epoch=epoch, warmup=epoch < 2
        )
        torch.testing.assert_close(loss, expected[0])
        if epoch < 2:
            weights = WARMUP_WEIGHTS["ivif"]
            pictures = sum(weight * terms[name] for name, weight in weights.items())
            torch.testing.assert_close(loss - pictures, out.auxiliary / (epoch + 1))


# Averages, noise, resume


def test_moving_average_by_hand():
    method = make_method(tasks=["ivif", "mfif"], ema=0.9, lr=0.05)
    weights = method.fusion.encoder.layers[0].fusion[1].weight
    average = weights.detach().clone()
    seen = []
    update = method.update

    def remember(name, gradients):
        update(name, gradients)
        seen.append(weights.detach().clone())

    method.update = remember
    before = snapshot(method.fusion)
    method.step(make_batch())
    method.step(make_batch())
    assert len(seen) == 4
    for value in seen:
        average = 0.9 * average + 0.1 * value
    network = method.ema_network()
    torch.testing.assert_close(network.encoder.layers[0].fusion[1].weight.detach(), average)
    assert not torch.allclose(average, weights)
    assert changed(network, before) <= trained(method.fusion)
    assert not network.training
    assert method.fusion.training
    assert set(method.average_weights) == trained(method.fusion)


def test_routers_are_noisy_in_training_only():
    method = make_method(network=make_network().eval(), warmup_epochs=0)
    batch = make_batch()
    other = copy.deepcopy(method)
    torch.manual_seed(1)
    one = method.step(batch)
    torch.manual_seed(2)
    two = other.step(batch)
    assert one["balance"] != two["balance"]
    network, (a, b) = method.ema_network(), batch["ivif"].values()
    with torch.inference_mode():
        assert torch.equal(network(a, b), network(a, b))
        noisy = method.fusion(a, b)
        assert not torch.equal(noisy, method.fusion(a, b))
        assert network(a, b, "meif", PromptControl(beta=0.1)).shape == a.shape


def train(out_dir: Path, method: TCMoAMethod | None = None, **options) -> TCMoAMethod:
    method = make_method() if method is None else method
    loader = DataLoader(Pairs(), batch_size=2, shuffle=True)
    options = {"steps": 5, "checkpoint_every": 2, "log_every": 1, "device": "cpu", **options}
    fit(method, loader, out_dir=out_dir, progress=False, **options)
    return method


class Killed(TCMoAMethod):
    """Killed in its fourth step, between two tasks."""

    def loss(self, task, a, b):
        if self.steps_taken == 3 and task == "meif":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(task, a, b)


Killed.__name__ = "TCMoAMethod"  # what the checkpoint notes down


def test_killed_run_goes_on_bit_for_bit(tmp_path):
    straight = train(tmp_path / "straight")
    killed = subprocess.run([sys.executable, __file__, str(tmp_path / "killed")], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    saved = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 2
    resumed = train(tmp_path / "killed")
    assert resumed.steps_taken == 5
    assert changed(resumed.fusion, snapshot(straight.fusion)) == set()
    assert changed(resumed.ema_network(), snapshot(straight.ema_network())) == set()
    ours, theirs = (m.optimizers["fusion"].state_dict()["state"] for m in (resumed, straight))
    assert all(torch.equal(ours[i][k], theirs[i][k]) for i in ours for k in ours[i])
    assert changed(straight.fusion, snapshot(make_network())) <= trained(straight.fusion)
    # A run's checkpoint is a checkpoint of the network.
    state = read_state(tmp_path / "straight" / "checkpoint.pt")
    assert all(torch.equal(value, state[k]) for k, value in straight.fusion.state_dict().items())


def test_state_of_another_selection_is_refused(tmp_path):
    train(tmp_path, steps=1)
    whole = make_network().requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"does not fit this TCMoAMethod \(averages of \d+ weights"
    ):
        train(tmp_path, make_method(whole), steps=2)


# Ablations and other networks


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ({}, {"tasks": ["mfif"]}),
        ({"adapters": 1, "active": 1}, {}),
        ({"adapters": 2, "active": 2}, {"mir_form": "paper", "mef_scales": 3}),
        ({"interval": 2}, {"weights": {"ivif": {"pixel": 1.0}}}),
        ({"tuning": "adaptformer"}, {}),
        ({"tuning": "linear"}, {}),
    ],
)
def test_ablations_train_what_they_should(network, options):
    method = make_method(make_network(**network), warmup_epochs=0, **options)
    before = snapshot(method.fusion)
    method.step(make_batch())  # AdaptFormer's gradients first reach what lies behind the zeros
    report = method.step(make_batch())
    assert list(report) == [*options.get("tasks", TASKS), "mir", "balance"]
    moved = changed(method.fusion, before)
    assert moved
    assert moved <= trained(method.fusion)
    if network.get("tuning") == "linear":
        assert moved == {"decoder_pred.weight", "decoder_pred.bias"}
    if "tuning" in network:
        assert report["mir"] == report["balance"] == 0


def test_unfrozen_backbone_is_trained():
    method = make_method(make_network().requires_grad_(True))
    before = snapshot(method.fusion)
    method.step(make_batch())
    moved = changed(method.fusion, before)
    assert {"patch_embed.weight", "encoder.blocks.0.mlp.fc1.weight", "decoder_pred.bias"} <= moved


class TwoLayers(nn.Module):
    """A network that knows neither tasks nor prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)
        )

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([a, b], dim=1)) + (a + b) / 2


def test_any_network_can_be_trained():
    torch.manual_seed(0)
    method = make_method(TwoLayers(), warmup_epochs=0, lr=1e-2, tasks=["ivif"])
    first = method.step(make_batch())["ivif"]
    for _ in range(6):
        last = method.step(make_batch())
    assert last["ivif"] < first
    assert last["mir"] == last["balance"] == 0


def test_losses_fall_on_real_crops():
    torch.manual_seed(0)
    crops = {
        task: RandomCrops(EmbeddedPairs(task, count=1, size=(64, 64)), size=32, count=4)
        for task in TASKS
    }
    batch = next(iter(DataLoader(TaskCrops(crops), batch_size=2)))
    method = make_method(lr=5e-3, steps_per_epoch=4, warmup_epochs=3)
    reports = [method.step(batch) for _ in range(12)]
    for task in TASKS:
        assert reports[-1][task] < reports[0][task]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, r"tasks are \[\], expected one or more"),
        ({"tasks": ["mif"]}, "unknown task 'mif'"),
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0, expected at least 1"),
        ({"warmup_epochs": 4}, "warmup_epochs is 4, expected 0 to 3"),
        ({"ema": 1.0}, "ema is 1.0, expected at least 0 and less than 1"),
        ({"network": make_network().requires_grad_(False)}, "0 parameters require a gradient"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_method(**options)


if __name__ == "__main__":
    network = make_network()
    method = Killed(network, steps_per_epoch=2, epochs=4, warmup_epochs=1)
    train(Path(sys.argv[1]), method)
