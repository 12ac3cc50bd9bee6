"""The command line: results, messages and exit statuses."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fusionkit.cli import main
from fusionkit.models.refusion import ReFusion
from fusionkit.models.weight_files import save_weights


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for role, shape in (("ir", (24, 30)), ("vi", (24, 30, 3))):
        (tmp_path / role).mkdir()
        for stem in ("one", "two"):
            picture = rng.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / role / f"{stem}.png")
    torch.manual_seed(0)
    save_weights(ReFusion(), tmp_path / "weights.safetensors")
    return tmp_path


def test_fuse_a_pair_then_evaluate_it(folders, capsys):
    pair = [str(folders / role / "one.png") for role in ("ir", "vi")]
    out, table = folders / "out" / "one.png", folders / "table.csv"
    weights = str(folders / "weights.safetensors")
    assert main(["fuse", *pair, "-o", str(out), "--task", "ivif", "--checkpoint", weights]) == 0
    assert Image.open(out).size == (30, 24)
    assert Image.open(out).mode == "RGB"
    assert main(["evaluate", *pair, str(out), "--metrics", "entropy", "-o", str(table)]) == 0
    assert "entropy" in capsys.readouterr().out
    assert 0 < pd.read_csv(table)["entropy"][0] <= 8


def test_evaluate_folders_prints_means_with_their_intervals(folders, capsys):
    roles = [str(folders / role) for role in ("ir", "vi", "vi")]
    assert main(["evaluate", *roles, "--metrics", "entropy", "rmse"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if "95 %" in line)
    assert lines[header + 1].split() == ["mean", "low", "high"]
    for line in lines[-2:]:
        mean, low, high = map(float, line.split()[1:])
        assert low <= mean <= high


def test_fuse_folders_reports_the_broken_pair_and_goes_on(folders, capsys):
    (folders / "ir" / "two.png").write_bytes(b"\x89PNG, cut short")
    sources = [str(folders / "ir"), str(folders / "vi")]
    weights = str(folders / "weights.safetensors")
    assert main(["fuse", *sources, "-o", str(folders / "out"), "--checkpoint", weights]) == 1
    printed = capsys.readouterr()
    assert "1 of 2 pairs" in printed.out
    assert "two" in printed.err
    assert [path.name for path in (folders / "out").iterdir()] == ["one.png"]
    (folders / "out" / "two.png").write_bytes((folders / "out" / "one.png").read_bytes())
    assert main(["evaluate", *sources, str(folders / "out")]) == 2
    assert "two.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "infrared"], ["'infrared'", "ivif"]),
        (["--model", "refusoin"], ["'refusoin'", "refusion"]),
        (["--checkpoint", "nowhere.pth"], ["nowhere.pth"]),
    ],
)
def test_a_wrong_name_is_named(folders, capsys, arguments, words):
    pair = [str(folders / role / "one.png") for role in ("ir", "vi")]
    assert main(["fuse", *pair, "-o", str(folders / "x.png"), *arguments]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)
    assert not (folders / "x.png").exists()


def test_models_and_datasets_are_listed(capsys):
    assert main(["models"]) == 0
    assert main(["datasets"]) == 0
    printed = capsys.readouterr().out
    assert "refusion" in printed
    assert "roadscene" in printed
