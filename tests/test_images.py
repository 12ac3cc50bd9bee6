"""Reading any common picture, refusing broken ones by name, and writing whole files only."""

from __future__ import annotations

import errno
import stat

import numpy as np
import pytest
import torch
from PIL import Image

from fusionkit.images import (
    list_images,
    save_image,
    to_pil,
    to_tensor,
    to_uint8,
    write_atomically,
)

LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def random_levels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# Reading


def test_gray_levels_are_exact_multiples():
    image = to_tensor(LEVELS)
    assert image.shape == (1, 16, 16)
    assert image.dtype == torch.float32
    expected = torch.from_numpy(LEVELS.astype(np.float64) / 255).float()
    torch.testing.assert_close(image[0], expected, rtol=0, atol=0)


def test_uint16_is_divided_by_its_own_range():
    levels = np.array([0, 1, 256, 32768, 65535] * 20, np.uint16).reshape(10, 10)
    expected = torch.from_numpy(levels / 65535).float()[None]
    torch.testing.assert_close(to_tensor(levels), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays_pass_as_they_are(dtype):
    array = (random_levels(9, 13) / 255).astype(dtype)
    image = to_tensor(array)
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image[0].numpy(), array.astype(np.float32))


def test_bool_is_black_and_white():
    mask = LEVELS > 100
    np.testing.assert_array_equal(to_tensor(mask)[0].numpy(), mask)


@pytest.mark.parametrize(("channels", "kept"), [(1, 1), (3, 3), (4, 3)])
def test_array_channels(channels, kept):
    array = random_levels(9, 13, channels)
    image = to_tensor(array)
    assert image.shape == (kept, 9, 13)
    np.testing.assert_array_equal(to_uint8(image).reshape(9, 13, kept), array[..., :kept])


@pytest.mark.parametrize("shape", [(9, 13), (1, 9, 13), (3, 9, 13), (1, 3, 9, 13), (1, 1, 9, 13)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_tensors(shape, dtype):
    tensor = torch.from_numpy(random_levels(*shape))
    tensor = tensor if dtype == torch.uint8 else (tensor / 255).to(dtype)
    image = to_tensor(tensor)
    assert image.shape == (3 if 3 in shape else 1, 9, 13)
    expected = tensor.float() / (255 if dtype == torch.uint8 else 1)
    torch.testing.assert_close(image, expected.reshape(image.shape))


def test_a_tensor_with_a_gradient_is_detached_and_not_shared():
    tensor = torch.rand(1, 8, 8, requires_grad=True)
    assert not to_tensor(tensor).requires_grad


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("1", 1), ("L", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3), ("YCbCr", 3), ("F", 1)],
)
def test_pil_modes(mode, channels):
    picture = Image.fromarray(random_levels(9, 13, 3))
    if mode == "F":
        picture = Image.fromarray(random_levels(9, 13).astype(np.float32) / 255)
    image = to_tensor(picture.convert(mode))
    assert image.shape == (channels, 9, 13)
    if mode in ("RGB", "RGBA"):
        np.testing.assert_array_equal(to_uint8(image), np.asarray(picture))


@pytest.mark.parametrize("mode", ["LA", "PA"])
def test_alpha_of_a_gray_picture_is_dropped(tmp_path, mode):
    picture = Image.fromarray(LEVELS).convert("LA").convert(mode)
    if mode == "LA":
        picture.putalpha(Image.fromarray(LEVELS.T.copy()))
        picture.save(tmp_path / "x.png")
        picture = tmp_path / "x.png"
    image = to_tensor(picture)
    torch.testing.assert_close(image, to_tensor(LEVELS).expand_as(image))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".webp"])
@pytest.mark.parametrize("shape", [(9, 13), (131, 157, 3)])
def test_lossless_files(tmp_path, suffix, shape):
    levels = random_levels(*shape)
    path = tmp_path / f"x{suffix}"
    Image.fromarray(levels).save(path, lossless=True)
    image = to_tensor(path)
    expected = to_tensor(levels).expand_as(image)  # WebP knows no gray
    torch.testing.assert_close(image, expected, rtol=0, atol=0)
    torch.testing.assert_close(to_tensor(str(path)), image, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_files(tmp_path, suffix):
    levels = np.linspace(0, 65535, 12 * 10).astype(np.uint16).reshape(12, 10)
    Image.fromarray(levels).save(tmp_path / f"x{suffix}")
    expected = torch.from_numpy(levels / 65535).float()[None]
    torch.testing.assert_close(to_tensor(tmp_path / f"x{suffix}"), expected, rtol=0, atol=0)


def test_big_endian_16_bits():
    levels = np.linspace(0, 65535, 12 * 10).astype(">u2").reshape(12, 10)
    torch.testing.assert_close(to_tensor(levels), to_tensor(levels.astype(np.uint16)))


# Refusals


def refused(image, *words: str, error: type[Exception] = ValueError, name: str | None = None):
    with pytest.raises(error) as caught:
        to_tensor(image, name)
    for word in words:
        assert word in str(caught.value)


def test_missing_file_is_named(tmp_path):
    path = tmp_path / "nowhere.png"
    refused(path, str(path), "no such picture", error=FileNotFoundError)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp", ".pgm", ".ppm"])
def test_truncated_files_are_named(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    shape = (40, 30) if suffix == ".pgm" else (40, 30, 3)
    Image.fromarray(random_levels(*shape)).save(path)
    content = path.read_bytes()
    for share in (0, 0.001, 0.003, 0.01, 0.02, 0.05, 0.3, 0.6, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        refused(path, str(path), "not a readable picture")


def test_other_files_and_folders_are_named(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("not a picture")
    refused(path, str(path), "not a readable picture")
    refused(tmp_path, str(tmp_path), "not a readable picture")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_refused(bad):
    array = np.full((8, 8), 0.5, np.float32)
    array[3, 4] = bad
    refused(array, "infrared: holds NaN or infinite values", name="infrared")
    refused(torch.from_numpy(array), "image: holds NaN")


@pytest.mark.parametrize("value", [-0.01, 1.01, 200.0])
def test_floats_outside_the_range_are_refused(value):
    array = np.full((8, 8), 0.5)
    array[0, 0] = value
    refused(array, f"{value:g}", "expected the range [0, 1]")


@pytest.mark.parametrize("shape", [(7, 8), (8, 7, 3), (1, 100), (0, 0)])
def test_small_pictures_are_refused(shape):
    refused(np.zeros(shape, np.uint8), f"{shape[0]}×{shape[1]} pixels", "at least 8×8")


@pytest.mark.parametrize("shape", [(8,), (8, 8, 5), (3, 9, 13), (2, 8, 8, 3)])
def test_odd_array_shapes_are_refused(shape):
    refused(np.zeros(shape, np.uint8), "gray, RGB or RGBA", str(shape))


def test_two_channels_are_refused():
    refused(np.zeros((8, 8, 2), np.uint8), "x: 2 channels; expected 1 (gray)", name="x")
    refused(torch.zeros(2, 8, 8), "2 channels")


@pytest.mark.parametrize("shape", [(8,), (2, 1, 8, 8), (1, 1, 1, 8, 8)])
def test_odd_tensor_shapes_are_refused(shape):
    refused(torch.zeros(shape), "expected a tensor", str(shape))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.int8, np.complex64])
def test_other_types_are_refused(dtype):
    refused(np.zeros((8, 8), dtype), "expected uint8, uint16 or float", np.dtype(dtype).name)


@pytest.mark.parametrize("thing", [None, 3, [[0.5] * 8] * 8])
def test_other_things_are_refused(thing):
    refused(thing, "expected a path, a PIL picture, an array or a tensor", type(thing).__name__)


# Writing


def test_uint8_rounds_to_nearest_and_clips():
    image = torch.tensor([-0.2, 0.49 / 255, 0.51 / 255, 1.2]).view(1, 2, 2)
    assert to_uint8(image).tolist() == [[0, 0], [1, 255]]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif"])
def test_saved_pictures_come_back(tmp_path, channels, suffix):
    levels = random_levels(channels, 9, 13)
    image = to_tensor(torch.from_numpy(levels))
    path = save_image(image, tmp_path / "new" / f"x{suffix}")
    torch.testing.assert_close(to_tensor(path), image, rtol=0, atol=0)
    assert save_image(image[None], path) == path
    assert to_pil(image[None]).size == (13, 9)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_jpeg_is_close(tmp_path):
    image = torch.linspace(0, 1, 32).expand(3, 32, 32)
    assert (to_tensor(save_image(image, tmp_path / "x.jpg")) - image).abs().max() < 0.05


@pytest.mark.parametrize("name", ["x.xyz", "x", "x.npy"])
def test_unknown_suffix_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: expected a suffix among \.png"):
        save_image(torch.zeros(1, 8, 8), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def half(file):
        file.write(b"ne")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, half)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_while_saving_a_picture(tmp_path, monkeypatch):
    old = torch.zeros(1, 8, 8)
    path = save_image(old, tmp_path / "x.png")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_image(torch.ones(1, 8, 8), path)
    torch.testing.assert_close(to_tensor(path), old)
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_have_the_usual_mode(tmp_path):
    (tmp_path / "usual").touch()
    path = write_atomically(tmp_path / "x.bin", lambda file: file.write(b"x"))
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == usual


# Folders


def test_list_images_by_stem_in_order(tmp_path):
    for name in ("10.png", "2.JPG", "b.tif", ".hidden.png", "notes.txt", "b.csv"):
        (tmp_path / name).touch()
    found = list_images(tmp_path)
    assert list(found) == ["10", "2", "b"]
    assert found["b"] == tmp_path / "b.tif"


def test_list_images_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path}: holds no picture"):
        list_images(tmp_path)
    (tmp_path / "x.jpg").touch()
    (tmp_path / "x.png").touch()
    with pytest.raises(ValueError, match=r"x\.png: same stem as x\.jpg"):
        list_images(tmp_path)
