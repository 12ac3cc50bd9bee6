"""Pairs for the stages of gradient transfer, on a RoadScene of three small pictures."""

import pytest
import torch

import fusionkit as fk
from fusionkit.datasets import dataset_info
from fusionkit.datasets.stages import centre_crop, stage_pairs


@pytest.fixture
def root(tmp_path):
    assert "train" in dataset_info("roadscene").splits
    for role in ("ir", "vi"):
        for stem in ("one", "two", "three"):
            path = tmp_path / "roadscene/train" / role / f"{stem}.png"
            fk.save_image(torch.rand(3, 40, 48), path)
    return tmp_path


def test_the_last_stage_has_the_set_itself(root):
    assert len(stage_pairs("ivif", root)) == 3


@pytest.mark.parametrize("task", ["mfif", "meif"])
def test_the_others_have_a_target(root, task):
    pairs = stage_pairs(task, root)
    assert len(pairs) == 3 + 40
    for i in (0, 42):
        assert pairs[i]["target"].shape[0] == 3


def test_without_the_set_it_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="roadscene"):
        stage_pairs("ivif", tmp_path)


def test_the_centre_of_a_pair():
    pair = {"name": "x", "a": torch.rand(1, 10, 7), "b": torch.rand(3, 10, 7), "labels": 3}
    item = centre_crop(pair, side=8)
    assert item.keys() == {"name", "a", "b"}
    torch.testing.assert_close(item["a"], pair["a"][:, 1:9])
    assert item["b"].shape == (1, 8, 7)
