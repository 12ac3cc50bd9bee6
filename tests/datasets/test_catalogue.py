import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusionkit.datasets import catalogue
from fusionkit.datasets.catalogue import (
    catalogue_table,
    dataset_info,
    list_datasets,
    load_dataset,
    split_names,
)
from fusionkit.datasets.download import read_hashes

ROOT = Path(__file__).resolve().parents[2]
SHARED = os.environ.get("FUSIONKIT_SHARED")


def picture(seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (16, 20), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png")
    return buffer.getvalue()


def write(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture())


@pytest.fixture(autouse=True)
def no_roots(monkeypatch, tmp_path):
    """Only what a test sets up can be found."""
    monkeypatch.delenv("FUSIONKIT_DATA", raising=False)
    monkeypatch.delenv("FUSIONKIT_SHARED", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def splits(monkeypatch, tmp_path):
    """A folder of our own in place of data/splits."""
    folder = tmp_path / "splits"
    folder.mkdir()
    monkeypatch.setattr(catalogue, "SPLITS", folder)
    return folder


class TestNames:
    def test_list(self):
        assert len(list_datasets()) == 16
        assert "harvard_mri_spect" in list_datasets("mif")
        assert list_datasets("meif") == ["sice", "mefb"]

    def test_unknown_task(self):
        with pytest.raises(ValueError, match=r"'fusion'.*ivif, mfif, meif, mif"):
            list_datasets("fusion")

    @pytest.mark.parametrize(("typed", "meant"), [("road_scene", "roadscene"), ("MSRS", "msrs")])
    def test_unknown_name_suggests(self, typed, meant):
        with pytest.raises(
            ValueError, match=f"did you mean '{meant}'.*expected one of roadscene, tno"
        ):
            dataset_info(typed)

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="tno has no split 'train'; known: test"):
            load_dataset("tno", split="train")


class TestLayouts:
    @pytest.mark.parametrize("name", list_datasets())
    def test_fusionkit_layout(self, tmp_path, name):
        info = dataset_info(name)
        for split in info.splits:
            for source in info.sources:
                write(tmp_path / name / split / source / "x.png")
            assert load_dataset(name, tmp_path, split).names == ["x"]
            assert load_dataset(name, tmp_path / name, split).names == ["x"]

    @pytest.mark.parametrize(
        ("name", "split", "a", "b", "expected"),
        [
            ("msrs", "train", "MSRS/train/ir/1D.png", "MSRS/train/vi/1D.png", "1D"),
            ("llvip", "test", "LLVIP/infrared/test/1.png", "LLVIP/visible/test/1.png", "1"),
            ("fmb", "test", "FMB/test/Infrared/1.png", "FMB/test/Visible/1.png", "1"),
            (
                "m3fd",
                "train",
                "M3FD/M3FD_Detection/Ir/1.png",
                "M3FD/M3FD_Detection/Vis/1.png",
                "1",
            ),
            ("m3fd", "test", "M3FD/M3FD_Fusion/Ir/1.png", "M3FD/M3FD_Fusion/Vis/1.png", "1"),
            ("mfi_whu", "all", "MFI-WHU/source_1/1.png", "MFI-WHU/source_2/1.png", "1"),
            ("realmff", "all", "Real-MFF/imageA/001_A.png", "Real-MFF/imageB/001_B.png", "001"),
            ("lytro", "test", "Lytro/lytro-01-A.png", "Lytro/lytro-01-B.png", "lytro-01"),
        ],
    )
    def test_published_layout(self, tmp_path, name, split, a, b, expected):
        write(tmp_path / a, tmp_path / b)
        pairs = load_dataset(name, tmp_path, split, luminance=True)
        assert pairs.names == [expected]
        assert pairs.paths == [(tmp_path / a, tmp_path / b)]
        own_folder = tmp_path / Path(a).parts[0]
        assert load_dataset(name, own_folder, split).names == [expected]

    def test_m3fd_splits_do_not_stand_in_for_each_other(self, tmp_path):
        write(tmp_path / "M3FD_Fusion/Ir/1.png", tmp_path / "M3FD_Fusion/Vis/1.png")
        assert len(load_dataset("m3fd", tmp_path, "test")) == 1
        with pytest.raises(FileNotFoundError, match="M3FD_Detection/Ir"):
            load_dataset("m3fd", tmp_path, "train")

    def test_list_picks_the_split_from_one_folder(self, tmp_path, splits):
        for name in ("f1", "f2", "f3"):
            write(tmp_path / "RoadScene/cropinfrared" / f"{name}.png")
            write(tmp_path / "RoadScene/crop_LR_visible" / f"{name}.png")
        (splits / "roadscene_train.txt").write_text("f1\nf3\n")
        (splits / "roadscene_test.txt").write_text("f2\n")
        assert load_dataset("roadscene", tmp_path, "train").names == ["f1", "f3"]
        assert load_dataset("roadscene", tmp_path).names == ["f2"]
        assert load_dataset("roadscene", tmp_path, "train", names=["f3"]).names == ["f3"]
        with pytest.raises(ValueError, match=r"not in roadscene's split 'train': f2"):
            load_dataset("roadscene", tmp_path, "train", names=["f1", "f2"])

    def test_listed_pairs_that_are_missing_are_named(self, tmp_path, splits):
        write(tmp_path / "RoadScene/cropinfrared/f1.png")
        write(tmp_path / "RoadScene/crop_LR_visible/f1.png")
        (splits / "roadscene_test.txt").write_text("f1\nf2\n")
        with pytest.raises(ValueError, match="lacks 1 of them: f2"):
            load_dataset("roadscene", tmp_path)

    def test_without_the_lists_one_folder_cannot_be_split(self, tmp_path, splits):
        write(tmp_path / "RoadScene/cropinfrared/f1.png")
        write(tmp_path / "RoadScene/crop_LR_visible/f1.png")
        with pytest.raises(FileNotFoundError, match=r"roadscene_test\.txt: .*splits that are fold"):
            load_dataset("roadscene", tmp_path)


class TestRoots:
    def test_order(self, monkeypatch, tmp_path):
        def put(root, stem):
            write(root / "tno/test/ir" / f"{stem}.png", root / "tno/test/vi" / f"{stem}.png")

        put(tmp_path / "cwd/data", "here")
        assert load_dataset("tno").names == ["here"]
        put(tmp_path / "shared/data", "shared")
        monkeypatch.setenv("FUSIONKIT_SHARED", str(tmp_path / "shared"))
        assert load_dataset("tno").names == ["shared"]
        monkeypatch.setenv("FUSIONKIT_DATA", str(tmp_path / "own"))
        assert load_dataset("tno").names == ["shared"]
        put(tmp_path / "own", "own")
        assert load_dataset("tno").names == ["own"]
        put(tmp_path / "given", "given")
        assert load_dataset("tno", tmp_path / "given").names == ["given"]

    def test_explicit_root_is_the_only_one(self, tmp_path):
        write(tmp_path / "cwd/data/tno/test/ir/1.png", tmp_path / "cwd/data/tno/test/vi/1.png")
        with pytest.raises(FileNotFoundError):
            load_dataset("tno", tmp_path / "elsewhere")

    def test_nothing_there_says_where_it_looked_and_where_to_get_it(self, tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            load_dataset("fmb", tmp_path)
        for part in (
            str(tmp_path / "fmb/test/ir"),
            str(tmp_path / "FMB/test/Infrared"),
            "https://github.com/JinyuanLiu-CV/SegMiF",
            "not stated",
            "by hand",
        ):
            assert part in str(error.value)
        with pytest.raises(FileNotFoundError, match="download=True"):
            load_dataset("roadscene", tmp_path)


class TestNoDownload:
    def test_no_plain_files(self, tmp_path):
        with pytest.raises(ValueError, match=r"LLVIP has no plain files.*bupt-ai-cz"):
            load_dataset("llvip", tmp_path, download=True)

    def test_no_hashes_no_download(self, tmp_path, splits):
        with pytest.raises(FileNotFoundError, match="nothing is downloaded unchecked"):
            load_dataset("roadscene", tmp_path, download=True)


class TestRepository:
    def test_readme_holds_the_table(self):
        assert catalogue_table() in (ROOT / "data/README.md").read_text(encoding="utf-8")

    def test_roadscene_lists_and_hashes_agree(self):
        train, test = split_names("roadscene", "train"), split_names("roadscene", "test")
        assert (len(train), len(test)) == (171, 50)
        assert not set(train) & set(test)
        hashes = read_hashes(ROOT / "data/splits/roadscene_sha256.txt")
        assert set(hashes) == {
            f"{split}/{source}/{stem}.jpg"
            for split, stems in (("train", train), ("test", test))
            for source in ("ir", "vi")
            for stem in stems
        }
        assert all(len(digest) == 64 for digest in hashes.values())

    def test_every_list_belongs_to_a_split(self):
        for path in (ROOT / "data/splits").glob("*.txt"):
            name, _, split = path.stem.rpartition("_")
            if split != "sha256":
                assert split in dataset_info(name).splits
                assert len(set(split_names(name, split))) == len(split_names(name, split)) > 0


@pytest.mark.skipif(not SHARED, reason="FUSIONKIT_SHARED is not set: no real pictures to read")
class TestRealData:
    LISTS = sorted(path.stem for path in (ROOT / "data/splits").glob("*_t*.txt"))

    @pytest.mark.parametrize("stem", LISTS)
    def test_lists_are_the_folders(self, stem):
        name, _, split = stem.rpartition("_")
        pairs = load_dataset(name, Path(SHARED) / "data", split)
        assert sorted(pairs.names) == sorted(split_names(name, split))
        first = pairs[0]
        assert first["a"].shape[-2:] == first["b"].shape[-2:]

    def test_hashes_are_of_the_files(self):
        hashes = read_hashes(ROOT / "data/splits/roadscene_sha256.txt")
        for name in list(hashes)[::40]:
            content = (Path(SHARED) / "data/roadscene" / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == hashes[name]
