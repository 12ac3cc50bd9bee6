"""Pictures in, pictures out: reading any common file, and writing one that is whole or not there.

Everything inside fusionkit is a float32 tensor in [0, 1] of shape (C, H, W) or (B, C, H, W);
this is the only module that knows about files and bit depths.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
MIN_SIDE = 8

ImageLike = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor


def to_tensor(image: ImageLike, name: str | None = None) -> torch.Tensor:
    """Any picture as a float32 tensor (C, H, W) in [0, 1], C = 1 (gray) or 3 (RGB).

    Takes a path, a PIL picture, a NumPy array (H, W), (H, W, C) or a tensor (H, W), (C, H, W),
    (1, C, H, W). Integers are divided by the largest value of their type; floats must already
    lie in [0, 1]. An alpha channel is dropped, since fusion has no use for it.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: broken file, wrong number of channels, NaN, values outside [0, 1], or a side
            shorter than 8 pixels. The message names `name` (by default the path, or "image").
    """
    if isinstance(image, str | os.PathLike):
        name = name or str(image)
        array = _decode(Path(image))
    elif isinstance(image, Image.Image):
        name = name or getattr(image, "filename", "") or "image"
        array = _pil_to_array(image)
    elif isinstance(image, torch.Tensor):
        name = name or "image"
        array = _channels_last(image.detach().cpu(), name)
    elif isinstance(image, np.ndarray):
        name = name or "image"
        array = image
    else:
        raise ValueError(
            f"{name or 'image'}: expected a path, a PIL picture, an array or a tensor, "
            f"got {type(image).__name__}"
        )
    return _check(_scale(array, name), name)


def _decode(path: Path) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such picture")
    try:
        with Image.open(path) as picture:
            picture.load()  # a truncated file fails here, not in the middle of a batch
            return _pil_to_array(picture)
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
    ) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from error


def _pil_to_array(picture: Image.Image) -> np.ndarray:
    if picture.mode in ("1", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"):
        gray_palette = picture.mode == "1"
        picture = picture.convert("L" if gray_palette else "RGB")
    if picture.mode in ("LA", "La"):
        picture = picture.getchannel(0)  # gray with alpha
    array = np.asarray(picture)
    if picture.mode == "I":  # Pillow opens 16-bit PNG as 32-bit integers
        if array.size and (array.min() < 0 or array.max() > 65535):
            raise ValueError(f"32-bit values {array.min()} to {array.max()}, expected 16 bits")
        array = array.astype(np.uint16)
    return array


def _channels_last(tensor: torch.Tensor, name: str) -> np.ndarray:
    if tensor.ndim == 4 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim == 3:
        tensor = tensor.permute(1, 2, 0)
    elif tensor.ndim != 2:
        raise ValueError(
            f"{name}: expected a tensor (H, W), (C, H, W) or (1, C, H, W), "
            f"got shape {tuple(tensor.shape)}"
        )
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _scale(array: np.ndarray, name: str) -> torch.Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(
            f"{name}: expected a gray, RGB or RGBA picture, got an array of shape {array.shape}"
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == np.bool_:
        array = array.astype(np.float32)
    elif array.dtype in (np.uint8, np.uint16):
        # Divide in float64 and round once, so that gray levels are exact multiples of 1/255.
        array = (array.astype(np.float64) / np.iinfo(array.dtype).max).astype(np.float32)
    elif not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name}: expected uint8, uint16 or float values, got {array.dtype}")
    # A copy, so that nobody's array changes with the tensor.
    return torch.from_numpy(np.array(array, dtype=np.float32)).permute(2, 0, 1)


def _check(image: torch.Tensor, name: str) -> torch.Tensor:
    channels, height, width = image.shape
    if channels == 2:
        raise ValueError(f"{name}: 2 channels; expected 1 (gray), 3 (RGB) or 4 (RGBA)")
    if min(height, width) < MIN_SIDE:
        raise ValueError(
            f"{name}: {height}×{width} pixels; expected at least {MIN_SIDE}×{MIN_SIDE}"
        )
    if not torch.isfinite(image).all():
        raise ValueError(f"{name}: holds NaN or infinite values")
    low, high = image.min().item(), image.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"{name}: float values from {low:g} to {high:g}; expected the range [0, 1]"
        )
    return image[:3].contiguous()


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """(C, H, W) in [0, 1] as uint8, (H, W) for gray or (H, W, 3), rounded to nearest."""
    array = image.detach().cpu().clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return array[0] if array.shape[0] == 1 else np.moveaxis(array, 0, -1)


def to_pil(image: torch.Tensor) -> Image.Image:
    """(C, H, W) or (1, C, H, W) in [0, 1] as an 8-bit PIL picture."""
    return Image.fromarray(to_uint8(image[0] if image.ndim == 4 else image))


def save_image(image: torch.Tensor, path: str | os.PathLike) -> Path:
    """Write (C, H, W) or (1, C, H, W) in [0, 1] as an 8-bit picture, atomically.

    Raises:
        ValueError: the suffix names no picture format.
        OSError: the disk is full or the folder cannot be written; the old file, if any, stays.
    """
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: expected a suffix among {', '.join(IMAGE_SUFFIXES)}")
    picture = to_pil(image)
    kind = Image.registered_extensions()[path.suffix.lower()]
    return write_atomically(path, lambda file: picture.save(file, format=kind))


def write_atomically(path: str | os.PathLike, write: Callable) -> Path:
    """Call `write(file)` on a new file beside `path`, then put it in `path`'s place.

    A crash or a full disk leaves the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)  # mkstemp makes private files; keep the user's usual mode
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return path


def list_images(folder: str | os.PathLike) -> dict[str, Path]:
    """The pictures of a folder by stem, in the order of their names.

    Raises:
        FileNotFoundError: the folder is not there.
        ValueError: it holds no picture, or two pictures share a stem.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise ValueError(f"{path}: same stem as {found[path.stem].name}; stems must be unique")
        found[path.stem] = path
    if not found:
        raise ValueError(f"{folder}: holds no picture ({', '.join(IMAGE_SUFFIXES)})")
    return found
