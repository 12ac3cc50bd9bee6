"""The pairs of a task: data sets that are there, embedded scenes otherwise."""

import pytest
import torch

import fusionkit as fk
from fusionkit.datasets.tasks import task_pairs


@pytest.fixture
def nothing_at_hand(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSIONKIT_SHARED", raising=False)
    monkeypatch.delenv("FUSIONKIT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("task", ["ivif", "mfif", "meif", "mif"])
def test_embedded_scenes_stand_in(nothing_at_hand, task):
    pairs, words = task_pairs(task, "test", count=2, size=(64, 64))
    assert len(pairs) == 2
    assert "embedded" in words
    train, _ = task_pairs(task, "train", count=2, size=(64, 64))
    assert not torch.equal(train[0]["b"], pairs[0]["b"])


def test_a_data_set_that_is_there_is_used(nothing_at_hand, tmp_path):
    for role in ("ir", "vi"):
        for stem in ("one", "two", "three"):
            fk.save_image(torch.rand(3, 16, 16), tmp_path / "sets/tno/test" / role / f"{stem}.png")
    pairs, words = task_pairs("ivif", "test", tmp_path / "sets", luminance=True)
    assert len(pairs) == 3
    assert words == "tno (3 pairs)"
    assert pairs[0]["b"].shape == (1, 16, 16)


def test_what_is_wrong_is_named(nothing_at_hand):
    with pytest.raises(ValueError, match="'validation'"):
        task_pairs("ivif", "validation")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        task_pairs("ivif", "test", "nowhere")
    with pytest.raises(ValueError, match="infrared"):
        task_pairs("infrared", "test")
