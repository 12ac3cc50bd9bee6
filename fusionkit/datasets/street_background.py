"""The street itself: one ray per subpixel onto ground, facades and the far end, or into the sky."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusionkit.datasets.noise import fractal_noise
from fusionkit.datasets.street_canvas import ID
from fusionkit.datasets.street_layout import Layout

END = 110.0  # metres to where the street is closed by a cross street
FLOOR = 3.1  # metres a storey


@dataclass
class Street:
    """What each subpixel shows: (H, W, 3) linear colours, (H, W) the rest; places in metres."""

    colour: np.ndarray
    glow: np.ndarray
    temperature: np.ndarray
    label: np.ndarray
    sunlit: np.ndarray
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray


def _blocks(rng: np.random.Generator, layout: Layout) -> dict[str, np.ndarray]:
    """Houses of the left side, the right side and the far end, as one table of equal columns."""
    rows, edges = [], []
    for side in range(3):
        count = 16
        park = side == layout.park
        low, high = ((2.2, 3.5) if park else (6.5, 15.0)) if side < 2 else (5.0, 17.0)
        edges.append(np.cumsum(rng.uniform(7, 16, count)) - (0 if side < 2 else 90))
        base = np.array(((0.42, 0.36, 0.28), (0.30, 0.14, 0.09), (0.38, 0.37, 0.35),
                         (0.45, 0.40, 0.33), (0.24, 0.20, 0.17)))  # fmt: skip
        colour = base[rng.integers(len(base), size=count)] * rng.uniform(0.7, 1.1, (count, 1))
        hedge = np.full(count, park) if side < 2 else rng.random(count) < 0.35
        colour[hedge] = (0.05, 0.09, 0.025)
        rows.append(
            {
                "height": rng.uniform(low, high, count),
                "colour": colour,
                "bay": rng.uniform(2.0, 3.2, count),
                "pane": rng.uniform(0.38, 0.6, count),
                "warmth": rng.uniform(0.5, 4.5, count),
                "shop": (rng.random(count) < 0.4) & ~hedge,
                "hedge": hedge,
            }
        )
    table = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    table = {k: v.astype(np.float32) if v.dtype == float else v for k, v in table.items()}
    table["edges"] = np.stack(edges)
    return table


def draw_street(rng: np.random.Generator, layout: Layout, shape: tuple[int, int]) -> Street:
    """Cast one ray per subpixel (H, W) onto ground, facades and the far end, or into the sky."""
    camera, climate = layout.camera, layout.climate
    u = (np.arange(shape[1], dtype=np.float32) + 0.5 - camera.centre)[None]
    v = (np.arange(shape[0], dtype=np.float32) + 0.5 - camera.horizon)[:, None]
    u = np.where(np.abs(u) < 0.25, 0.25, u).astype(np.float32)
    table = _blocks(rng, layout)

    wall = np.where(u < 0, *np.float32(layout.walls))
    face = np.minimum(wall * camera.focal / u, END).astype(np.float32)
    ending = face >= END
    along = np.where(ending, u * END / camera.focal, face).astype(np.float32)
    side = np.where(ending, 2, (u > 0).astype(int))[0]
    index = np.empty(shape[1], int)
    for s in range(3):
        here = side == s
        index[here] = 16 * s + np.searchsorted(table["edges"][s], along[0, here]).clip(0, 15)

    y = (camera.height - v * face / camera.focal).astype(np.float32)
    top = table["height"][index].astype(np.float32)[None]
    hedge = table["hedge"][index][None]
    if hedge.any():  # leaves have no straight edge
        ragged = fractal_noise(rng, (1, shape[1]), 24, 4)
        top = np.where(hedge, top + 0.45 * ragged, top)
    ground, facade = y < 0, (y >= 0) & (y < top)
    sky = ~ground & ~facade
    flat = (camera.focal * camera.height / np.maximum(v, 0.5)).astype(np.float32)
    z = np.where(ground, flat, face)
    x = u * z / camera.focal
    np.maximum(y, 0, out=y)

    quarter = fractal_noise(rng, (128, 128), 6, 4) * 0.5
    # Mirrored, so that the texture repeats without a seam.
    texture = np.block([[quarter, quarter[:, ::-1]], [quarter[::-1], quarter[::-1, ::-1]]])
    street = Street(
        colour=np.zeros((*shape, 3), np.float32),
        glow=np.zeros((*shape, 3), np.float32),
        temperature=np.zeros(shape, np.float32),
        label=np.full(shape, ID["sky"], np.uint8),
        sunlit=np.ones(shape, np.float32),
        x=x,
        y=y,
        z=np.where(sky, 1e3, z).astype(np.float32),
    )
    _ground(rng, layout, street, ground, flat[:, 0], table, texture)
    _facades(rng, layout, street, facade, along[0], index, table, texture)
    _sky(rng, layout, street, sky, v, shape)
    street.temperature[~sky] += climate.air
    return street


def _ground(rng, layout: Layout, street: Street, ground, flat, table, texture) -> None:
    """Asphalt with its markings, kerbs and paving; sun where no house stands in its way."""
    rows = np.flatnonzero(ground.any(axis=1))
    part = slice(rows[0], rows[-1] + 1)
    ground, x, z = ground[part], street.x[part], flat[part, None]
    (left, right), day = layout.kerbs, not layout.climate.night
    road = (x > left) & (x < right)
    kerb = ~road & (x > left - 0.18) & (x < right + 0.18)
    grain = texture[(z * 24).astype(int) % 256, (x * 24).astype(int) % 256]
    patch = texture[(z * 2).astype(int) % 256, (x * 6).astype(int) % 256]
    near = np.exp(-z / 25)
    shade = np.where(road, np.float32(0.115), np.float32(0.26)) * (
        1 + 0.22 * grain * near + 0.07 * patch
    )
    joint = ((x % 0.8 < 0.05) | (z % 0.8 < 0.06)) & ~road & (z < 30)
    shade = np.where(joint, shade * 0.75, shade)
    shade = np.where(kerb, 0.38, shade)
    middle = (left + right) / 2
    paint = (np.abs(x - middle) < 0.08) & (z % 7.0 < 3.5)
    paint |= (np.abs(x - left - 2.1) < 0.06) | (np.abs(x - right + 2.1) < 0.06)
    if rng.random() < 0.4:  # a zebra crossing
        start = rng.uniform(8, 20)
        paint |= (z > start) & (z < start + 3) & (x % 1.0 < 0.5) & road
    worn = paint & (patch + 0.5 * grain < 0.9)
    shade = np.where(worn, 0.62, shade)
    tint = np.where(road[..., None], (0.98, 1.0, 1.03), (1.06, 1.0, 0.92)).astype(np.float32)
    warm = np.where(road, 6.0 if day else 4.0, 5.0 if day else 2.0)
    warm = warm + 0.5 * patch + 0.3 * grain * near - np.where(worn, 3.0 if day else 1.0, 0)
    ways = np.exp(-(((x - layout.kerbs[1] + 3.6) % 1.6 - 0.8) ** 2) / 0.1) * road
    warm = warm + 0.8 * ways  # tyres warm and polish their tracks
    street.colour[part][ground] = (shade[..., None] * tint)[ground]
    street.label[part][ground] = np.where(road, ID["road"], ID["pavement"])[ground]
    if day:
        sunny = _sunny_ground(layout, x, z, table)
        street.sunlit[part] = np.where(ground, sunny, 1)
        warm = warm - 6 * (1 - sunny)
    street.temperature[part][ground] = warm[ground]


def _sunny_ground(layout: Layout, x, z, table) -> np.ndarray:
    """1 where the sun reaches the ground, 0 in the shadow of the houses on its side."""
    slope = layout.climate.sun[0]
    side = 0 if slope > 0 else 1
    block = np.searchsorted(table["edges"][side], z[:, 0]).clip(0, 15) + 16 * side
    length = (table["height"][block] * abs(slope))[:, None] * 0.8
    away = np.abs(x - layout.walls[side])
    return np.clip((away - length) / 0.15 + 0.5, 0, 1).astype(np.float32)


def _facades(rng, layout: Layout, street: Street, facade, along, index, table, texture) -> None:
    """Walls with storeys of windows, shops on the ground floor, hedges."""
    night = layout.climate.night
    rows = np.flatnonzero(facade.any(axis=1))
    part = slice(rows[0], rows[-1] + 1)
    facade, y = facade[part], street.y[part]
    bay = along / table["bay"][index]
    column, storey = np.floor(bay).astype(int) % 64, (y / FLOOR).astype(int) % 16
    height = y / FLOOR - storey
    hedge, shop = table["hedge"][index][None], table["shop"][index][None]
    across = np.abs(bay % 1 - 0.5)
    pane = (across < table["pane"][index] / 2)[None] & (height > 0.3) & (height < 0.78)
    front = (storey == 0) & shop
    pane = np.where(front, (across < 0.44)[None] & (height > 0.15) & (height < 0.8), pane)
    top = table["height"][index][None]
    pane &= facade & ~hedge & (y < top - 0.7)
    frame = pane & ((across < 0.02)[None] | (np.abs(height - 0.6) < 0.015))
    ledge = (np.abs(height - 0.97) < 0.03) | (y > top - 0.35)
    grain = texture[(y * 20).astype(int) % 256, (along * 20).astype(int)[None] % 256]
    rough = np.where(hedge, np.float32(0.6), np.float32(0.13)) * grain
    wall = table["colour"][index].astype(np.float32)[None] * np.maximum(1 + rough, 0.15)[..., None]
    wall *= np.where(ledge & ~hedge, 1.25, 1)[..., None].astype(np.float32)
    glass = np.array((0.05, 0.065, 0.085) if night else (0.10, 0.13, 0.17), np.float32)
    glass = glass * (1 + 0.35 * rng.standard_normal((16, 64, 1)).astype(np.float32)).clip(0.3)
    lit = rng.random((16, 64)) < (0.2 if night else 0.0)
    tone = np.array(((1.0, 0.72, 0.38), (1.0, 0.85, 0.6), (0.75, 0.85, 1.0)), np.float32)
    tone = tone[rng.integers(3, size=(16, 64))] * rng.uniform(0.15, 0.75, (16, 64, 1))
    shown = pane & ~frame
    wall = np.where(shown[..., None], glass[storey, column[None]], wall)
    street.colour[part][facade] = wall[facade]
    bright = shown & (lit[storey, column[None]] | (front & night))
    inside = (0.75 + 0.25 * np.sin(5 * height)) * (1 + 0.3 * grain)
    street.glow[part][bright] = (tone[storey, column[None]] * inside[..., None])[bright]

    warm = np.where(hedge, 0.6, table["warmth"][index][None] + (0 if night else 3))
    warm = warm + np.where(hedge, 0.9, 0.25) * grain + np.where(ledge & ~hedge, 0.8, 0)
    warm = np.where(shown, warm - (2.5 if night else 5.0), warm)
    warm = np.where(bright, warm + 3.5, warm)
    if not night:
        faces_sun = (street.x[:1] * layout.climate.sun[0] > 0).astype(np.float32)
        street.sunlit[part] = np.where(facade, 0.85 * faces_sun, street.sunlit[part])
        warm = warm + 5 * faces_sun * (1 - 0.6 * hedge)
    street.temperature[part][facade] = warm[facade]
    kind = np.where(hedge, ID["vegetation"], ID["building"])
    street.label[part][facade] = np.broadcast_to(kind, facade.shape)[facade]


def _sky(rng, layout: Layout, street: Street, sky, v, shape) -> None:
    """A blue sky with clouds or a night sky above the city's glow; cold in infrared."""
    rise = np.clip(-v / layout.camera.focal, 0, 1.2)
    clouds = np.clip(fractal_noise(rng, shape, 3, 4) * 0.5 + rng.uniform(-0.5, 0.6), 0, 1)
    if layout.climate.night:
        low, high = np.array((0.030, 0.022, 0.018)), np.array((0.006, 0.008, 0.014))
        tint, cold = np.array((0.022, 0.018, 0.017)), 26.0
    else:
        low, high = np.array((0.80, 0.86, 0.92)), np.array((0.20, 0.40, 0.78))
        tint, cold = np.array((0.95, 0.96, 0.98)), 34.0
    fade = np.exp(-4.0 * rise)[..., None]
    colour = high + (low - high) * fade
    colour = colour + (tint - colour) * (0.8 * clouds)[..., None]
    street.colour[sky] = colour[sky]
    air = layout.climate.air
    degrees = air - 5 - cold * (1 - np.exp(-2.2 * rise)) + 8 * clouds
    street.temperature[sky] = degrees[sky]
