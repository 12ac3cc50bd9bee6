"""Leaderboards of networks, functions, folders and baselines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fusionkit as fk
from fusionkit.baselines import BASELINES
from fusionkit.leaderboard import leaderboard

METRICS = ["entropy", "ssim", "rmse"]


class Pick(nn.Module):
    """Returns its first source."""

    def forward(self, a, b):
        return a


@pytest.fixture
def pairs() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "a": torch.rand(1, 24, 26, generator=generator),
            "b": torch.rand(3, 24, 26, generator=generator),
            "name": name,
        }
        for name in ("first", "second", "third")
    ]


def test_every_kind_of_method_has_its_rows(pairs, tmp_path):
    for pair in pairs:
        fk.save_image(pair["a"], tmp_path / "theirs" / f"{pair['name']}.png")
    methods = {"pick": Pick(), "function": lambda a, b: a, "folder": tmp_path / "theirs"}
    board = leaderboard(methods, pairs, METRICS, progress=False)
    names = [*methods, *BASELINES]
    assert list(board.images.index) == [(n, p["name"]) for n in names for p in pairs]
    assert list(board.images.columns) == METRICS
    expected = fk.evaluate(pairs[1]["a"], pairs[1]["b"], pairs[1]["a"], METRICS)
    for name in methods:
        found = board.images.loc[(name, "second")].to_numpy()
        np.testing.assert_allclose(found, expected.iloc[0], rtol=1e-12)
    average = board.images.loc[("average", "second"), "ssim"]
    assert average > board.images.loc[("pick", "second"), "ssim"] - 1


def test_a_model_by_name_fuses_with_its_own_weights_and_recipe(pairs):
    board = leaderboard({"ours": "refusion"}, pairs[:1], ["entropy"], task="mfif", progress=False)
    fused = fk.fuse(pairs[0]["a"], pairs[0]["b"], task="mfif", color="gray")
    expected = fk.evaluate(pairs[0]["a"], pairs[0]["b"], fused, ["entropy"])
    assert board.images.loc[("ours", "first"), "entropy"] == pytest.approx(expected.iloc[0, 0])


def test_stretch_is_for_the_methods_it_names(pairs):
    dim = {"dim": lambda a, b: a / 4, "dim too": nn.Sequential()}
    dim["dim too"].forward = lambda a, b: a / 4
    dim["stretched"] = nn.Sequential()
    dim["stretched"].forward = lambda a, b: a / 4
    board = leaderboard(
        dim, pairs, ["standard_deviation"], stretch=["stretched"], baselines=False, progress=False
    )
    means = board.means()["standard_deviation"]
    assert means["dim"] == pytest.approx(means["dim too"])
    assert means["stretched"] > 3.5 * means["dim"]


def test_ranks_turn_round_where_smaller_is_better(pairs):
    methods = {"pick": Pick(), "black": lambda a, b: torch.zeros_like(a)}
    board = leaderboard(methods, pairs, METRICS, baselines=False, progress=False)
    ranks = board.ranks()
    means = board.means()
    assert means.loc["pick", "rmse"] < means.loc["black", "rmse"]
    assert ranks.loc["pick"].tolist() == [1, 1, 1, 1]
    assert list(ranks.index) == ["pick", "black"]
    other = leaderboard(
        methods, pairs, METRICS, baselines=False, progress=False, smaller_is_better=["entropy"]
    )
    assert other.ranks().loc["pick", ["entropy", "rmse"]].tolist() == [2, 2]


def test_intervals_hold_the_mean(pairs):
    board = leaderboard({"pick": Pick()}, pairs, METRICS, progress=False)
    intervals = board.intervals()
    row = intervals.loc[("average", "ssim")]
    assert row["mean"] == pytest.approx(board.means().loc["average", "ssim"])
    assert row["low"] < row["mean"] < row["high"]
    assert row["pictures"] == 3


def test_one_worker_and_several_agree(pairs):
    one, two = (
        leaderboard({"pick": Pick()}, pairs, METRICS, workers=n, progress=False) for n in (1, 2)
    )
    np.testing.assert_allclose(one.images, two.images, rtol=1e-12)


def test_what_is_wrong_is_named(pairs, tmp_path):
    fk.save_image(pairs[0]["a"], tmp_path / "theirs" / "first.png")
    with pytest.raises(FileNotFoundError, match=r"theirs.*2 of 3 pairs: second, third"):
        leaderboard({"folder": tmp_path / "theirs"}, pairs, METRICS, progress=False)
    with pytest.raises(ValueError, match="'refusin'"):
        leaderboard({"x": "refusin"}, pairs, METRICS, progress=False)
    with pytest.raises(ValueError, match=r"average.*baselines"):
        leaderboard({"average": Pick()}, pairs, METRICS, progress=False)
    with pytest.raises(ValueError, match=r"stretch names.*'pik'"):
        leaderboard({"pick": Pick()}, pairs, METRICS, stretch=["pik"], progress=False)
    with pytest.raises(ValueError, match="several pairs are named 'first'"):
        leaderboard({"pick": Pick()}, [*pairs, pairs[0]], METRICS, progress=False)
    with pytest.raises(ValueError, match="no pair"):
        leaderboard({"pick": Pick()}, [], METRICS, progress=False)
    wrong = {"wide": lambda a, b: torch.zeros(1, 1, 24, 30)}
    with pytest.raises(ValueError, match=r"wide first.*24×26, 24×26, 24×30"):
        leaderboard(wrong, pairs, METRICS, progress=False)


def test_a_network_that_streams_goes_in_tiles_on_a_cpu(pairs):
    class Streams(Pick):
        cpu_tile = 16

        def stream(self, a, b, tile):
            tiles.append(tile)
            return a

    tiles = []
    board = leaderboard({"streams": Streams()}, pairs, ["entropy"], baselines=False, progress=False)
    assert tiles == [16] * len(pairs)
    assert len(board.images) == len(pairs)


def test_the_tiles_of_a_network_that_does_not_stream_are_for_large_pictures(pairs):
    class Heavy(Pick):
        cpu_tile = 16

        def forward(self, a, b):
            sizes.append(a.shape)
            return super().forward(a, b)

    sizes = []
    leaderboard({"heavy": Heavy()}, pairs, ["entropy"], baselines=False, progress=False)
    assert sizes == [(1, 1, *pair["a"].shape[-2:]) for pair in pairs]
