"""The canvas that street scenes are drawn on: a camera, numbered parts, shadows on the ground.

World coordinates in metres: x to the right, y up from the ground, z ahead of the camera.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

STREET_CLASSES = (
    "background",
    "road",
    "pavement",
    "building",
    "vegetation",
    "sky",
    "car",
    "person",
    "lamp",
)
ID = {name: index for index, name in enumerate(STREET_CLASSES)}
DARK = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Camera:
    """A pinhole `height` metres above the ground; focal length and horizon in pixels."""

    focal: float
    centre: float
    horizon: float
    height: float

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points (N, 3) to pixels (N, 2)."""
        x, y, z = np.asarray(points, float).T
        scale = self.focal / np.maximum(z, 0.5)
        return np.stack([self.centre + scale * x, self.horizon + scale * (self.height - y)], axis=1)


class Canvas:
    """A painter's canvas whose pixels hold the number of the part drawn last; 0 is background.

    Colour (linear albedo), temperature (°C), light given off, class, instance and place of each
    part are looked up by that number when the scene is shaded.
    """

    def __init__(self, camera: Camera, shape: tuple[int, int]) -> None:
        self.camera = camera
        self.picture = Image.new("I", shape[::-1])
        self.pen = ImageDraw.Draw(self.picture)
        self.shadow = Image.new("L", shape[::-1])
        self.shade = ImageDraw.Draw(self.shadow)
        self.parts: list[tuple] = [(*DARK, 0.0, *DARK, 0, 0, 0.0, 0.0, 1.0)]

    def part(self, colour, temperature, cls, instance, place, glow=DARK) -> int:
        """Register a part at `place` (x, y, z); returns its number."""
        self.parts.append((*colour, temperature, *glow, ID[cls], instance, *place))
        return len(self.parts) - 1

    def polygon(self, points, number: int) -> None:
        """Fill the polygon through world points (N, 3)."""
        self.pen.polygon(self.camera.project(points).ravel().tolist(), fill=number)

    def discs(self, centres, radii, numbers) -> None:
        """Fill discs that face the camera: centres (N, 3), radii in metres, parts' numbers."""
        places = self.camera.project(centres)
        reach = np.asarray(radii) * self.camera.focal / np.asarray(centres)[:, 2]
        corners = np.concatenate([places - reach[:, None], places + reach[:, None]], axis=1)
        for corner, number in zip(corners.tolist(), numbers, strict=True):
            self.pen.ellipse(corner, fill=number)

    def cast(self, points, depth: int = 255) -> None:
        """Darken the ground inside a polygon of (x, z) points."""
        ground = [(x, 0.0, z) for x, z in points]
        self.shade.polygon(self.camera.project(ground).ravel().tolist(), fill=depth)


@dataclass(frozen=True)
class Climate:
    """The air's temperature (°C), the sun's shadow per metre of height (x, z), or night."""

    air: float
    night: bool
    sun: tuple[float, float] = (0.0, 0.0)
