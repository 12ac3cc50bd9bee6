"""Pairs generated from photographs: ground truth, repeatability, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import laplace, uniform_filter
from torch.utils.data import DataLoader

from fusionkit.color import luminance
from fusionkit.datasets import RandomCrops
from fusionkit.datasets.generated import GeneratedPairs
from fusionkit.datasets.photographs import EXPOSURE_PHOTOGRAPHS, FOLDER
from fusionkit.images import save_image

FILES = [FOLDER / name for name in EXPOSURE_PHOTOGRAPHS]
SIZE = (128, 160)


def detail(image: torch.Tensor) -> np.ndarray:
    return uniform_filter(np.abs(laplace(luminance(image)[0].numpy())), 9)


@pytest.mark.parametrize("task", ["mfif", "meif"])
def test_items(task):
    pairs = GeneratedPairs(task, FILES, count=7, size=SIZE)
    assert len(pairs) == 7
    assert len(GeneratedPairs(task, FILES)) == len(FILES)
    item = pairs[6]
    assert item.keys() == {"name", "a", "b", "target"}
    assert item["name"] == f"{task}_{FILES[1].stem}_0_0006"  # round and round
    for key in ("a", "b", "target"):
        assert item[key].shape == (3, *SIZE)
        assert item[key].dtype == torch.float32
        assert 0 <= item[key].min() <= item[key].max() <= 1
        steps = item[key] * 255
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert not torch.equal(item["target"], pairs[1]["target"])  # another window of that picture
    with pytest.raises(IndexError):
        pairs[7]


@pytest.mark.parametrize("task", ["mfif", "meif"])
def test_an_item_depends_on_seed_and_number_alone(task):
    options = {"size": (64, 64)}
    first = GeneratedPairs(task, FILES, count=9, seed=1, **options)
    first[0]
    same, other = (GeneratedPairs(task, FILES, seed=seed, **options) for seed in (1, 2))
    for key in ("a", "b", "target"):
        assert torch.equal(first[3][key], same[3][key])
        assert not torch.equal(first[3][key], other[3][key])


@pytest.mark.parametrize("index", range(5))
def test_each_focus_is_sharp_in_its_own_part(index):
    item = GeneratedPairs("mfif", FILES, size=SIZE)[index]
    near, far, sharp = (detail(item[key]) for key in ("a", "b", "target"))
    for source, other in ((near, far), (far, near)):
        blurred = (source < 0.7 * other) & (sharp > 0.01)
        assert blurred.mean() > 0.02
        assert (sharp[blurred] > source[blurred]).mean() > 0.97
    off = [(item[key] - item["target"]).abs().amax(dim=0) for key in ("a", "b")]
    in_focus = [x < 2.5 / 255 for x in off]
    for own in in_focus:
        assert 0.05 < own.float().mean() < 0.97
    assert (in_focus[0] | in_focus[1]).float().mean() > 0.6


def test_the_ground_is_nearer_at_the_bottom_as_a_rule():
    halves = []
    for seed in range(8):
        item = GeneratedPairs("mfif", FILES, size=(96, 96), seed=seed)[0]
        sharper = torch.from_numpy(detail(item["a"]) > detail(item["b"])).float()
        halves.append(sharper[48:].mean() - sharper[:48].mean())
    assert torch.stack(halves).mean() > 0.1


def test_exposures_bracket_the_target_and_the_long_one_clips():
    pairs, clipped = GeneratedPairs("meif", FILES, count=10, size=SIZE), []
    for item in pairs:
        under, target, over = (item[key].mean() for key in ("a", "target", "b"))
        assert under < target < over
        assert (item["a"] == 1).float().mean() < 0.02
        clipped.append((luminance(item["b"]) > 0.98).float().mean())
    assert min(clipped) > 0.02
    assert max(clipped) < 0.75
    assert 0.1 < torch.stack(clipped).mean() < 0.5


def test_a_folder_and_gray_pictures(tmp_path):
    gray = torch.rand(1, 70, 90, generator=torch.Generator().manual_seed(0))
    save_image(gray, tmp_path / "b.png")
    save_image(gray.flip(-1), tmp_path / "a.png")
    pairs = GeneratedPairs("meif", tmp_path, size=(48, 40))
    assert [path.name for path in pairs.pictures] == ["a.png", "b.png"]
    target = pairs[0]["target"]
    assert torch.equal(target[0], target[2])


def test_crops_of_generated_pairs_have_targets():
    crops = RandomCrops(GeneratedPairs("mfif", FILES[:2], size=(64, 64)), size=32, count=4)
    batch = next(iter(DataLoader(crops, batch_size=4)))
    assert {key: tuple(x.shape) for key, x in batch.items()} == dict.fromkeys(
        ("a", "b", "target"), (4, 1, 32, 32)
    )


def test_crops_in_colour_have_the_luminance_crops_place():
    pairs = GeneratedPairs("meif", FILES[:2], size=(64, 64))
    gray, color = (RandomCrops(pairs, size=32, count=5, color=c) for c in (False, True))
    for k in range(5):
        for key, plane in color[k].items():
            assert plane.shape == (3, 32, 32)
            assert torch.equal(luminance(plane), gray[k][key])
    flat = [{"a": torch.rand(1, 40, 40), "b": torch.rand(3, 40, 40)}]
    crop = RandomCrops(flat, size=32, count=1, color=True)[0]
    assert torch.equal(crop["a"][0], crop["a"][2])


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'ivif'; expected one of mfif, meif"):
        GeneratedPairs("ivif", FILES)
    with pytest.raises(ValueError, match="pictures is empty"):
        GeneratedPairs("mfif", [])
    with pytest.raises(ValueError, match=r"size \(16, 64\); expected .* at least 32×32"):
        GeneratedPairs("mfif", FILES, size=(16, 64))
    with pytest.raises(ValueError, match="count -1, seed 0"):
        GeneratedPairs("mfif", FILES, count=-1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        GeneratedPairs("mfif", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such picture"):
        GeneratedPairs("mfif", [tmp_path / "gone.png"])[0]
