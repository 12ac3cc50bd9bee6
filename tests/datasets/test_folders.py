import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from fusionkit.datasets.folders import PairFolder, RandomCrops


def write(path, height=40, width=50, channels=1, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if channels == 1 else (height, width, channels)
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(array).save(path)
    return array


@pytest.fixture
def folders(tmp_path):
    for i, name in enumerate(["p1", "p2", "p3"]):
        write(tmp_path / "ir" / f"{name}.png", seed=i)
        write(tmp_path / "vi" / f"{name}.bmp", channels=3, seed=10 + i)
    return tmp_path / "ir", tmp_path / "vi"


class Constant(Dataset):
    """Pairs whose every pixel tells which pair it is; sizes (height, width) in `sizes`."""

    def __init__(self, sizes, target=False, base=0):
        self.sizes, self.target, self.base = sizes, target, base

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        keys = ["a", "b", "target"] if self.target else ["a", "b"]
        value = (self.base + i) / 100
        return {key: torch.full((1, *self.sizes[i]), value) for key in keys} | {"name": f"c{i}"}


class Ramp(Dataset):
    """One pair (1, height, width) of distinct values, a = b."""

    def __init__(self, height, width):
        self.image = torch.arange(height * width, dtype=torch.float32).view(1, height, width)
        self.image /= height * width

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return {"a": self.image, "b": self.image}


class TestPairFolder:
    def test_items_in_order_of_stems(self, folders):
        pairs = PairFolder(*folders)
        assert pairs.names == ["p1", "p2", "p3"]
        assert len(pairs) == 3
        item = pairs[1]
        assert item["name"] == "p2"
        assert item["a"].shape == (1, 40, 50)
        assert item["b"].shape == (3, 40, 50)
        assert pairs.paths[1] == (folders[0] / "p2.png", folders[1] / "p2.bmp")

    def test_luminance_is_rec_601_and_not_rounded(self, folders):
        rgb = np.asarray(Image.open(folders[1] / "p1.bmp")).astype(np.float64) / 255
        expected = rgb @ np.array([0.299, 0.587, 0.114])
        item = PairFolder(*folders, luminance=True)[0]
        assert item["a"].shape == item["b"].shape == (1, 40, 50)
        np.testing.assert_allclose(item["b"][0].numpy(), expected, atol=1e-6)
        assert not np.allclose(item["b"][0].numpy() * 255, np.round(expected * 255), atol=1e-3)

    def test_names_every_file_without_partner(self, folders):
        write(folders[0] / "only_ir.png")
        write(folders[1] / "only_vi_1.png")
        write(folders[1] / "only_vi_2.png")
        with pytest.raises(ValueError, match=r"1 in .*ir without") as error:
            PairFolder(*folders)
        for part in ("only_ir.png", "2 in", "only_vi_1.png, only_vi_2.png"):
            assert part in str(error.value)

    def test_names_ten_and_counts_the_rest(self, folders):
        for i in range(13):
            write(folders[0] / f"x{i:02d}.png")
        with pytest.raises(ValueError, match=r"x09\.png and 3 more") as error:
            PairFolder(*folders)
        assert "x10" not in str(error.value)

    def test_names_restrict_and_keep_their_order(self, folders):
        write(folders[0] / "only_ir.png")
        assert PairFolder(*folders, names=["p3", "p1"]).names == ["p3", "p1"]

    @pytest.mark.parametrize(
        ("names", "message"),
        [(["p1", "p7"], "p7"), ([], "empty"), (["p1", "p1"], "p1 more than once")],
    )
    def test_bad_names(self, folders, names, message):
        with pytest.raises(ValueError, match=message):
            PairFolder(*folders, names=names)

    def test_sizes_that_differ_name_both_files(self, folders):
        write(folders[1] / "p2.bmp", height=41, width=50, channels=3)
        with pytest.raises(ValueError, match=r"p2\.png is 40×50 but .*p2\.bmp is 41×50"):
            PairFolder(*folders)[1]

    def test_missing_and_empty_folders(self, folders, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            PairFolder(folders[0], tmp_path / "nowhere")
        (tmp_path / "void").mkdir()
        with pytest.raises(ValueError, match=r"void: holds no picture"):
            PairFolder(folders[0], tmp_path / "void")

    def test_endings_tell_the_sources_apart_in_one_folder(self, tmp_path):
        near, far = write(tmp_path / "s-01-A.png", seed=1), write(tmp_path / "s-01-B.png", seed=2)
        pairs = PairFolder(tmp_path, tmp_path, endings=("-A", "-B"))
        assert pairs.names == ["s-01"]
        np.testing.assert_array_equal((pairs[0]["a"][0] * 255).round().numpy(), near)
        np.testing.assert_array_equal((pairs[0]["b"][0] * 255).round().numpy(), far)
        with pytest.raises(ValueError, match="ends in '-C'"):
            PairFolder(tmp_path, tmp_path, endings=("-A", "-C"))


class TestRandomCrops:
    def test_shapes(self, folders):
        crop = RandomCrops(PairFolder(*folders), size=16, count=5)[4]
        assert crop.keys() == {"a", "b"}
        assert all(plane.shape == (1, 16, 16) for plane in crop.values())
        assert all(plane.dtype == torch.float32 for plane in crop.values())

    def test_item_is_a_function_of_seed_and_index(self, folders):
        crops = RandomCrops(PairFolder(*folders), size=16, count=20, seed=3)
        forward = [crops[k] for k in range(20)]
        # Another object, read backwards and without a cache, as a resumed run might.
        again = RandomCrops(PairFolder(*folders), size=16, count=30, seed=3, cache_gb=0)
        for k in reversed(range(20)):
            for key in ("a", "b"):
                assert torch.equal(forward[k][key], again[k][key])
        other = RandomCrops(PairFolder(*folders), size=16, count=20, seed=4)
        assert any(not torch.equal(forward[k]["a"], other[k]["a"]) for k in range(20))

    def test_workers_see_the_same_crops(self, folders):
        crops = RandomCrops(PairFolder(*folders), size=16, count=8)
        alone = torch.cat([batch["a"] for batch in DataLoader(crops, batch_size=2)])
        shared = torch.cat([batch["a"] for batch in DataLoader(crops, batch_size=2, num_workers=2)])
        assert torch.equal(alone, shared)

    def test_each_pair_once_a_pass_in_a_new_order(self):
        crops = RandomCrops(Constant([(20, 20)] * 12), size=8, count=36)
        seen = [round(100 * crops[k]["a"].mean().item()) for k in range(36)]
        passes = [seen[:12], seen[12:24], seen[24:]]
        assert all(sorted(one) == list(range(12)) for one in passes)
        assert len({tuple(one) for one in passes}) == 3
        assert seen == [crops.pair_index(k) for k in range(36)]

    def test_default_count_is_one_pass_and_iteration_ends(self):
        assert len(list(RandomCrops(Constant([(20, 20)] * 4), size=8))) == 4

    def test_crops_cover_the_picture_and_stay_in_it(self):
        image = Ramp(10, 12)
        crops = RandomCrops(image, size=8, count=200, augment=False)
        corners = set()
        for k in range(200):
            crop = crops[k]["a"][0]
            at = round(crop[0, 0].item() * 120)
            top, left = divmod(at, 12)
            assert torch.equal(crop, image.image[0, top : top + 8, left : left + 8])
            corners.add((top, left))
        assert corners == {(top, left) for top in range(3) for left in range(5)}

    def test_augmentation_takes_all_eight_ways_alike_for_a_and_b(self):
        image = Ramp(8, 8).image[0]
        ways = {}
        for flip in (image, image.flip(-1)):
            for turn in range(4):
                ways[tuple(flip.rot90(turn).flatten().tolist())] = 0
        crops = RandomCrops(Ramp(8, 8), size=8, count=400)
        for k in range(400):
            crop = crops[k]
            assert torch.equal(crop["a"], crop["b"])
            ways[tuple(crop["a"].flatten().tolist())] += 1
        assert len(ways) == 8
        assert min(ways.values()) > 25

    @pytest.mark.parametrize("size", [150, 256, 400])
    def test_small_pictures_are_enlarged_by_reflection(self, size):
        image = Ramp(134, 178)
        crop = RandomCrops(image, size=size, count=1, augment=False)[0]["a"][0]
        assert crop.shape == (size, size)
        margins = [(max(0, size - side), side) for side in (134, 178)]
        expected = np.pad(
            image.image[0].numpy(), [(m // 2, m - m // 2) for m, _ in margins], mode="reflect"
        )
        columns = [
            left
            for left in range(expected.shape[1] - size + 1)
            if np.array_equal(crop.numpy(), expected[:, left : left + size])
        ]
        assert len(columns) == 1

    def test_crops_do_not_share_memory_with_the_cache(self):
        crops = RandomCrops(Constant([(8, 8)], base=5), size=8, count=2, augment=False)
        crops[0]["a"].zero_()
        assert crops[1]["a"].mean().item() == pytest.approx(0.05)

    def test_decodes_each_pair_once_while_the_cache_lasts(self):
        class Counting(Constant):
            reads = 0

            def __getitem__(self, i):
                self.reads += 1
                return super().__getitem__(i)

        pairs = Counting([(16, 16)] * 3)
        crops = RandomCrops(pairs, size=8, count=30)
        pairs.reads = 0
        _ = [crops[k] for k in range(30)]
        assert pairs.reads == 3
        crops = RandomCrops(pairs, size=8, count=30, cache_gb=0)
        pairs.reads = 0
        _ = [crops[k] for k in range(30)]
        assert pairs.reads == 30

    def test_target_is_kept_only_if_every_source_has_one(self):
        with_target, without = Constant([(9, 9)] * 2, target=True), Constant([(9, 9)] * 2)
        crops = RandomCrops(with_target, size=8)
        assert crops[0].keys() == {"a", "b", "target"}
        mixed = RandomCrops(ConcatDataset([with_target, without]), size=8)
        batch = next(iter(DataLoader(mixed, batch_size=4)))
        assert batch.keys() == {"a", "b"}
        assert batch["a"].shape == (4, 1, 8, 8)

    def test_sizes_that_differ_in_an_item(self):
        pairs = [{"a": torch.zeros(1, 9, 9), "b": torch.zeros(1, 9, 8), "name": "odd"}]
        with pytest.raises(ValueError, match="odd: sizes differ"):
            RandomCrops(pairs, size=8)[0]

    @pytest.mark.parametrize("wrong", [{"size": 0}, {"count": 0}, {"seed": -1}])
    def test_bad_arguments(self, wrong):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            RandomCrops(Constant([(9, 9)]), **wrong)

    def test_empty_data_set(self):
        with pytest.raises(ValueError, match="empty"):
            RandomCrops(Constant([]))
