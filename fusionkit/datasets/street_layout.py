"""Where everything in a street stands, and in what light."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusionkit.datasets.street_canvas import Camera, Canvas, Climate
from fusionkit.datasets.street_objects import car, lamp, person, tree


@dataclass(frozen=True)
class Layout:
    """What the seed decides about a scene before anything is drawn; lengths in metres."""

    time: str
    climate: Climate
    camera: Camera  # in subpixels
    kerbs: tuple[float, float]
    walls: tuple[float, float]
    exposure: float
    noise: float
    beam: float
    veil: float
    lamp_colour: np.ndarray
    span: tuple[float, float]  # temperatures shown as black and as white
    park: int  # the side (0 left, 1 right) with a hedge in place of houses, or -1


def place(rng: np.random.Generator, size: tuple[int, int], time: str) -> Layout:
    """Choose the camera, the street's width, the weather and the light."""
    height, width = size
    scale = 2.0 * (height * width) ** 0.5
    camera = Camera(
        focal=scale * rng.uniform(0.85, 1.1),
        centre=2 * width * rng.uniform(0.42, 0.62),
        horizon=2 * height * rng.uniform(0.40, 0.48),
        height=rng.uniform(1.7, 2.3),
    )
    night = time != "day"
    air = rng.uniform(6, 14) if night else rng.uniform(19, 25)
    side = float(rng.choice((-1.0, 1.0)))
    sun = (side * rng.uniform(0.4, 0.9), rng.uniform(-0.3, 0.5))
    kerbs = (-rng.uniform(6.4, 8.0), rng.uniform(3.6, 4.6))
    walls = (kerbs[0] - rng.uniform(2.6, 3.8), kerbs[1] + rng.uniform(2.6, 3.8))
    sodium = rng.random() < 0.55
    return Layout(
        time=time,
        climate=Climate(air, night, sun),
        camera=camera,
        kerbs=kerbs,
        walls=walls,
        exposure=rng.uniform(0.5, 0.95) if night else rng.uniform(0.75, 0.95),
        noise=1.5e-3 if night else 1.2e-4,
        beam=rng.uniform(0.25, 0.9),
        veil={"day": 0.0, "night": 0.10, "glare": 0.75}[time],
        lamp_colour=np.array((1.0, 0.62, 0.26) if sodium else (0.92, 0.95, 1.0), np.float32),
        span=(air - 9, 34.0) if night else (air - 10, air + 19),
        park=int(rng.integers(-1, 2)) if rng.random() < 0.5 else -1,
    )


def draw_objects(rng: np.random.Generator, layout: Layout, shape: tuple[int, int]):
    """Draw lamps, trees, cars and persons from far to near; returns the canvas and the lights."""
    canvas, climate = Canvas(layout.camera, shape), layout.climate
    (left, right), glare = layout.kerbs, layout.time == "glare"
    things: list[tuple[float, str, tuple]] = []
    for side, kerb in ((-1, left), (1, right)):
        parked = rng.random() < 0.75
        for z in np.arange(rng.uniform(6, 11), 55, 6.3) + rng.uniform(0, 1.0, 8)[0]:
            if parked and rng.random() < 0.55:
                things.append((z, "car", (kerb - side * 1.15, side > 0, False)))
        for z in np.arange(rng.uniform(9, 16), 70, rng.uniform(9, 13)):
            if rng.random() < 0.55:
                things.append((z, "tree", (kerb + side * 0.9,)))
        start = rng.uniform(10, 16) + (6 if side > 0 else 0)
        things += [(z, "lamp", (kerb + side * 0.5, -side * 1.3)) for z in np.arange(start, 90, 22)]
    lane = (left + right) / 2
    if glare or rng.random() < 0.7:
        z = rng.uniform(9, 15) if glare else rng.uniform(14, 38)
        things.append((z, "car", (lane - 1.45, False, True)))
    if rng.random() < 0.7:
        things.append((rng.uniform(11, 32), "car", (lane + 1.45, True, True)))
    for _ in range(rng.integers(3, 9)):
        z = 6 + 24 * rng.beta(1.1, 1.8)
        on_road = rng.random() < 0.3
        wall = rng.choice((0, 1))
        pavement = sorted((layout.walls[wall], layout.kerbs[wall]))
        x = rng.uniform(left + 2.4, right - 2.4) if on_road else rng.uniform(*pavement)
        things.append((z, "person", (x,)))
    lights, instance = [], 0
    glow = tuple(layout.lamp_colour * 7.0) if climate.night else (0.0, 0.0, 0.0)
    for z, kind, more in sorted(things, key=lambda thing: -thing[0]):
        if kind == "tree":
            tree(canvas, rng, climate, more[0], z)
            continue
        instance += 1
        if kind == "lamp":
            lights.append(lamp(canvas, climate, more[0], z, more[1], glow, instance))
        elif kind == "car":
            car(canvas, rng, climate, more[0], z, more[1], more[2], instance, 60 if glare else 14)
        else:
            person(canvas, rng, climate, more[0], z, instance)
    return canvas, lights
