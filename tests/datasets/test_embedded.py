"""Embedded pairs: what every item promises, whatever the task."""

import socket

import numpy as np
import pytest
import torch

from fusionkit.datasets.embedded import EmbeddedPairs

TASKS = ("ivif", "mfif", "meif", "mif")
RGB = {"ivif": (1, 3), "mfif": (3, 3), "meif": (3, 3)}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [(32, 32), (75, 101)])
def test_pictures_are_float32_in_range_at_any_size(task, size):
    pairs = EmbeddedPairs(task, count=3, size=size)
    assert len(pairs) == 3
    for item in pairs:
        channels = RGB.get(task, (1 if "_ct" in item["name"] else 3, 1))
        for key, count in zip(("a", "b"), channels, strict=True):
            assert item[key].shape == (count, *size)
            assert item[key].dtype == torch.float32
            assert item[key].min() >= 0
            assert item[key].max() <= 1
            assert item[key].std() > 0.02
        if task in ("mfif", "meif"):
            assert item["target"].shape == (3, *size)


@pytest.mark.parametrize("task", TASKS)
def test_an_item_depends_on_seed_and_index_alone(task):
    first = EmbeddedPairs(task, count=2, size=(48, 64), seed=3)
    np.random.seed(0)  # noqa: NPY002 - the global state must not matter
    longer = EmbeddedPairs(task, count=9, size=(48, 64), seed=3)
    again, other = longer[1], EmbeddedPairs(task, count=2, size=(48, 64), seed=4)[1]
    for key, value in first[1].items():
        assert value == again[key] if key == "name" else torch.equal(value, again[key])
    assert not torch.equal(first[1]["a"], other["a"])
    assert not torch.equal(first[0]["b"], first[1]["b"])


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_downloaded(task, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert EmbeddedPairs(task, count=1, size=(48, 48))[0]["a"].shape[1:] == (48, 48)


def test_options_fix_the_time_and_the_kind():
    times = [item["name"] for item in EmbeddedPairs("ivif", 3, (32, 32), time="glare")]
    assert all("glare" in name for name in times)
    names = " ".join(item["name"] for item in EmbeddedPairs("mif", 3, (32, 32)))
    assert all(kind in names for kind in ("ct", "pet", "spect"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "video"}, "video.*ivif"),
        ({"task": "ivif", "time": "dusk"}, "dusk.*night"),
        ({"task": "mif", "kind": "xray"}, "xray.*spect"),
        ({"task": "mfif", "time": "day"}, "time.*mfif"),
        ({"task": "meif", "size": (31, 64)}, r"31.*32"),
        ({"task": "meif", "seed": -1}, "-1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        EmbeddedPairs(**arguments)


def test_past_the_last_item():
    with pytest.raises(IndexError):
        EmbeddedPairs("mif", count=2)[2]
