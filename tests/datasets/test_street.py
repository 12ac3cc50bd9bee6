"""Street scenes: labels, boxes, and what is warm."""

import numpy as np
import pytest

from fusionkit.datasets.street import STREET_CLASSES, TIMES, _boxes, scene

ID = {name: index for index, name in enumerate(STREET_CLASSES)}


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("seed", range(2))
def test_labels_and_boxes_agree(time, seed):
    item = scene(np.random.default_rng(seed), (128, 160), time)
    labels = item["labels"]
    assert labels.dtype == np.int64
    assert set(np.unique(labels)) <= set(range(1, len(STREET_CLASSES)))
    assert {ID["road"], ID["building"], ID["sky"]} <= set(np.unique(labels))
    assert item["boxes"].dtype == np.float32
    assert len(item["boxes"]) == len(item["classes"]) > 0
    for (left, top, right, bottom), cls in zip(
        item["boxes"].astype(int), item["classes"], strict=True
    ):
        own = labels[top:bottom, left:right] == cls
        for side in (own[0], own[-1], own[:, 0], own[:, -1]):  # tight: the mask meets every side
            assert side.any()


def test_a_box_holds_what_can_be_seen_and_crumbs_are_dropped():
    instance = np.zeros((64, 64), np.int32)
    instance[10:40, 10:30] = 1
    instance[20:50, 20:50] = 2  # stands before 1
    instance[60, 60] = 3
    labels = np.where(instance > 0, ID["car"], ID["road"])
    boxes, classes = _boxes(instance, labels)
    assert boxes.tolist() == [[10, 10, 30, 40], [20, 20, 50, 50]]
    assert classes.tolist() == [ID["car"]] * 2
    instance[10:20, 10:30] = instance[20:40, 15:20] = 0
    boxes, _ = _boxes(instance, labels)
    assert boxes[0].tolist() == [10, 20, 15, 40]


@pytest.mark.parametrize("time", ["night", "glare"])
def test_persons_at_night_are_warm_and_hardly_seen(time):
    seen = 0
    for seed in range(5):
        item = scene(np.random.default_rng(seed), (160, 160), time)
        persons = item["labels"] == ID["person"]
        if persons.sum() < 60:
            continue
        seen += 1
        around = np.isin(item["labels"], (ID["road"], ID["pavement"], ID["building"]))
        assert item["a"][persons].mean() > item["a"][around].mean() + 0.12
        if time == "night":
            assert item["b"][persons].mean() < 0.35
    assert seen >= 3


def test_the_sky_is_the_coldest_and_the_day_the_brightest():
    day, night = (scene(np.random.default_rng(1), (96, 96), time) for time in ("day", "night"))
    for item in (day, night):
        sky = item["labels"] == ID["sky"]
        assert item["a"][sky].mean() < item["a"][~sky].mean() - 0.1
    assert day["b"].mean() > 2 * night["b"].mean()


def test_glare_saturates_the_visible_not_the_infrared():
    item = scene(np.random.default_rng(2), (128, 128), "glare")
    assert (item["b"].min(axis=-1) > 0.98).mean() > 0.002
    assert (item["a"] > 0.98).mean() < 0.002


@pytest.mark.parametrize("seed", range(7, 13))
def test_no_hedge_or_wall_is_blacker_than_black(seed):
    item = scene(np.random.default_rng(seed), (64, 64), TIMES[seed % 3])
    assert np.isfinite(item["a"]).all()
    assert np.isfinite(item["b"]).all()
