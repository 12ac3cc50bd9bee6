"""Pictures in, picture out: every kind of input, colour, tiles, folders and refusals."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fusionkit.color import chroma, fuse_chroma, luminance
from fusionkit.fuse import fuse, fuse_folders, stretch_to_range
from fusionkit.images import save_image, to_tensor
from fusionkit.models.refusion import ReFusion
from fusionkit.models.registry import create_model
from fusionkit.models.weight_files import save_weights

SIZES = [(8, 8), (9, 13), (131, 157)]


class Weighted(nn.Module):
    """share·a + (1 - share)·b, and a record of the sizes it saw."""

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(share))
        self.seen = []

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape == b.shape
        assert a.shape[:2] == (1, 1)
        self.seen.append(tuple(a.shape[-2:]))
        return self.share * a + (1 - self.share) * b


@pytest.fixture
def network() -> ReFusion:
    torch.manual_seed(0)
    return ReFusion(dim=4, heads=2, blocks=1)


def levels(*shape: int, seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint8)


def write(path, array: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def given(kind: str, tmp_path, size: tuple[int, int], seed: int):
    gray, rgb = levels(*size, seed=seed), levels(*size, 3, seed=seed)
    return {
        "path": lambda: write(tmp_path / f"{seed}.png", gray),
        "string": lambda: str(write(tmp_path / f"{seed}.png", rgb)),
        "16-bit PNG": lambda: write(tmp_path / f"{seed}.png", gray.astype(np.uint16) * 257),
        "RGBA PNG": lambda: write(tmp_path / f"{seed}.png", levels(*size, 4, seed=seed)),
        "PIL": lambda: Image.fromarray(rgb),
        "uint8": lambda: gray,
        "uint16": lambda: gray.astype(np.uint16) * 257,
        "float": lambda: rgb / 255,
        "tensor": lambda: torch.from_numpy(gray / 255).float()[None],
        "batch of one": lambda: torch.from_numpy(rgb).permute(2, 0, 1)[None],
    }[kind]()


KINDS = {
    "path": 1, "string": 3, "16-bit PNG": 1, "RGBA PNG": 3, "PIL": 3, "uint8": 1, "uint16": 1,
    "float": 3, "tensor": 1, "batch of one": 3,
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture(tmp_path, network, kind, size):
    a, b = (given(kind, tmp_path, size, seed) for seed in (1, 2))
    fused = fuse(a, b, model=network)
    assert fused.shape == (KINDS[kind], *size)
    assert fused.dtype == torch.float32
    assert 0 <= fused.min() <= fused.max() <= 1
    assert not fused.requires_grad


def test_the_same_picture_in_every_form_gives_the_same_result(tmp_path, network):
    results = []
    for kind in ("path", "16-bit PNG", "uint8", "uint16", "tensor"):
        a, b = (given(kind, tmp_path, (9, 13), seed) for seed in (1, 2))
        results.append(fuse(a, b, model=network))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)


def test_kinds_mix(tmp_path, network):
    a = given("path", tmp_path, (9, 13), 1)
    assert fuse(a, given("float", tmp_path, (9, 13), 2), model=network).shape == (3, 9, 13)


def test_the_network_is_fed_luminance():
    a, b = levels(9, 13, seed=1), levels(9, 13, 3, seed=2)
    y = luminance(to_tensor(b))
    torch.testing.assert_close(fuse(a, b, model=Weighted(1.0), color="gray"), to_tensor(a))
    torch.testing.assert_close(fuse(a, b, model=Weighted(0.0), color="gray"), y)


# Colour


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gray_and_rgb_keep_the_rgb(size):
    gray, rgb = levels(*size, seed=1), levels(*size, 3, seed=2)
    torch.testing.assert_close(
        fuse(gray, rgb, model=Weighted(0.0)), to_tensor(rgb), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        fuse(rgb, gray, "mif", model=Weighted(1.0)), to_tensor(rgb), rtol=0, atol=1e-5
    )


def test_gray_and_rgb_keep_the_chroma_under_another_luminance():
    # Near neutral, so that nothing is clipped.
    gray, rgb = levels(9, 13, seed=1, low=90, high=160), levels(9, 13, 3, low=110, high=140)
    fused = fuse(gray, rgb, model=Weighted(0.5))
    a, b = to_tensor(gray), to_tensor(rgb)
    torch.testing.assert_close(chroma(fused), chroma(b), rtol=0, atol=1e-5)
    torch.testing.assert_close(luminance(fused), (a + luminance(b)) / 2, rtol=0, atol=1e-5)


def test_two_colours_mix_by_their_strength():
    a, b = (levels(9, 13, 3, seed=s, low=100, high=150) for s in (1, 2))
    fused = fuse(a, b, "meif", model=Weighted(0.5))
    a, b = to_tensor(a), to_tensor(b)
    expected = fuse_chroma(chroma(a), chroma(b))
    torch.testing.assert_close(chroma(fused), expected, rtol=0, atol=1e-5)


def test_gray_pairs_stay_gray_and_colour_can_be_left_out():
    gray, rgb = levels(9, 13), levels(9, 13, 3)
    assert fuse(gray, gray, model=Weighted()).shape == (1, 9, 13)
    assert fuse(gray, rgb, model=Weighted(), color="gray").shape == (1, 9, 13)
    assert fuse(rgb, rgb, model=Weighted(), color="gray").shape == (1, 9, 13)


# Stretch


def test_stretch_spreads_the_luminance():
    a, b = (levels(9, 13, seed=s, low=60, high=180) for s in (1, 2))
    plain = fuse(a, b, model=Weighted())
    stretched = fuse(a, b, model=Weighted(), stretch=True)
    assert stretched.min() == 0
    assert stretched.max() == 1
    expected = (plain - plain.min()) / (plain.max() - plain.min())
    torch.testing.assert_close(stretched, expected)


def test_stretch_is_on_for_refusion_by_name_and_off_for_your_own(tmp_path):
    torch.manual_seed(0)
    network = ReFusion()
    path = save_weights(network, tmp_path / "x.safetensors")
    a, b = levels(16, 16, seed=1), levels(16, 16, seed=2)
    by_name = fuse(a, b, checkpoint=path)
    assert by_name.min() == 0
    assert by_name.max() == 1
    plain = fuse(a, b, model=network)
    assert plain.min() > 0
    torch.testing.assert_close(fuse(a, b, checkpoint=path, stretch=False), plain)
    torch.testing.assert_close(fuse(a, b, model=network, stretch=True), by_name)


def test_stretch_leaves_a_flat_picture_and_knows_pictures_apart():
    flat = torch.full((1, 1, 8, 8), 0.3)
    ramp = torch.linspace(0.2, 0.4, 64).view(1, 1, 8, 8)
    both = stretch_to_range(torch.cat([flat, ramp]))
    torch.testing.assert_close(both[:1], flat, rtol=0, atol=0)
    torch.testing.assert_close(both[1], torch.linspace(0, 1, 64).view(1, 8, 8))
    constant = np.full((8, 8), 77, np.uint8)
    fused = fuse(constant, constant, model=Weighted(), stretch=True)
    torch.testing.assert_close(fused, to_tensor(constant))


def test_stretch_comes_once_after_the_tiles():
    a = np.tile(np.linspace(0.2, 0.8, 96), (40, 1))
    whole = fuse(a, a, model=Weighted(), stretch=True)
    tiled = fuse(a, a, model=Weighted(), stretch=True, tile=32)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


# Tiles


def test_tiles_only_where_asked_or_needed(monkeypatch):
    a = levels(70, 90)
    whole = Weighted()
    fuse(a, a, model=whole)
    assert whole.seen == [(70, 90)]
    tiled = Weighted()
    fuse(a, a, model=tiled, tile=32)
    assert set(tiled.seen) == {(32, 32)}
    monkeypatch.setattr(sys.modules["fusionkit.fuse"], "WHOLE_PIXELS", 70 * 90 - 1)
    monkeypatch.setattr(sys.modules["fusionkit.fuse"], "TILE", 64)
    large = Weighted()
    fuse(a, a, model=large)
    assert set(large.seen) == {(64, 64)}
    heavy = Weighted()
    heavy.cpu_tile = 48
    fuse(a, a, model=heavy)
    assert set(heavy.seen) == {(48, 48)}
    uncut = Weighted()
    fuse(a, a, model=uncut, tile=0)
    assert uncut.seen == [(70, 90)]


@pytest.mark.parametrize("tile", [16, 50, 131, 200])
def test_tiles_leave_no_trace_of_a_local_network(tile):
    a, b = levels(131, 157, seed=1), levels(131, 157, 3, seed=2)
    whole, tiled = (fuse(a, b, model=Weighted(0.3), tile=t) for t in (0, tile))
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


class Streams(Weighted):
    """Records the tiles it was asked to stream in."""

    cpu_tile = 24

    def stream(self, a, b, tile):
        self.seen.append(tile)
        return self.share * a + (1 - self.share) * b


def test_a_network_streams_where_the_whole_picture_would_take_much_memory(monkeypatch):
    monkeypatch.setattr(sys.modules["fusionkit.fuse"], "WHOLE_PIXELS_CPU", 40 * 40)
    for side, seen in ((40, (40, 40)), (41, 24)):
        network, picture = Streams(), levels(side, side)
        fuse(picture, picture, model=network)
        assert network.seen == [seen]


@pytest.mark.parametrize("tile", [128, 96])
def test_tiles_of_a_network_that_streams_give_the_whole_picture(shared, tile):
    folder = shared / "data" / "roadscene" / "test"
    pair = [folder / source / "FLIR_06570.jpg" for source in ("ir", "vi")]
    weights = shared / "weights" / "refusion_ivif.safetensors"
    whole, tiled = (fuse(*pair, checkpoint=weights, tile=t, device="cpu") for t in (0, tile))
    assert whole.shape == tiled.shape
    torch.testing.assert_close(tiled, whole, rtol=0, atol=2e-4)


# Refusals


def test_a_model_that_does_not_fuse_is_refused():
    with pytest.raises(ValueError, match="'colornet' is no fusion network"):
        fuse(levels(9, 9), levels(9, 9), model="colornet")


def test_sizes_that_differ_are_named(tmp_path, network):
    a = write(tmp_path / "warm.png", levels(9, 13))
    b = write(tmp_path / "bright.png", levels(10, 14))
    with pytest.raises(ValueError, match="one size") as caught:
        fuse(a, b, model=network)
    for word in ("warm.png", "9×13", "bright.png", "10×14"):
        assert word in str(caught.value)
    with pytest.raises(ValueError, match="picture a is 9×13 but picture b is 10×14"):
        fuse(levels(9, 13), levels(10, 14), model=network)


def test_broken_pictures_are_named(tmp_path, network):
    good = write(tmp_path / "good.png", levels(40, 40))
    bad = tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"bad\.png: not a readable picture"):
        fuse(good, bad, model=network)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png: no such picture"):
        fuse(tmp_path / "nowhere.png", good, model=network)


def test_unfit_arrays_are_named_by_their_role(network):
    good = np.full((9, 13), 0.5)
    nan = good.copy()
    nan[0, 0] = np.nan
    with pytest.raises(ValueError, match="picture b: holds NaN"):
        fuse(good, nan, model=network)
    with pytest.raises(ValueError, match="picture a: 2 channels"):
        fuse(np.zeros((9, 13, 2)), good, model=network)
    with pytest.raises(ValueError, match="picture a: 7×13 pixels"):
        fuse(good[:7], good[:7], model=network)


def test_unknown_names(network):
    a = levels(9, 13)
    with pytest.raises(ValueError, match=r"unknown model 'refussion'.*'refusion'"):
        fuse(a, a, model="refussion")
    with pytest.raises(ValueError, match="unknown task 'thermal'; expected one of ivif"):
        fuse(a, a, "thermal", model=network)
    with pytest.raises(ValueError, match=r"unknown color 'grey'.*'gray'.*auto, gray"):
        fuse(a, a, model=network, color="grey")


def test_a_checkpoint_needs_a_models_name(tmp_path, network):
    path = save_weights(network, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="checkpoint goes with a model's name"):
        fuse(levels(9, 13), levels(9, 13), model=network, checkpoint=path)


# Folders


@pytest.fixture
def folders(tmp_path):
    for name in ("one", "two", "three"):
        write(tmp_path / "ir" / f"{name}.png", levels(9, 13, seed=1))
        write(tmp_path / "vi" / f"{name}.png", levels(9, 13, 3, seed=2))
    return tmp_path / "ir", tmp_path / "vi", tmp_path / "out"


def test_folders(folders, network):
    results = fuse_folders(*folders, model=network, progress=False)
    assert list(results) == ["one", "three", "two"]
    for stem, path in results.items():
        assert path == folders[2] / f"{stem}.png"
        expected = fuse(folders[0] / f"{stem}.png", folders[1] / f"{stem}.png", model=network)
        assert (to_tensor(path) - expected).abs().max() < 0.51 / 255
    assert len(list(folders[2].iterdir())) == 3


def test_partners_may_have_other_suffixes(folders, network):
    (folders[0] / "one.png").unlink()
    save_image(torch.rand(1, 9, 13), folders[0] / "one.bmp")
    results = fuse_folders(*folders, model=network, color="gray", progress=False)
    assert to_tensor(results["one"]).shape == (1, 9, 13)


@pytest.mark.parametrize("progress", [True, False])
def test_a_broken_pair_is_reported_and_the_others_are_written(folders, network, progress):
    (folders[1] / "three.png").write_bytes(b"broken")
    write(folders[0] / "two.png", levels(20, 20))
    results = fuse_folders(*folders, model=network, progress=progress)
    assert results["one"].exists()
    assert isinstance(results["three"], ValueError)
    assert str(folders[1] / "three.png") in str(results["three"])
    assert "20×20" in str(results["two"])
    assert [p.name for p in folders[2].iterdir()] == ["one.png"]


def test_reading_and_writing_overlap_with_the_network(folders, network, monkeypatch):
    """The next pair is read and the last is written by other threads, and no more than that."""
    module = sys.modules["fusionkit.fuse"]
    seen, begun = {"read": set(), "run": set(), "written": set()}, []

    def spied(kind: str, function):
        def call(*arguments):
            seen[kind].add(threading.current_thread().name)
            begun.append(kind)
            return function(*arguments)

        return call

    for kind, name in (("read", "_load"), ("run", "_fuse_luminance"), ("written", "save_image")):
        monkeypatch.setattr(module, name, spied(kind, getattr(module, name)))
    for i in range(4):
        write(folders[0] / f"{i}.png", levels(9, 13, seed=i))
        write(folders[1] / f"{i}.png", levels(9, 13, 3, seed=9 - i))
    results = fuse_folders(*folders, model=network, progress=False)
    assert list(results) == ["0", "1", "2", "3", "one", "three", "two"]
    assert [len(names) for names in seen.values()] == [1, 1, 1]
    assert seen["run"] == {threading.current_thread().name}
    assert len(set.union(*seen.values())) == 3
    for i in range(len(begun)):
        done = [begun[: i + 1].count(kind) for kind in ("read", "run", "written")]
        assert done[0] <= done[1] + 2
        assert done[1] <= done[2] + 2
    monkeypatch.undo()
    for stem, path in results.items():
        alone = fuse(folders[0] / f"{stem}.png", folders[1] / f"{stem}.png", model=network)
        assert torch.equal(to_tensor(path), to_tensor(save_image(alone, path.with_name("x.png"))))


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_a_network_that_fails_on_a_pair_names_it(folders, error):
    class Choosy(Weighted):
        def forward(self, a, b):
            if a.shape[-1] == 20:
                raise error("sides of 20 are not for me")
            return super().forward(a, b)

    for folder in folders[:2]:
        write(folder / "three.png", levels(20, 20))
    results = fuse_folders(*folders, model=Choosy(), progress=False)
    assert list(results) == ["one", "three", "two"]
    assert "20 are not for me" in str(results["three"])
    assert sorted(p.name for p in folders[2].iterdir()) == ["one.png", "two.png"]


def test_a_missing_partner_is_reported(folders, network):
    (folders[0] / "one.png").unlink()
    write(folders[0] / "four.png", levels(9, 13))
    results = fuse_folders(*folders, model=network, progress=False)
    for stem, folder in (("one", folders[0]), ("four", folders[1])):
        assert isinstance(results[stem], FileNotFoundError)
        assert f"{folder}: no picture '{stem}'" in str(results[stem])
    assert results["two"].exists()
    assert results["three"].exists()


def test_empty_and_missing_folders(folders, network, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no picture"):
        fuse_folders(tmp_path / "empty", folders[1], folders[2], model=network)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        fuse_folders(folders[0], tmp_path / "nowhere", folders[2], model=network)
    with pytest.raises(ValueError, match="unknown task"):
        fuse_folders(*folders, "thermal", model=network)
    with pytest.raises(ValueError, match="unknown color"):
        fuse_folders(*folders, model=network, color="blue")
    assert not folders[2].exists()


@pytest.mark.parametrize("model", ["caf", "refusion", "tcmoa_tiny"])
def test_bf16_is_near_float32_and_comes_back_as_float32(model):
    torch.manual_seed(0)
    network = create_model(model).eval()
    pair = torch.rand(2, 1, 48, 40).unbind(0)
    exact, mixed = (fuse(*pair, model=network, precision=p) for p in ("float32", "bf16"))
    assert mixed.dtype == torch.float32
    assert 0 < (exact - mixed).abs().max() < 0.03


def test_unknown_precision():
    with pytest.raises(ValueError, match="unknown precision 'fp8'; expected one of float32, bf16"):
        fuse(*torch.rand(2, 1, 16, 16), precision="fp8")


def test_a_fused_picture_may_be_used_in_training():
    a, b = levels(16, 16), levels(16, 16, 3)
    weight = torch.ones(1, requires_grad=True)
    for color in ("auto", "gray"):
        target = fuse(a, b, model=Weighted(), color=color)
        assert not target.requires_grad
        ((weight - target) * target).sum().backward()  # keeps it for the way back
    assert weight.grad.isfinite().all()


def test_a_tile_below_zero_is_refused():
    with pytest.raises(ValueError, match="tile -1; expected"):
        fuse(levels(16, 16), levels(16, 16), model=Weighted(), tile=-1)
