"""Multi-focus and multi-exposure pairs from the photographs inside scikit-image's wheel.

Only files that the wheel itself carries are opened, by path, so nothing is ever downloaded.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageDraw
from scipy.fft import irfft2, next_fast_len, rfft2
from scipy.ndimage import gaussian_filter, uniform_filter

from fusionkit.datasets.noise import quantize, smooth_noise

FOLDER = Path(skimage.__file__).parent / "data"
FOCUS_PHOTOGRAPHS = ("motorcycle_left.png", "astronaut.png", "coffee.png", "camera.png")
FOCUS_SHARES = (0.49, 0.19, 0.13, 0.19)  # the motorcycle alone has a measured disparity
EXPOSURE_PHOTOGRAPHS = (
    "motorcycle_left.png",
    "astronaut.png",
    "coffee.png",
    "chelsea.png",
    "rocket.jpg",
)
LAYERS = 6
GAMMA = 2.2

# Relative disparity (0 far, 1 near) of photographs without a measured one: the ground or
# backdrop from the top of the picture to its bottom, then outlines as (disparity, points), far
# to near, in fractions of width and height.
GROUND = {
    "astronaut.png": (0.05, 0.05),
    "coffee.png": (0.0, 0.8),
    "camera.png": (0.0, 0.7),
}
OUTLINES = {
    "astronaut.png": (
        (0.2, "0 0  .09 .04  .13 .2  .19 .4  .14 .5  .08 .62  .05 1  0 1"),
        (0.25, ".7 .56  .74 .15  .77 0  .87 0  .9 .3  .9 .53  1 .53  1 1  .7 1"),
        (
            0.75,
            ".03 1  .06 .85  .05 .7  .08 .55  .14 .47  .23 .42  .22 .34  .29 .29  .37 .29  "
            ".35 .22  .3 .19  .31 .1  .37 .04  .46 .02  .55 .05  .59 .12  .59 .2  .54 .25  "
            ".5 .3  .57 .37  .6 .45  .67 .5  .7 .65  .7 .7  .6 .76  .55 .87  .55 1",
        ),
        (1.0, ".54 1  .55 .85  .6 .75  .69 .68  .79 .67  .89 .71  .96 .8  1 .9  1 1"),
    ),
    "coffee.png": (
        (
            0.62,
            ".13 .55  .17 .34  .27 .2  .4 .12  .65 .16  .76 .32  .8 .52  .75 .74  .65 .88  "
            ".48 .96  .32 .9  .2 .77",
        ),
        (
            1.0,
            ".28 .25  .33 .1  .43 .04  .55 .04  .65 .14  .69 .3  .66 .48  .6 .58  .42 .6  "
            ".38 .76  .33 .74  .34 .6  .3 .45",
        ),
    ),
    "camera.png": (
        (
            0.85,
            "0 1  0 .52  .05 .46  .11 .33  .2 .24  .3 .21  .34 .14  .42 .12  .5 .16  .53 .22  "
            ".52 .27  .63 .27  .63 .33  .65 .36  .63 .42  .6 .43  .6 .53  .66 .62  .8 1  .77 1  "
            ".6 .66  .59 .94  .51 .92  .47 1  .45 1  .54 .66  .54 .6  .46 .58  .4 .55  .28 .74  "
            ".3 1",
        ),
    ),
}


@lru_cache(maxsize=8)
def photograph(name: str) -> np.ndarray:
    """A photograph of the wheel as float32 RGB (H, W, 3) in [0, 1]."""
    with Image.open(FOLDER / name) as picture:
        return np.asarray(picture.convert("RGB"), np.float32) / 255


@lru_cache(maxsize=8)
def disparity(name: str) -> np.ndarray:
    """Relative disparity (H, W) of a photograph, float32 in [0, 1], 1 = nearest to the camera."""
    if name == "motorcycle_left.png":
        with np.load(FOLDER / "motorcycle_disp.npz") as file:
            return _fill_occlusions(file[file.files[0]])
    image = photograph(name)
    height, width = image.shape[:2]
    top, bottom = GROUND[name]
    ramp = np.linspace(top, bottom, height, dtype=np.float32)[:, None]
    depth = np.broadcast_to(ramp, (height, width))
    guide = image.mean(axis=-1)
    for value, text in OUTLINES[name]:
        numbers = np.array(text.split(), float).reshape(-1, 2) * (width, height)
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).polygon([tuple(point) for point in numbers], fill=1)
        matte = guided_filter(np.asarray(mask, np.float32), guide)
        depth = np.where(matte > 0.5, np.maximum(value, depth), depth)
    return depth.astype(np.float32)


def _fill_occlusions(measured: np.ndarray) -> np.ndarray:
    """Pixels without a match, seen by one eye only, take the farther of their row's neighbours."""
    known = np.isfinite(measured)
    column = np.arange(measured.shape[1])
    left = np.maximum.accumulate(np.where(known, column, 0), axis=1)
    right = np.where(known, column, column[-1])
    right = np.minimum.accumulate(right[:, ::-1], axis=1)[:, ::-1]
    finite = np.where(known, measured, np.inf)
    pick = np.take_along_axis
    filled = np.minimum(pick(finite, left, axis=1), pick(finite, right, axis=1))
    filled = np.where(np.isfinite(filled), filled, measured[known].min())
    return ((filled - filled.min()) / np.ptp(filled)).astype(np.float32)


def guided_filter(mask: np.ndarray, guide: np.ndarray, radius: int = 7) -> np.ndarray:
    """Pull a hand-drawn outline to the edges of the picture (He, Sun and Tang, ECCV 2010)."""

    def mean(x: np.ndarray) -> np.ndarray:
        return uniform_filter(x, 2 * radius + 1)

    mean_guide, mean_mask = mean(guide), mean(mask)
    covariance = mean(guide * mask) - mean_guide * mean_mask
    slope = covariance / (mean(guide * guide) - mean_guide**2 + 1e-3)
    return mean(slope) * guide + mean(mean_mask - slope * mean_guide)


def crop(
    rng: np.random.Generator, arrays: list[np.ndarray], size: tuple[int, int]
) -> list[np.ndarray]:
    """One random window, perhaps mirrored, of aligned arrays (H, W) or (H, W, 3), resized.

    Its shape is that of `size`, (height, width), and it is as large as the arrays allow or down to
    0.62 of that. Pictures come back in 8-bit steps.
    """
    height, width = arrays[0].shape[:2]
    scale = min(height / size[0], width / size[1]) * rng.uniform(0.62, 1.0)
    tall, wide = size[0] * scale, size[1] * scale
    top, left = rng.uniform(0, height - tall), rng.uniform(0, width - wide)
    mirrored = rng.random() < 0.5
    box = (left, top, left + wide, top + tall)

    def cut(plane: np.ndarray, how: Image.Resampling) -> np.ndarray:
        picture = Image.fromarray(plane).resize(size[::-1], how, box=box)
        return np.asarray(
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture
        )

    out = []
    for array in arrays:
        if array.ndim == 3:
            picture = np.rint(array * 255).astype(np.uint8)
            out.append(cut(picture, Image.Resampling.LANCZOS).astype(np.float32) / 255)
        else:  # disparity keeps its steps: a mean of near and far lies at neither
            out.append(cut(array, Image.Resampling.NEAREST))
    return out


def multi_focus(rng: np.random.Generator, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Near focus `a`, far focus `b` and the all-in-focus `target`, each (H, W, 3) in [0, 1]."""
    name = rng.choice(FOCUS_PHOTOGRAPHS, p=FOCUS_SHARES)
    for _ in range(6):  # a window wholly near or wholly far would leave one source sharp all over
        sharp, depth = crop(rng, [photograph(name), disparity(name)], size)
        if has_depth(depth):
            break
    return focus_pair(rng, sharp, depth)


def has_depth(depth: np.ndarray) -> bool:
    """Whether a disparity map (H, W) has enough both near and far for a pair of two focuses."""
    far, near = np.percentile(depth, (12, 88))
    return near - far > 0.3 and 0.15 < (depth > (near + far) / 2).mean() < 0.85


def focus_pair(
    rng: np.random.Generator, sharp: np.ndarray, depth: np.ndarray
) -> dict[str, np.ndarray]:
    """The `target` (H, W, 3) in [0, 1] through a lens that is focused near, `a`, and far, `b`.

    `sharp` is the target, `depth` its relative disparity (H, W), 1 = nearest.
    """
    far, near = np.percentile(depth, (12, 88))
    strength = rng.uniform(0.016, 0.026) * min(depth.shape) / max(near - far, 0.2)
    tolerance = rng.uniform(0.15, 0.3) * (near - far)
    light = sharp**GAMMA  # defocus mixes light, not gray levels: highlights stay bright discs
    edges = np.linspace(depth.min(), depth.max() + 1e-6, LAYERS + 1)
    layers = list(_layers(light, depth, edges))
    a, b = (_defocus(layers, strength, tolerance, plane) ** (1 / GAMMA) for plane in (near, far))
    return {"a": quantize(a), "b": quantize(b), "target": quantize(sharp)}


def _layers(light: np.ndarray, depth: np.ndarray, edges: np.ndarray):
    """Depth layers from far to near: (disparity, premultiplied light and coverage (4, H, W)).

    A layer reaches on beneath all nearer ones, with its own colours spread inwards, so that what
    shows through the soft rim of a blurred foreground is background.
    """
    reach = max(light.shape[0] // 24, 3)
    for low, high in pairwise(edges):
        own = (depth >= low) & (depth < high)
        if not own.any():
            continue
        behind = (depth >= low).astype(np.float32)
        weight = own.astype(np.float32)
        spread = np.stack([uniform_filter(light[..., c] * weight, reach) for c in range(3)])
        weight = uniform_filter(weight, reach)
        inside = np.where(
            weight > 1e-4, spread / np.maximum(weight, 1e-4), np.moveaxis(light, -1, 0)
        )
        colour = np.where(own, np.moveaxis(light, -1, 0), inside)
        yield depth[own].mean(), np.concatenate([colour * behind, behind[None]])


def _defocus(
    layers: list[tuple[float, np.ndarray]], strength: float, tolerance: float, plane: float
) -> np.ndarray:
    """A thin lens focused on disparity `plane`: composite (H, W, 3) of the layers, far to near."""
    picture = None
    for disparity_, layer in layers:
        # The circle of confusion grows with the distance in disparity (inverse depth).
        radius = strength * max(abs(disparity_ - plane) - tolerance, 0.0)
        layer = _disc_blur(layer, radius)
        light, cover = layer[:3], np.clip(layer[3:], 0, 1)
        picture = light / np.maximum(cover, 1e-3) if picture is None else picture
        picture = light + (1 - cover) * picture
    return np.moveaxis(np.clip(picture, 0, 1), 0, -1)


def _disc_blur(layer: np.ndarray, radius: float) -> np.ndarray:
    """Convolve (C, H, W) with an antialiased disc, a point's image through a round aperture."""
    if radius < 0.5:
        return layer
    reach = int(np.ceil(radius))
    offset = np.arange(-reach, reach + 1)
    disc = np.clip(radius + 0.5 - np.hypot(offset[:, None], offset), 0, 1).astype(np.float32)
    height, width = layer.shape[1:]
    shape = [next_fast_len(side + 4 * reach, real=True) for side in (height, width)]
    padded = np.pad(layer, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    spectrum = rfft2(padded, shape) * rfft2(disc / disc.sum(), shape)
    blurred = irfft2(spectrum, shape)
    return blurred[:, 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]


def multi_exposure(rng: np.random.Generator, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Under-exposed `a`, over-exposed `b` and the photograph `target`, (H, W, 3) in [0, 1]."""
    name = EXPOSURE_PHOTOGRAPHS[rng.integers(len(EXPOSURE_PHOTOGRAPHS))]
    (target,) = crop(rng, [photograph(name)], size)
    radiance = scene_radiance(rng, target)
    under, over = -rng.uniform(2.0, 3.0), rng.uniform(1.5, 3.0)
    return exposure_pair(rng, radiance, (under, over)) | {"target": quantize(target)}


def exposure_pair(
    rng: np.random.Generator, radiance: np.ndarray, stops: tuple[float, float]
) -> dict[str, np.ndarray]:
    """Linear light (H, W, 3), exposed `stops[0]` for `a` and `stops[1]` for `b`, by one camera."""
    response = rng.uniform(0.43, 0.52), rng.uniform(0.0, 0.6)
    a, b = (_expose(rng, radiance * 2.0**stop, *response) for stop in stops)
    return {"a": a, "b": b}


def scene_radiance(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Linear light with the range that the photograph's own tone curve had compressed.

    Large bright parts become brighter and large dark ones darker (a tone mapping inverted), and
    highlights above the knee of the film curve are expanded.
    """
    light = image**GAMMA
    height, width = image.shape[:2]
    base = gaussian_filter(np.log2(light.mean(axis=-1) + 0.01), min(height, width) / 16)
    drift = 0.15 * smooth_noise(rng, (height, width), (2, 2))
    stops = rng.uniform(0.3, 0.6) * (base - np.percentile(base, 65)) + drift
    peak = light.max(axis=-1, keepdims=True)
    return light * np.exp2(np.clip(stops, -2.5, 2.5))[..., None] * (1 + 1.5 * peak**3)


def _expose(
    rng: np.random.Generator, light: np.ndarray, exponent: float, contrast: float
) -> np.ndarray:
    """Sensor noise, the full well, a response curve and 8 bits: (H, W, 3) in [0, 1]."""
    noise = rng.standard_normal(light.shape, dtype=np.float32)
    sensed = light + noise * np.sqrt(2e-5 * light + 2e-7)  # shot noise and read noise
    tone = np.clip(sensed, 0, 1) ** exponent
    return quantize((1 - contrast) * tone + contrast * tone * tone * (3 - 2 * tone))
