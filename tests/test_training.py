"""The training loop: exact resume after a kill, two processes as one, errors that say why.

Run as a script, this file is the training program that the tests kill, or start twice at once.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fusionkit.methods.base import Method
from fusionkit.methods.refusion import ReFusionMethod
from fusionkit.models.refusion import LossProposal, Reconstruction, ReFusion
from fusionkit.training import fit


class Pairs(Dataset):
    """Ten random pairs; `augment` draws from all three global generators, as augmentations do."""

    def __init__(self, augment: bool = True, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(5)
        self.pairs = torch.rand(10, 2, 1, 12, 12, generator=generator, dtype=dtype)
        self.augment = augment
        self.read = []

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        pair = self.pairs[index]
        if self.augment:
            pair = pair.flip(-1) if torch.rand(()) < 0.5 else pair
            pair = pair.flip(-2) if np.random.rand() < 0.5 else pair  # noqa: NPY002
            pair = pair * random.uniform(0.9, 1.0)
        return {"a": pair[0], "b": pair[1], "index": torch.tensor(index)}


class Average(Method):
    """Two convolutions trained to the average of a and b, from noisy sources.

    `trouble(step)` is called in the middle of every step; a number it returns becomes the loss.
    """

    def __init__(
        self, noise: float = 0.1, width: int = 4, dtype=torch.float64, trouble=lambda step: None
    ) -> None:
        torch.manual_seed(width)
        network = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 3, padding=1)
        ).to(dtype)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        super().__init__({"fusion": network}, {"fusion": optimizer})
        self.noise = noise
        self.trouble = trouble
        self.seen = []

    def step(self, batch: dict) -> dict[str, float]:
        self.seen.append(batch["index"].tolist())
        sources = torch.cat([batch["a"], batch["b"]], dim=1)
        sources = sources + self.noise * torch.randn_like(sources)
        fused = self.modules["fusion"](sources)
        loss = (fused - (batch["a"] + batch["b"]) / 2).square().mean()
        gradients = torch.autograd.grad(loss, list(self.modules["fusion"].parameters()))
        self.update("fusion", gradients)
        self.steps_taken += 1
        value = self.trouble(self.steps_taken)
        return {"loss": loss.item() if value is None else value, "pixels": float(fused.numel())}


def make_loader(augment: bool = True, **options) -> DataLoader:
    return DataLoader(Pairs(augment), **{"batch_size": 4, "shuffle": True, **options})


def train(out_dir: Path, method: Method | None = None, loader=None, **options):
    options = {"steps": 8, "checkpoint_every": 3, "log_every": 1, "device": "cpu", **options}
    method = Average() if method is None else method
    loader = make_loader() if loader is None else loader
    log = fit(method, loader, out_dir=out_dir, progress=False, **options)
    return method, log


def weights(method: Method) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in method.modules.parameters()])


def at_step(k: int, act):
    return lambda step: act() if step == k else None


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def read_log(out_dir: Path) -> pd.DataFrame:
    return pd.read_csv(out_dir / "log.csv").drop(columns="seconds")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("undisturbed")
    return out_dir, *train(out_dir)


@pytest.mark.parametrize("killed_at", [2, 5])  # before the first checkpoint, and past one
def test_killed_run_goes_on_bit_for_bit(tmp_path, undisturbed, killed_at):
    killed = subprocess.run(
        [sys.executable, __file__, "kill", str(tmp_path), str(killed_at)], timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "checkpoint.pt").exists() == (killed_at > 3)
    assert len(read_log(tmp_path)) == killed_at - 1  # the row of step 4 is past the checkpoint

    method, log = train(tmp_path)
    expected_dir, expected_method, expected_log = undisturbed
    assert torch.equal(weights(method), weights(expected_method))
    assert method.steps_taken == 8
    pd.testing.assert_frame_equal(read_log(tmp_path), read_log(expected_dir))
    pd.testing.assert_frame_equal(
        log.drop(columns="seconds"), expected_log.drop(columns="seconds"), check_exact=True
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "log.csv"]


def test_resume_reads_only_what_it_trains_on(tmp_path, undisturbed):
    train(tmp_path, steps=5)
    loader = make_loader()
    method, _ = train(tmp_path, loader=loader)  # from the middle of the second epoch
    assert method.seen == undisturbed[1].seen[5:]
    assert loader.dataset.read == [index for batch in method.seen for index in batch]
    assert torch.equal(weights(method), weights(undisturbed[1]))


def test_epochs_are_whole_and_differ(undisturbed):
    seen = undisturbed[1].seen
    first, second = ([i for batch in epoch for i in batch] for epoch in (seen[:3], seen[3:6]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_workers_change_nothing(tmp_path, undisturbed):
    method, _ = train(tmp_path, steps=5, loader=make_loader(num_workers=2))
    method, _ = train(tmp_path, loader=make_loader(num_workers=1))
    assert torch.equal(weights(method), weights(undisturbed[1]))


def test_samplers_with_a_generator_of_their_own(tmp_path):
    def loader():
        generator = torch.Generator().manual_seed(torch.seed())
        sampler = torch.utils.data.WeightedRandomSampler([1.0] * 10, 10, generator=generator)
        return make_loader(sampler=sampler, shuffle=False)

    straight, _ = train(tmp_path / "straight", loader=loader())
    train(tmp_path / "halves", loader=loader(), steps=4)
    halves, _ = train(tmp_path / "halves", loader=loader())
    assert halves.seen == straight.seen[4:]
    assert torch.equal(weights(halves), weights(straight))


def test_finished_run_is_not_trained_again(tmp_path):
    method, log = train(tmp_path, steps=4)
    (tmp_path / "log.csv").unlink()
    again, same = train(tmp_path, steps=4)
    assert again.seen == []
    assert torch.equal(weights(again), weights(method))
    pd.testing.assert_frame_equal(same, log)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "log.csv"), log)


def test_resume_false_starts_over(tmp_path):
    first, _ = train(tmp_path, steps=4)
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, Average(trouble=at_step(1, crash)), resume=False)
    assert not (tmp_path / "checkpoint.pt").exists()  # or the next call would take up the old run
    second, log = train(tmp_path, steps=4)
    assert len(second.seen) == len(log) == 4
    assert torch.equal(weights(first), weights(second))


def crash() -> None:
    raise RuntimeError("crash")


def test_seed_decides_and_global_generators_are_left_alone(tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    expected = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002
    methods = []
    for run, seed in enumerate([0, 0, 1]):
        method = Average()
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        train(tmp_path / str(run), method, steps=2, seed=seed)
        assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected  # noqa: NPY002
        methods.append(weights(method))
    assert torch.equal(methods[0], methods[1])
    assert not torch.equal(methods[0], methods[2])


def test_interrupt_finishes_the_step_and_saves(tmp_path, undisturbed):
    method = Average(trouble=at_step(5, interrupt))
    with pytest.raises(KeyboardInterrupt, match=r"after step 5 of 8; .*checkpoint.pt holds step 5"):
        train(tmp_path, method)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    method, _ = train(tmp_path)
    assert len(method.seen) == 3
    assert torch.equal(weights(method), weights(undisturbed[1]))
    pd.testing.assert_frame_equal(read_log(tmp_path), read_log(undisturbed[0]))


def test_second_interrupt_keeps_the_last_checkpoint(tmp_path, undisturbed):
    def twice():
        interrupt()
        interrupt()

    method = Average(trouble=at_step(5, twice))
    with pytest.raises(KeyboardInterrupt, match=r"after step 4 of 8; .*checkpoint.pt holds step 3"):
        train(tmp_path, method)
    method, _ = train(tmp_path)
    assert torch.equal(weights(method), weights(undisturbed[1]))


def test_log_rows_columns_and_callback(tmp_path, capfd):
    logged = []

    class Phases(Average):
        def step(self, batch):
            losses = super().step(batch)
            return losses | ({"meta": 0.5} if self.steps_taken >= 4 else {})

    options = {"log_every": 2, "steps": 6, "on_log": lambda *row: logged.append(row)}
    _, log = train(tmp_path, Phases(), **options)
    assert list(log.columns) == ["step", "loss", "pixels", "meta", "seconds"]
    assert log["step"].tolist() == [1, 2, 4, 6] == [step for step, _ in logged]
    assert log["loss"].tolist() == [losses["loss"] for _, losses in logged]
    assert log["meta"].isna().tolist() == [True, True, False, False]
    assert log["seconds"].is_monotonic_increasing
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "log.csv"), log)
    assert capfd.readouterr() == ("", "")


def test_progress_shows_the_losses(tmp_path, capfd):
    fit(Average(), make_loader(), steps=3, out_dir=tmp_path, device="cpu")
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err
    assert "loss=" in err


class Twice(Average):
    """Takes a step and looks at the network again, as meta-learning does."""

    def step(self, batch):
        losses = super().step(batch)
        sources = torch.cat([batch["a"], batch["b"]], dim=1)
        fused = self.modules["fusion"](sources)
        self.dtype = fused.dtype
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            fresh = self.modules["fusion"](sources)
        assert torch.equal(fused, fresh)
        return losses


def test_bf16(tmp_path):
    loader = DataLoader(Pairs(dtype=torch.float32), batch_size=4, shuffle=True)
    method = Twice(dtype=torch.float32)
    _, log = train(tmp_path, method, loader, mixed_precision="bf16", steps=12)
    assert method.dtype == torch.bfloat16
    assert next(method.modules.parameters()).dtype == torch.float32
    assert log["loss"].iloc[-1] < log["loss"].iloc[0]
    with pytest.raises(ValueError, match=r"mixed_precision is 'bf16' there, expected 'no'"):
        train(tmp_path, Twice(), steps=12)


@pytest.mark.parametrize(
    ("precision", "message"), [("fp16", "no loss scaling, use bf16"), ("fp8", "'no' or 'bf16'")]
)
def test_precision_that_cannot_be(tmp_path, precision, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, mixed_precision=precision)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(tmp_path, value):
    method = Average(trouble=at_step(5, lambda: value))
    message = rf"step 5: loss 'loss' is {value}; .*checkpoint.pt holds step 3"
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path, method)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3


def test_weight_that_is_not_finite_is_not_saved(tmp_path):
    def overflow():
        with torch.no_grad():
            method.modules["fusion"][0].weight[0] = float("inf")

    method = Average(trouble=at_step(6, overflow))
    message = r"step 6: weight 'fusion.0.weight' is inf; .*checkpoint.pt holds step 3"
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path, method)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "seed is 0 there, expected 3"),
        ({"method": Twice()}, "method is 'Average' there, expected 'Twice'"),
        ({"loader": make_loader(batch_size=2)}, "batches per epoch is 3 there, expected 5"),
        ({"steps": 2}, "3 steps are done there, expected at most steps=2"),
        ({"method": Average(width=8)}, r"another network \(of another shape: fusion.0.weight"),
    ],
)
def test_checkpoint_of_another_run(tmp_path, change, message):
    train(tmp_path, steps=3)
    with pytest.raises(ValueError, match=rf"checkpoint.pt: .*{message}"):
        train(tmp_path, **change)


def test_checkpoint_of_another_network_leaves_ours_untouched(tmp_path):
    train(tmp_path, steps=3)
    deeper = Average()
    deeper.modules["fusion"].append(nn.Conv2d(1, 1, 1))
    del deeper.modules["fusion"][0]
    before = weights(deeper).clone()
    with pytest.raises(ValueError, match=r"checkpoint.pt: .*missing: fusion.1.*unexpected: fus"):
        train(tmp_path, deeper)
    assert torch.equal(weights(deeper), before)


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no"])
def test_broken_checkpoint(tmp_path, spoil):
    train(tmp_path, steps=3)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"checkpoint.pt: not a whole checkpoint"):
        train(tmp_path)


def test_file_that_is_no_checkpoint(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint.pt: not a whole checkpoint"):
        train(tmp_path)


@pytest.mark.parametrize("name", ["steps", "checkpoint_every", "log_every"])
def test_counts_are_positive(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        train(tmp_path, **{name: 0})


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Pairs())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream(), batch_size=4), "expected a map-style dataset"),
        (DataLoader(Pairs(), batch_size=None), "no batch sampler"),
        (make_loader(batch_size=16, drop_last=True), "no batch: 10 samples, batch size 16"),
    ],
)
def test_loader_that_cannot_be_followed(tmp_path, loader, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, loader=loader)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_device_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"device 'cuda', but accelerate runs on"):
        train(tmp_path, device="cuda")


def launch(*arguments: str) -> None:
    """This file as two CPU processes, with the environment that `torchrun` gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=os.environ | settings | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(errors)


def train_refusion(out_dir: Path):
    """ReFusion's meta and fusion steps on batches of four, in float64 on tiny networks."""
    torch.manual_seed(0)
    tiny = {"dim": 4, "heads": 2, "blocks": 1}
    networks = [network(**tiny).double() for network in (ReFusion, LossProposal, Reconstruction)]
    fusion, proposal, reconstruction = networks
    method = ReFusionMethod(
        fusion, proposal=proposal, reconstruction=reconstruction,
        lr=1e-3, inner_lr=0.5, meta_steps=2, fusion_steps=1,
    )  # fmt: skip
    pictures = torch.rand(8, 2, 1, 10, 12, dtype=torch.float64)
    loader = DataLoader([{"a": a, "b": b} for a, b in pictures], batch_size=4)
    settings = {"steps": 5, "log_every": 1, "device": "cpu", "progress": False}
    return method, fit(method, loader, out_dir=out_dir, **settings)


def test_two_processes_train_as_one(tmp_path):
    """Also: their resume is exact, and a NaN in one of them stops both."""
    launch("pair", str(tmp_path))

    method, log = train_refusion(tmp_path / "one_refusion")
    refusion = pd.read_csv(tmp_path / "refusion" / "log.csv")
    for name in ("fusion", "reconstruction", "meta"):
        np.testing.assert_allclose(refusion[name], log[name], rtol=1e-9)
    assert log["meta"].notna().tolist() == [True, True, False, True, True]
    proposal = torch.load(tmp_path / "proposal.pt", weights_only=True)
    # The meta-gradient crosses the processes twice: as v, and as the gradient of P.
    for name, value in method.proposal.state_dict().items():
        torch.testing.assert_close(proposal[name], value, rtol=0, atol=1e-9)

    one, log = train(tmp_path / "one", Average(noise=0))
    two = torch.load(tmp_path / "weights.pt", weights_only=True)
    torch.testing.assert_close(two["one"], weights(one), rtol=0, atol=1e-12)
    two_log = pd.read_csv(tmp_path / "two" / "log.csv")
    np.testing.assert_allclose(two_log["loss"], log["loss"], rtol=0, atol=1e-12)
    assert two_log["pixels"].tolist() == (log["pixels"] / 2).tolist()

    assert torch.equal(two["straight"], two["resumed"])
    pd.testing.assert_frame_equal(read_log(tmp_path / "straight"), read_log(tmp_path / "resumed"))

    with pytest.raises(ValueError, match="processes is 2 there, expected 1"):
        train(tmp_path / "two", Average(noise=0))


def train_as_one_of_two(out_dir: Path) -> None:
    rank = int(os.environ["RANK"])
    method = Average(noise=0)
    with torch.no_grad():
        method.modules["fusion"][0].weight.mul_(1 + rank)  # process 0's weights must win
    found = {"one": weights(train(out_dir / "two", method)[0])}
    found["straight"] = weights(train(out_dir / "straight")[0])
    train(out_dir / "resumed", steps=4)
    found["resumed"] = weights(train(out_dir / "resumed")[0])
    refusion, _ = train_refusion(out_dir / "refusion")
    if rank == 0:
        torch.save(found, out_dir / "weights.pt")
        torch.save(refusion.proposal.state_dict(), out_dir / "proposal.pt")

    trouble = at_step(2, lambda: float("nan") if rank == 1 else None)
    with pytest.raises(FloatingPointError, match="step 2: loss 'loss' is nan"):
        train(out_dir / "nan", Average(trouble=trouble))
    with pytest.raises(ValueError, match="batch size 5, expected a multiple of 2"):
        train(out_dir / "odd", loader=make_loader(batch_size=5))
    uneven = DataLoader(Pairs(), batch_sampler=[[0, 1, 2, 3], [4]])
    method, _ = train(out_dir / "uneven", loader=uneven, steps=2)
    assert method.seen == [[[0, 1], [2, 3]][rank], [4]]


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        killed_at = int(sys.argv[3])
        kill = at_step(killed_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        train(Path(sys.argv[2]), Average(trouble=kill))
    else:
        train_as_one_of_two(Path(sys.argv[2]))
