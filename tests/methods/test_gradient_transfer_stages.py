"""A sequence of stages: who teaches, who inherits, and that a killed run goes on bit for bit.

Run as a script, this file is the training program that the test kills.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fusionkit.methods.gradient_transfer import train_stages
from fusionkit.models.frufn import EFRUFN

SEQUENCE = ("mfif", "meif", "ivif")
STEPS = 4


class Triples(Dataset):
    """Random sources and targets, two a step; to read those of step `killed_at` is to be killed."""

    def __init__(self, killed_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.items = torch.rand(2 * STEPS, 3, 1, 16, 16, generator=generator)
        self.killed_at = killed_at

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if self.killed_at is not None and i // 2 + 1 == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return dict(zip(("a", "b", "target"), self.items[i], strict=True))


def build() -> nn.Module:
    return EFRUFN(width=8, heads=2, max_evaluations=3)


def new_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def stages(out_dir, order=("mfif", "ivif"), killed_at=None, **options) -> dict[str, nn.Module]:
    """Train; `killed_at` is a step of the second stage."""
    loaders = {
        task: DataLoader(Triples(killed_at if task == order[1] else None), batch_size=2)
        for task in order
    }
    options = {"log_every": 1, "device": "cpu", "progress": False, **options}
    return train_stages(build, loaders, out_dir, **options)


def flat(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


pytestmark = pytest.mark.filterwarnings(
    "ignore::fusionkit.models.fixed_point.FixedPointWarning"  # new weights need not contract
)


def test_each_stage_is_taught_by_the_one_before(tmp_path):
    stages(tmp_path)
    columns = {t: (tmp_path / t / "log.csv").read_text().splitlines()[0] for t in ("mfif", "ivif")}
    assert "transfer" not in columns["mfif"]
    assert "transfer" in columns["ivif"]


def test_a_stage_inherits_its_teachers_weights_or_not(tmp_path):
    still = {"lr": 0.0}
    moved = stages(tmp_path / "a", ("meif", "ivif"), options={"lr": 1e-2}, seed=3)
    assert not torch.equal(flat(moved["meif"]), flat(new_network(3)))
    kept = stages(tmp_path / "b", options=still, seed=3)
    assert torch.equal(flat(kept["ivif"]), flat(new_network(3)))
    fresh = stages(tmp_path / "c", inherit=(), options={"lr": 1e-2})
    handed = stages(tmp_path / "d", options={"lr": 1e-2})
    assert torch.equal(flat(fresh["mfif"]), flat(handed["mfif"]))
    assert not torch.equal(flat(fresh["ivif"]), flat(handed["ivif"]))


def test_finished_stages_are_not_trained_again(tmp_path):
    first = stages(tmp_path)
    (tmp_path / "ivif" / "checkpoint.pt").unlink()  # killed before the second stage had saved
    again = stages(tmp_path)
    for task in first:
        assert torch.equal(flat(first[task]), flat(again[task]))


KILLED = {"order": SEQUENCE, "seed": 2, "checkpoint_every": 2, "options": {"lr": 1e-2}}


def test_a_sequence_killed_in_its_second_stage_goes_on_bit_for_bit(tmp_path):
    killed = subprocess.run([sys.executable, __file__, str(tmp_path / "killed")], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    half = torch.load(tmp_path / "killed" / "meif" / "checkpoint.pt", weights_only=True)
    assert half["step"] == 2
    assert not (tmp_path / "killed" / "ivif").exists()

    resumed = stages(tmp_path / "killed", **KILLED)
    undisturbed = stages(tmp_path / "undisturbed", **KILLED)
    for task in SEQUENCE:
        assert torch.equal(flat(resumed[task]), flat(undisturbed[task])), task


if __name__ == "__main__":
    stages(Path(sys.argv[1]), killed_at=4, **KILLED)
