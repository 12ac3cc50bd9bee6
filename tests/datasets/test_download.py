import hashlib
import io
import os
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fusionkit.datasets import catalogue
from fusionkit.datasets.catalogue import dataset_info, load_dataset
from fusionkit.datasets.download import download_split


def picture(seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (16, 20), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png")
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path):
    """A publisher on 127.0.0.1: two pairs, and the SHA-256 of each file."""
    site = tmp_path / "site"
    hashes = {}
    for seed, (remote, source, stem) in enumerate(
        [("Ir", "ir", "f1"), ("Ir", "ir", "f 2"), ("Vis", "vi", "f1"), ("Vis", "vi", "f 2")]
    ):
        path = site / remote / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed))
        hashes[f"test/{source}/{stem}.png"] = hashlib.sha256(picture(seed)).hexdigest()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    base = f"http://127.0.0.1:{http.server_address[1]}"
    yield site, {"ir": f"{base}/Ir", "vi": f"{base}/Vis/"}, hashes
    http.shutdown()
    http.server_close()
    thread.join()


def test_lands_in_the_layout(tmp_path, server):
    site, urls, hashes = server
    target = download_split(tmp_path / "roadscene", "test", urls, hashes)
    assert target == tmp_path / "roadscene" / "test"
    assert (target / "ir/f 2.png").read_bytes() == (site / "Ir/f 2.png").read_bytes()
    assert sorted(os.listdir(target.parent)) == ["test"]
    assert len(load_dataset("roadscene", tmp_path)) == 2
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in target.rglob("*.png"))


def test_wrong_hash_names_the_file_and_leaves_nothing(tmp_path, server):
    site, urls, hashes = server
    (site / "Vis/f1.png").write_bytes(picture(99))
    with pytest.raises(ValueError, match=r"test/vi/f1\.png from http.*does not match"):
        download_split(tmp_path / "roadscene", "test", urls, hashes)
    assert os.listdir(tmp_path / "roadscene") == []


def test_missing_remote_file_leaves_nothing(tmp_path, server):
    site, urls, hashes = server
    (site / "Vis/f1.png").unlink()
    with pytest.raises(OSError, match="404"):
        download_split(tmp_path / "roadscene", "test", urls, hashes)
    assert os.listdir(tmp_path / "roadscene") == []


def test_broken_transfer_leaves_nothing(tmp_path, server, monkeypatch):
    _, urls, hashes = server

    def half(handler, source, outputfile):
        outputfile.write(source.read(100))

    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", half)
    with pytest.raises((OSError, ValueError), match=r"Connection broken|does not match"):
        download_split(tmp_path / "roadscene", "test", urls, hashes)
    assert os.listdir(tmp_path / "roadscene") == []


def test_interruption_leaves_nothing(tmp_path, server, monkeypatch):
    _, urls, hashes = server
    calls = []

    def interrupted(path, mode):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        os.chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_split(tmp_path / "roadscene", "test", urls, hashes)
    assert len(calls) == 3
    assert os.listdir(tmp_path / "roadscene") == []


def test_does_not_touch_what_is_there(tmp_path, server):
    _, urls, hashes = server
    (tmp_path / "roadscene/test/ir").mkdir(parents=True)
    (tmp_path / "roadscene/test/ir/mine.png").write_bytes(picture())
    with pytest.raises(FileExistsError, match="already there"):
        download_split(tmp_path / "roadscene", "test", urls, hashes)
    assert os.listdir(tmp_path / "roadscene/test/ir") == ["mine.png"]


def test_unknown_hashes_are_refused(tmp_path, server):
    _, urls, hashes = server
    with pytest.raises(ValueError, match="no SHA-256 is known for split 'train'"):
        download_split(tmp_path / "roadscene", "train", urls, hashes)


def test_load_dataset_downloads_into_the_data_root(tmp_path, server, monkeypatch):
    _, urls, hashes = server
    local = replace(dataset_info("roadscene"), urls=(urls["ir"], urls["vi"]))
    monkeypatch.setitem(catalogue._CATALOGUE, "roadscene", local)
    monkeypatch.setattr(catalogue, "SPLITS", tmp_path)
    lines = [f"{name} {digest}\n" for name, digest in hashes.items()]
    (tmp_path / "roadscene_sha256.txt").write_text("".join(lines))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv("FUSIONKIT_DATA", raising=False)
    monkeypatch.setenv("FUSIONKIT_SHARED", str(tmp_path / "shared"))
    assert load_dataset("roadscene", download=True).names == ["f 2", "f1"]
    assert (tmp_path / "cwd/data/roadscene/test/vi/f1.png").is_file()
    assert not (tmp_path / "shared").exists()
    monkeypatch.setenv("FUSIONKIT_DATA", str(tmp_path / "own"))
    assert len(load_dataset("roadscene", tmp_path / "given", download=True)) == 2
    assert (tmp_path / "given/roadscene/test").is_dir()
    assert not (tmp_path / "own").exists()
