"""Smooth random fields, the texture of every synthetic picture."""

from __future__ import annotations

import numpy as np
from PIL import Image


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]
) -> np.ndarray:
    """Float32 noise (H, W), mean about 0 and deviation about 1, with `cells` bumps per axis.

    A random grid resized by cubic interpolation: the same seed gives the same picture at every
    size.
    """
    grid = rng.standard_normal((cells[0] + 2, cells[1] + 2), dtype=np.float32)
    return resize(grid, shape) * 1.4  # the interpolation averages some deviation away


def fractal_noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: int, octaves: int
) -> np.ndarray:
    """Float32 noise (H, W) with amplitude halved and frequency doubled from octave to octave."""
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        total += smooth_noise(rng, shape, (cells << octave, cells << octave)) * 0.5**octave
    return total


def resize(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A float32 array (H, W) at another size, by cubic interpolation."""
    picture = Image.fromarray(np.ascontiguousarray(array, np.float32))
    return np.asarray(picture.resize(shape[::-1], Image.Resampling.BICUBIC))


def quantize(image: np.ndarray) -> np.ndarray:
    """Float32 values clipped to [0, 1] and rounded to 8 bits, as a camera's file holds them."""
    return (np.rint(np.clip(image, 0, 1) * 255) / 255).astype(np.float32)
