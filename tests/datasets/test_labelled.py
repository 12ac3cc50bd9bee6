"""Labelled data sets: the published layouts, what may be wrong with a file, crops, batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fusionkit.color import chroma
from fusionkit.datasets.catalogue import dataset_info, load_dataset
from fusionkit.datasets.embedded import EmbeddedPairs
from fusionkit.datasets.folders import PairFolder, RandomCrops
from fusionkit.datasets.labelled import LabelledCrops, LabelledFolder, collate_labelled
from fusionkit.datasets.labels import read_boxes, read_label_map

HEIGHT, WIDTH = 24, 32
CLASSES = ("car", "person")


def write(path, array=None, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if array is None:
        array = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    picture = Image.fromarray(array)
    (picture if mode is None else picture.convert(mode)).save(path)
    return array


def label_map(top=8):
    return (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % (top + 1)).astype(np.uint8)


def voc(objects, size=(HEIGHT, WIDTH), root="annotation"):
    marked = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin>"
        f"<xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
        for name, b in objects
    )
    claimed = f"<size><width>{size[1]}</width><height>{size[0]}</height></size>" if size else ""
    return f"<{root}>{claimed}{marked}</{root}>"


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def no_roots(monkeypatch):
    monkeypatch.delenv("FUSIONKIT_DATA", raising=False)
    monkeypatch.delenv("FUSIONKIT_SHARED", raising=False)


class TestLayouts:
    @pytest.mark.parametrize(
        ("name", "count"), [("msrs", 9), ("mfnet", 9), ("fmb", 15), ("m3fd", 6), ("llvip", 1)]
    )
    def test_classes(self, name, count):
        assert len(set(dataset_info(name).classes)) == count

    @pytest.mark.parametrize(
        ("name", "split", "a", "b", "labels"),
        [
            ("msrs", "train", "MSRS/train/ir", "MSRS/train/vi", "MSRS/train/Segmentation_labels"),
            ("fmb", "test", "FMB/test/Infrared", "FMB/test/Visible", "FMB/test/Label"),
            ("fmb", "test", "fmb/test/ir", "fmb/test/vi", "fmb/test/labels"),
        ],
    )
    def test_label_maps(self, tmp_path, name, split, a, b, labels):
        top = len(dataset_info(name).classes) - 1
        write(tmp_path / a / "00001D.png")
        write(tmp_path / b / "00001D.png")
        expected = write(tmp_path / labels / "00001D.png", label_map(top))
        item = load_dataset(name, tmp_path, split, labels=True)[0]
        assert item["name"] == "00001D"
        assert item["labels"].dtype == torch.int64
        np.testing.assert_array_equal(item["labels"].numpy(), expected)
        assert item["a"].shape[-2:] == item["labels"].shape
        assert "labels" not in load_dataset(name, tmp_path, split)[0]

    def test_mfnet_as_released(self, tmp_path):
        rng = np.random.default_rng(1)
        packed = rng.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
        for name in ("00001D", "00002N"):
            write(tmp_path / "MFNet/images" / f"{name}.png", packed)
            write(tmp_path / "MFNet/labels" / f"{name}.png", label_map())
        put(tmp_path / "MFNet/train.txt", "00001D\n00001D_flip\n")
        put(tmp_path / "MFNet/val.txt", "00002N\n")
        pairs = load_dataset("mfnet", tmp_path, "train", labels=True)
        assert pairs.names == ["00001D"]
        item = pairs[0]
        np.testing.assert_array_equal(item["a"][0].numpy() * 255, packed[..., 3])
        rgb = np.moveaxis(packed[..., :3], -1, 0)
        np.testing.assert_allclose(item["b"].numpy() * 255, rgb, atol=1e-4)
        assert item["labels"].shape == (HEIGHT, WIDTH)
        gray = load_dataset("mfnet", tmp_path, "val", luminance=True)
        assert gray.names == ["00002N"]
        assert gray[0]["b"].shape == (1, HEIGHT, WIDTH)
        with pytest.raises(FileNotFoundError, match=r"test\.txt: no such list"):
            load_dataset("mfnet", tmp_path, "test")
        write(tmp_path / "MFNet/images/00002N.png", packed[..., :3])
        with pytest.raises(ValueError, match=r"00002N\.png: mode RGB; expected four channels"):
            load_dataset("mfnet", tmp_path, "val")[0]

    @pytest.mark.parametrize(
        ("name", "a", "b", "labels", "object_name"),
        [
            ("m3fd", "M3FD_Detection/Ir", "M3FD_Detection/Vis", "M3FD_Detection/Annotation", "Bus"),
            ("llvip", "infrared/train", "visible/train", "Annotations", "person"),
        ],
    )
    def test_voc_boxes(self, tmp_path, name, a, b, labels, object_name):
        root = tmp_path / dataset_info(name).folders[0]
        for stem in ("1", "2"):
            write(root / a / f"{stem}.png")
            write(root / b / f"{stem}.png")
        put(root / labels / "1.xml", voc([(object_name, (2, 3, 10, 20))]))
        put(root / labels / "2.xml", voc([]))
        put(root / labels / "3.xml", "of another split")
        pairs = load_dataset(name, tmp_path, "train", labels=True)
        assert pairs[0]["boxes"].tolist() == [[2, 3, 10, 20]]
        number = dataset_info(name).classes.index(object_name)
        assert pairs[0]["classes"].tolist() == [number]
        assert pairs[1]["boxes"].shape == (0, 4)
        assert pairs[1]["classes"].dtype == torch.int64

    def test_yolo_text_in_our_layout(self, tmp_path):
        write(tmp_path / "m3fd/train/ir/7.png")
        write(tmp_path / "m3fd/train/vi/7.png")
        put(tmp_path / "m3fd/train/labels/7.txt", "0 0.5 0.25 0.25 0.5\n5 0.25 0.5 0.5 0.25\n\n")
        item = load_dataset("m3fd", tmp_path, "train", labels=True)[0]
        assert item["boxes"].tolist() == [[12, 0, 20, 12], [0, 9, 16, 15]]
        assert item["classes"].tolist() == [0, 5]

    def test_sets_and_splits_without_labels(self, tmp_path):
        with pytest.raises(ValueError, match="tno has no labels; those with labels: msrs, m3fd"):
            load_dataset("tno", tmp_path, labels=True)
        write(tmp_path / "M3FD/M3FD_Fusion/Ir/1.png")
        write(tmp_path / "M3FD/M3FD_Fusion/Vis/1.png")
        assert len(load_dataset("m3fd", tmp_path)) == 1
        with pytest.raises(FileNotFoundError, match=r"labels in .*m3fd/test/labels"):
            load_dataset("m3fd", tmp_path, labels=True)

    def test_missing_label_files_are_named(self, tmp_path):
        for stem in ("1", "2", "3"):
            write(tmp_path / "ir" / f"{stem}.png")
            write(tmp_path / "vi" / f"{stem}.png")
        write(tmp_path / "labels/2.png", label_map())
        pairs = PairFolder(tmp_path / "ir", tmp_path / "vi")
        with pytest.raises(FileNotFoundError, match=r"labels: no label file .*2 of 3 pairs: 1, 3"):
            LabelledFolder(pairs, tmp_path / "labels", "maps", CLASSES)
        with pytest.raises(FileNotFoundError, match="nowhere: no such folder of labels"):
            LabelledFolder(pairs, tmp_path / "nowhere", "maps", CLASSES)
        with pytest.raises(ValueError, match=r"unknown kind of labels 'map'.*'maps'"):
            LabelledFolder(pairs, tmp_path / "labels", "map", CLASSES)


class TestLabelMaps:
    def read(self, path):
        return read_label_map(path, CLASSES, (HEIGHT, WIDTH))["labels"]

    def test_palette_indices_are_the_numbers(self, tmp_path):
        picture = Image.fromarray(label_map(1)).convert("P")
        picture.putdata(label_map(1).ravel().tolist())
        picture.putpalette([9, 200, 30, 250, 4, 7])
        picture.save(tmp_path / "x.png")
        np.testing.assert_array_equal(self.read(tmp_path / "x.png").numpy(), label_map(1))

    def test_ignored_pixels_stay(self, tmp_path):
        write(tmp_path / "x.png", np.full((HEIGHT, WIDTH), 255, np.uint8))
        assert self.read(tmp_path / "x.png").unique().tolist() == [255]

    def test_refusals_name_the_file(self, tmp_path):
        path = tmp_path / "x.png"
        with pytest.raises(FileNotFoundError, match=r"x\.png: no such label map"):
            self.read(path)
        write(path, label_map(4))
        with pytest.raises(ValueError, match=r"x\.png: numbers 2, 3, 4; expected classes 0 to 1"):
            self.read(path)
        write(path, label_map(1)[:, :-2])
        with pytest.raises(ValueError, match=r"x\.png: label map is 24×30 but the pair is 24×32"):
            self.read(path)
        write(path, label_map(1), "RGB")
        with pytest.raises(
            ValueError, match=r"x\.png: a picture of mode RGB; expected one channel"
        ):
            self.read(path)
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(ValueError, match=r"x\.png: not a readable label map"):
            self.read(path)


class TestBoxFiles:
    def read(self, path):
        return read_boxes(path, CLASSES, (HEIGHT, WIDTH))

    def test_names_in_any_case_and_clipping_at_the_edge(self, tmp_path):
        path = put(
            tmp_path / "x.xml", voc([(" Person ", (-1, 0, 33.5, 24)), ("car", (1, 2, 3, 4))])
        )
        found = self.read(path)
        assert found["boxes"].tolist() == [[0, 0, 32, 24], [1, 2, 3, 4]]
        assert found["classes"].tolist() == [1, 0]

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("<annotation><object>", "malformed"),
            ("", "malformed"),
            (voc([("dog", (1, 2, 3, 4))]), "object 'dog'; expected one of car, person"),
            (voc([("car", (1, 2, "x", 4))]), "bndbox/xmax of a object is 'x'; expected a number"),
            (voc([("car", (1, 2, "nan", 4))]), "is 'nan'; expected a number"),
            ("<a><object><name>car</name></object></a>", "bndbox/xmin of a object is None"),
            (voc([("car", (1, 2, 40, 4))]), r"box \(1, 2, 40, 4\).*leaves the 24×32 picture"),
            (voc([("car", (40, 2, 45, 4))]), "leaves the 24×32 picture"),
            (voc([("car", (5, 2, 5, 4))]), r"box \(5, 2, 5, 4\).*has no area"),
            (voc([("car", (9, 2, 5, 4))]), "has no area"),
            (voc([("car", (32, 2, 34, 4))]), "has no area"),
            (voc([], size=(48, 64)), "boxes for a picture of 48×64, but the pair is 24×32"),
        ],
    )
    def test_voc_refusals_name_the_file(self, tmp_path, text, complaint):
        path = put(tmp_path / "x.xml", text)
        with pytest.raises(ValueError, match=rf"x\.xml: (?s:.*){complaint}"):
            self.read(path)

    def test_voc_without_a_size(self, tmp_path):
        assert len(self.read(put(tmp_path / "x.xml", voc([], size=None)))["boxes"]) == 0
        # As some tools write it when they do not know.
        assert len(self.read(put(tmp_path / "x.xml", voc([], size=(0, 0))))["boxes"]) == 0

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("0 0.5 0.5 0.2", "line 1: '0 0.5 0.5 0.2'; expected class, centre"),
            ("0 0.5 0.5 0.2 0.2\ncar 0.5 0.5 0.1 0.1", "line 2: 'car"),
            ("0 16 12 8 8", "as shares of the picture"),
            ("0 0.5 nan 0.2 0.2", "line 1"),
            ("2 0.5 0.5 0.2 0.2", r"line 1: class 2; expected 0 to 1 \(car, person\)"),
            ("0.5 0.5 0.5 0.2 0.2", "class 0.5"),
            ("0 0.9 0.5 0.6 0.2", "leaves the 24×32 picture"),
            ("0 0.5 0.5 0 0.2", "has no area"),
        ],
    )
    def test_yolo_refusals_name_the_file(self, tmp_path, text, complaint):
        path = put(tmp_path / "x.txt", text)
        with pytest.raises(ValueError, match=rf"x\.txt.*{complaint}"):
            self.read(path)

    def test_no_text_and_no_file(self, tmp_path):
        (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00binary")
        with pytest.raises(ValueError, match=r"x\.txt: malformed"):
            self.read(tmp_path / "x.txt")
        with pytest.raises(FileNotFoundError, match=r"y\.txt: no such file of boxes"):
            self.read(tmp_path / "y.txt")
        assert len(self.read(put(tmp_path / "z.txt", ""))["classes"]) == 0


class Marked(Dataset):
    """One pair whose label map is 1 inside the first box, 2 inside the second, and so is a."""

    def __init__(self, boxes, size=(60, 80)):
        self.boxes, self.size = boxes, size

    def __len__(self):
        return 1

    def __getitem__(self, i):
        labels = torch.zeros(self.size, dtype=torch.int64)
        for number, (left, top, right, bottom) in enumerate(self.boxes, 1):
            labels[top:bottom, left:right] = number
        picture = labels[None] / 10
        return {
            "a": picture,
            "b": picture.expand(3, -1, -1) * torch.tensor([1, 0.5, 0.2])[:, None, None],
            "labels": labels,
            "boxes": torch.tensor(self.boxes, dtype=torch.float32).reshape(-1, 4),
            "classes": torch.arange(len(self.boxes)),
            "name": "marked",
        }


def extent(mask):
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    return [float(side) for side in (left, top, right, bottom)]


class TestLabelledCrops:
    BOXES = ((3, 5, 20, 18), (30, 22, 75, 50))

    def test_labels_and_boxes_follow_the_picture(self):
        crops = LabelledCrops(Marked(self.BOXES), size=48, count=60, min_visible=0.0)
        seen = set()
        for crop in crops:
            torch.testing.assert_close(crop["labels"] / 10, crop["a"][0])
            expected = {
                n - 1: extent(crop["labels"] == n) for n in (1, 2) if (crop["labels"] == n).any()
            }
            found = dict(zip(crop["classes"].tolist(), crop["boxes"].tolist(), strict=True))
            assert found == expected
            seen.add(len(found))
        assert seen == {1, 2}

    def test_cut_where_random_crops_cuts(self):
        pairs = EmbeddedPairs("ivif", 3, (80, 96))
        dataset = [pairs[i] for i in range(3)]
        plain = RandomCrops(dataset, 48, 9, seed=5)
        crops = LabelledCrops(dataset, 48, 9, seed=5)
        for k in range(9):
            assert torch.equal(crops[k]["a"], plain[k]["a"])
            assert torch.equal(crops[k]["b"], plain[k]["b"])
            assert crops[k]["name"] == dataset[crops.pair_index(k)]["name"]
        other = LabelledCrops(dataset, 48, 9, seed=6)
        assert not all(torch.equal(other[k]["labels"], crops[k]["labels"]) for k in range(9))

    def test_hardly_visible_boxes_are_dropped(self):
        box = (0, 0, 40, 60)
        shares = []
        for crop in LabelledCrops(Marked([box]), 32, 40, min_visible=0.3, augment=False):
            inside = (crop["labels"] == 1).sum().item() / (40 * 60)
            assert len(crop["boxes"]) == len(crop["classes"]) == (inside >= 0.3)
            shares.append(inside)
        assert min(shares) < 0.3 < max(shares)

    def test_without_augmentation_nothing_turns(self):
        dataset = Marked(self.BOXES)
        crop = LabelledCrops(dataset, 60, 1, augment=False)[0]
        left = 30 - int(crop["boxes"][-1][0])
        item = dataset[0]
        assert torch.equal(crop["labels"], item["labels"][:, left : left + 60])

    def test_colour_and_missing_parts(self):
        dataset = Marked(self.BOXES, (40, 40))
        crop = LabelledCrops(dataset, 40, 1, augment=False, color=True)[0]
        torch.testing.assert_close(crop["cbcr"], chroma(dataset[0]["b"]))
        assert crop["b"].shape == (1, 40, 40)
        assert "target" not in crop
        without = LabelledCrops(EmbeddedPairs("meif", 1, (40, 40)), 32)[0]
        assert without.keys() == {"a", "b", "target", "name"}

    def test_refusals(self):
        with pytest.raises(ValueError, match="marked: 60×80; expected at least the crop, 64×64"):
            LabelledCrops(Marked([]), 64)[0]
        with pytest.raises(ValueError, match=r"min_visible 1\.5; expected a share"):
            LabelledCrops(Marked([]), 32, min_visible=1.5)
        with pytest.raises(IndexError, match="crop 3 of 3"):
            LabelledCrops(Marked([]), 32, 3)[3]
        dataset = [{**Marked([])[0], "labels": torch.zeros(60, 79, dtype=torch.int64)}]
        with pytest.raises(ValueError, match=r"marked: sizes differ.*60×79"):
            LabelledCrops(dataset, 32)[0]


class TestCollate:
    def test_a_loader_of_crops(self):
        crops = LabelledCrops(EmbeddedPairs("ivif", 2, (64, 96)), 64, 4)
        batch = next(iter(DataLoader(crops, batch_size=4, collate_fn=collate_labelled)))
        assert batch["a"].shape == (4, 1, 64, 64)
        assert batch["labels"].shape == (4, 64, 64)
        assert [len(boxes) for boxes in batch["boxes"]] == [len(c["boxes"]) for c in crops]
        assert batch["name"] == [crop["name"] for crop in crops]

    def test_refusals(self):
        items = [Marked([])[0], Marked([], (50, 80))[0]]
        with pytest.raises(ValueError, match=r"'a' of shapes .*50, 80.*60, 80.*LabelledCrops"):
            collate_labelled(items)
        del items[1]["labels"]
        with pytest.raises(ValueError, match="different entries"):
            collate_labelled(items)
