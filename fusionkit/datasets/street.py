"""Street scenes in infrared and visible, with an exact label map and boxes.

One geometry is rendered twice. Each pixel of a doubled grid knows its material and its place in
the world; the visible picture is albedo times the light of the sun, the street lamps and the
headlights, the infrared one a map of temperatures through a bolometer.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import find_objects, gaussian_filter, gaussian_filter1d

from fusionkit.datasets.noise import quantize, resize, smooth_noise
from fusionkit.datasets.street_background import draw_street
from fusionkit.datasets.street_canvas import ID, STREET_CLASSES
from fusionkit.datasets.street_layout import Layout, draw_objects, place

__all__ = ["STREET_CLASSES", "TIMES", "scene"]

TIMES = ("day", "night", "glare")
BOXED = ("car", "person", "lamp")
FINE = 2  # subpixels per pixel and axis
MIN_BOX = 4  # shortest side of a box in pixels of a 256-pixel picture
SKY_LIGHT = np.array((0.42, 0.52, 0.72), np.float32)
SUNLIGHT = np.array((1.15, 1.02, 0.82), np.float32)
CITY_GLOW = np.array((0.010, 0.010, 0.014), np.float32)


def scene(rng: np.random.Generator, size: tuple[int, int], time: str) -> dict[str, np.ndarray]:
    """Infrared `a` (H, W), visible `b` (H, W, 3), `labels` (H, W), `boxes` (N, 4), `classes` (N,).

    Boxes are (left, top, right, bottom) in pixels, right and bottom exclusive, around the visible
    part of each car, person and lamp.
    """
    layout = place(rng, size, time)
    fine = (size[0] * FINE, size[1] * FINE)
    street = draw_street(rng, layout, fine)
    canvas, lights = draw_objects(rng, layout, fine)

    number = np.asarray(canvas.picture)
    covered = np.flatnonzero(number)
    parts = np.array(canvas.parts, np.float32)[number.ravel()[covered]]
    for field, columns in (("colour", slice(0, 3)), ("glow", slice(4, 7))):
        getattr(street, field).reshape(-1, 3)[covered] = parts[:, columns]
    for field, column in (("temperature", 3), ("label", 7), ("x", 9), ("y", 10), ("z", 11)):
        getattr(street, field).ravel()[covered] = parts[:, column]
    instance = np.zeros(number.shape, np.int32)
    instance.ravel()[covered] = parts[:, 8]

    grain = smooth_noise(rng, fine, (160, 160))
    roughness = np.full(len(STREET_CLASSES), 0.05, np.float32)
    roughness[ID["sky"]], roughness[ID["vegetation"]] = 0, 0.28
    rough = roughness[street.label]
    street.colour *= np.maximum(1 + rough * grain, 0.2)[..., None]
    street.temperature += np.where(street.label == ID["vegetation"], 0.7 * grain, 0)
    shadow = np.asarray(canvas.shadow, np.float32) / 255
    shadow = gaussian_filter(shadow, 0.006 * min(fine)) * np.isin(
        street.label, (ID["road"], ID["pavement"])
    )
    visible = _visible(rng, layout, street, shadow, lights)
    infrared = _infrared(rng, layout, street, shadow)

    # The upper left subpixel speaks for the pixel: a class has no mean.
    labels = street.label[::FINE, ::FINE].astype(np.int64)
    boxes, classes = _boxes(instance[::FINE, ::FINE], labels)
    return {"a": infrared, "b": visible, "labels": labels, "boxes": boxes, "classes": classes}


def _shrink(array: np.ndarray) -> np.ndarray:
    """The mean of each pixel's subpixels."""
    return sum(array[i::FINE, j::FINE] for i in range(FINE) for j in range(FINE)) / FINE**2


def _visible(rng: np.random.Generator, layout: Layout, street, shadow, lights) -> np.ndarray:
    """Reflected light, haze, lamps with their glow, then the camera: (H, W, 3) in [0, 1]."""
    day = layout.time == "day"
    sky = (street.label == ID["sky"])[..., None]
    if day:
        sun = (street.sunlit * (1 - shadow))[..., None]
        light = 0.8 * SKY_LIGHT * (1 - 0.45 * shadow[..., None]) + SUNLIGHT * sun
        haze, reach = np.array((0.62, 0.68, 0.76), np.float32), 170.0
    else:
        light = _night_light(layout, street, shadow, lights)
        haze, reach = np.array((0.012, 0.011, 0.013), np.float32), 120.0
    image = street.colour * np.where(sky, 1, light)
    mist = (1 - np.exp(-np.minimum(street.z, 400) / reach))[..., None] * ~sky
    image = _shrink(image + (haze - image) * mist)
    glow = _shrink(street.glow)
    image = layout.exposure * image + glow + _bloom(layout, glow)
    image = gaussian_filter1d(gaussian_filter1d(image, 0.35, axis=0), 0.35, axis=1)
    shape = image.shape
    noise = rng.standard_normal(shape, dtype=np.float32)
    image = np.maximum(image + noise * np.sqrt(layout.noise * (image + 0.004)), 0)
    return quantize((1.06 * image / (1 + 0.06 * image)) ** (1 / 2.2))


def _night_light(layout: Layout, street, shadow, lights) -> np.ndarray:
    """Irradiance (H, W, 3) from the street lamps and from the own car's dipped headlights."""
    x, y, z, label = (
        plane[::FINE, ::FINE] for plane in (street.x, street.y, street.z, street.label)
    )  # light is smooth: once a pixel will do
    pools = np.zeros_like(x)
    for lx, ly, lz in np.array(lights, np.float32).reshape(-1, 3):
        square = (x - lx) ** 2 + (z - lz) ** 2
        drop = np.maximum(ly - y, 0.3)
        square += drop * drop
        pools += drop / (square * np.sqrt(square)) * (y < ly + 0.5)
    ground = np.isin(label, (ID["road"], ID["pavement"]))
    aim = np.exp(-(((x - 0.6) / (1.2 + 0.17 * z)) ** 2) - (np.maximum(y - 0.4, 0) / 0.9) ** 2)
    beam = layout.beam * aim * np.exp(-z / 22) * np.clip(z / 6, 0, 1.2)
    light = pools[..., None] * (14 * layout.lamp_colour) + CITY_GLOW
    light += (beam * np.where(ground, 0.6, 1.0))[..., None] * np.array((1, 0.95, 0.85), np.float32)
    light = light.astype(np.float32).repeat(FINE, axis=0).repeat(FINE, axis=1)
    return light * (1 - 0.7 * shadow[..., None])


def _bloom(layout: Layout, glow: np.ndarray) -> np.ndarray:
    """Scatter in lens and air: halos around everything that gives off light."""
    if not glow.any():
        return np.zeros_like(glow)
    height, width = glow.shape[:2]
    side = min(height, width)
    small = (max(height // 4, 8), max(width // 4, 8))
    out = np.empty_like(glow)
    for channel in range(3):
        source = resize(glow[..., channel], small).clip(0)
        halo = 0.30 * gaussian_filter(source, side / 360)
        halo += 0.22 * gaussian_filter(source, side / 110)
        halo += layout.veil * gaussian_filter(source, side / 28)
        halo += (
            0.12 * layout.veil * gaussian_filter1d(source, side / 40, axis=1)
        )  # windscreen smear
        out[..., channel] = resize(halo, (height, width)).clip(0)
    return out


def _infrared(rng: np.random.Generator, layout: Layout, street, shadow) -> np.ndarray:
    """Temperatures through optics, an uncooled bolometer and its gain control: (H, W) in [0, 1]."""
    degrees = street.temperature
    # By day the ground is cooler in the shadow; by night it is warm where a car has stood.
    degrees = degrees + (-7 if layout.time == "day" else 1.5) * shadow
    air = layout.climate.air
    absorbed = np.exp(-np.minimum(street.z, 300) / 400)
    degrees = np.where(street.label == ID["sky"], degrees, air + (degrees - air) * absorbed)
    image = _shrink(degrees)
    shape, side = image.shape, min(image.shape)
    image = gaussian_filter(image, side / 300)
    low, high = layout.span
    level = np.clip((image - low) / (high - low), 0, 1.2)
    level = level / (1 + 0.25 * level) * 1.2  # compress what is very hot, as the display does
    columns = rng.standard_normal(shape[1], dtype=np.float32) * 0.006
    uneven = 0.015 * smooth_noise(rng, shape, (3, 3))
    level += columns + uneven + rng.standard_normal(shape, dtype=np.float32) * 0.012
    return quantize(0.03 + 0.95 * level)


def _boxes(instance: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) float32 and classes (N,) int64 of instances that show enough of themselves."""
    least = max(MIN_BOX * min(instance.shape) / 256, 2)
    boxes, classes = [], []
    for index, window in enumerate(find_objects(instance), start=1):
        if window is None:
            continue
        rows, columns = window
        mask = instance[window] == index
        short = min(mask.shape) if labels[window][mask][0] != ID["lamp"] else max(mask.shape) / 4
        if short < least or mask.sum() < least**2:
            continue
        boxes.append((columns.start, rows.start, columns.stop, rows.stop))
        classes.append(labels[window][mask][0])
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(classes, np.int64)
