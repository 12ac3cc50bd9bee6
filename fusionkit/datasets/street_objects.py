"""What stands in a street: cars, persons, trees and lamps, as polygons in three dimensions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fusionkit.datasets.street_canvas import DARK, Canvas, Climate

CAR_COLOURS = ((0.6, 0.6, 0.62), (0.03, 0.03, 0.035), (0.25, 0.27, 0.3), (0.35, 0.03, 0.03),
               (0.04, 0.08, 0.25), (0.7, 0.68, 0.62), (0.1, 0.12, 0.12),
               (0.2, 0.16, 0.1))  # fmt: skip


def car(canvas: Canvas, rng, climate: Climate, x: float, z: float, rear: bool, driving: bool,
        instance: int, beam: float = 14.0) -> None:  # fmt: skip
    """A saloon, its near end at depth z, seen from the rear or (rear=False) from the front."""
    paint = np.array(CAR_COLOURS[rng.integers(len(CAR_COLOURS))]) * rng.uniform(0.8, 1.1)
    half, length, roof = rng.uniform(0.86, 0.93), rng.uniform(4.0, 4.7), rng.uniform(1.42, 1.55)
    waist = 0.62 * roof
    sign = -1.0 if x > 0 else 1.0  # the side that faces the camera's axis
    flank = x + sign * half
    sunny = 0.0 if climate.night else 5.0 + 5.0 * (1 - paint.mean())
    body = climate.air + sunny - (1.5 if climate.night else 0.0)
    heat = 1.0 if driving else 0.0

    def part(colour, degrees, glow=DARK):
        return canvas.part(colour, degrees, "car", instance, (x, 0.6, z), glow)

    def end(points, number, depth=0.0):
        canvas.polygon([(x + px * half, py, z + depth) for px, py in points], number)

    def side(points, number):
        canvas.polygon([(flank, py, z + pz * length) for pz, py in points], number)

    near_x, far_x = x - half * 0.95, x + half * 0.95
    canvas.cast([(near_x, z - 0.15), (far_x, z - 0.15), (far_x, z + length), (near_x, z + length)])
    if not climate.night:
        dx, dz = climate.sun[0] * roof, climate.sun[1] * roof
        canvas.cast([(near_x + dx, z + dz), (far_x + dx, z + dz), (far_x + dx, z + length + dz),
                     (near_x + dx, z + length + dz)])  # fmt: skip
        for edge in (near_x, far_x):
            canvas.cast([(edge, z), (edge + dx, z + dz), (edge + dx, z + length + dz),
                         (edge, z + length)])  # fmt: skip

    bonnet = body + 13 * heat * (not rear)
    tyre = part((0.012,) * 3, climate.air + 15 * heat + 0.4 * sunny)
    glass = part((0.02, 0.025, 0.03), body - 4 + 5 * heat - 0.4 * sunny)
    lid, top = part(paint * 1.25, bonnet), part(paint * 1.35, body)
    flank_paint, end_paint = part(paint * 0.72, body + 2 * heat), part(paint, body + 3 * heat)
    pillar = part(paint * 0.6, body)
    dark = part((0.01,) * 3, climate.air + 16 * heat)

    # Cabin: the screen leans back from the waist to the roof; the front's bonnet is the longer.
    start, screen, back, finish = (0.1, 0.24, 0.62, 0.82) if rear else (0.27, 0.43, 0.78, 0.92)
    canvas.polygon([(x - half, waist, z), (x + half, waist, z), (x + half, waist, z + length),
                    (x - half, waist, z + length)], lid)  # fmt: skip
    inset = half * 0.78
    foot, head = z + start * length, z + screen * length
    cheek = x + sign * inset
    canvas.polygon([(flank, waist, foot), (cheek, roof, head), (cheek, roof, z + back * length),
                    (flank, waist, z + finish * length)], pillar)  # fmt: skip
    for lo, hi in ((0.06, 0.46), (0.54, 0.92)):  # side windows
        low = [start + (finish - start) * t for t in (lo + 0.04, hi)]
        high = [screen + (back - screen) * t for t in (lo, hi)]
        rise = [(low[0], 0.1), (high[0], 0.85), (high[1], 0.85), (low[1], 0.1)]
        canvas.polygon([(flank + (cheek - flank) * t, waist + (roof - waist) * t, z + pz * length)
                        for pz, t in rise], glass)  # fmt: skip
    canvas.polygon([(x - half * 0.95, waist, foot), (x + half * 0.95, waist, foot),
                    (x + inset, roof, head), (x - inset, roof, head)], pillar)  # fmt: skip
    canvas.polygon([(x - half * 0.84, waist + 0.04, foot), (x + half * 0.84, waist + 0.04, foot),
                    (x + inset * 0.92, roof - 0.07, head - 0.02),
                    (x - inset * 0.92, roof - 0.07, head - 0.02)], glass)  # fmt: skip
    canvas.polygon([(x - inset, roof, head), (x + inset, roof, head),
                    (x + inset, roof + 0.03, z + back * length),
                    (x - inset, roof + 0.03, z + back * length)], top)  # fmt: skip

    side([(0, 0.3), (0.0, waist - 0.05), (0.02, waist), (0.96, waist), (1, 0.75 * waist),
          (1, 0.3), (0.9, 0.2), (0.1, 0.2)], flank_paint)  # fmt: skip
    turn = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    rim = part((0.3, 0.3, 0.32), climate.air + 9 * heat + 0.3 * sunny)
    for hub in (0.19, 0.81):
        for radius, number in ((0.37, dark), (0.33, tyre), (0.2, rim)):
            side([(hub + radius * np.cos(t) / length, 0.33 + radius * np.sin(t)) for t in turn],
                 number)  # fmt: skip

    end([(-0.92, 0.05), (-0.66, 0.05), (-0.66, 0.45), (-0.92, 0.45)], tyre, 0.25)
    end([(0.66, 0.05), (0.92, 0.05), (0.92, 0.45), (0.66, 0.45)], tyre, 0.25)
    end([(-0.66, 0.18), (0.66, 0.18), (0.66, 0.4), (-0.66, 0.4)], dark, 0.1)
    end([(-0.97, 0.3), (-1, 0.5), (-0.96, waist - 0.08), (-0.88, waist), (0.88, waist),
         (0.96, waist - 0.08), (1, 0.5), (0.97, 0.3), (0.9, 0.22), (-0.9, 0.22)],
        end_paint)  # fmt: skip
    bumper = part(paint * 0.7, body + 4 * heat)
    end([(-0.98, 0.26), (-0.99, 0.46), (0.99, 0.46), (0.98, 0.26)], bumper, -0.02)
    lit = climate.night and driving
    if rear:
        lamp = part((0.3, 0.01, 0.01), body + 4 * heat, (2.6, 0.1, 0.05) if lit else DARK)
        pipe = part((0.02,) * 3, climate.air + 45 * heat + 5)
        end([(0.5, 0.24), (0.64, 0.24), (0.64, 0.33), (0.5, 0.33)], pipe, -0.03)
    else:
        white = tuple(beam * c for c in (1.0, 0.95, 0.82))
        lamp = part((0.65, 0.65, 0.62), body + 16 * heat, white if lit else DARK)
        grille = part((0.02,) * 3, climate.air + 26 * heat + sunny * 0.5)
        end([(-0.5, 0.48), (0.5, 0.48), (0.55, 0.7), (-0.55, 0.7)], grille, -0.03)
    plate = part((0.75, 0.72, 0.6), body, (0.25, 0.24, 0.2) if lit and rear else DARK)
    low, high = (0.55, 0.67) if rear else (0.34, 0.45)
    end([(-0.28, low), (0.28, low), (0.28, high), (-0.28, high)], plate, -0.04)
    for s in (-1, 1):
        end([(s * 0.62, 0.6), (s * 0.96, 0.58), (s * 0.94, 0.76), (s * 0.64, 0.74)], lamp, -0.04)


def person(canvas: Canvas, rng, climate: Climate, x: float, z: float, instance: int) -> None:
    """A pedestrian in mid-step, in profile or seen from the front or the back."""
    tall = rng.uniform(1.58, 1.88)
    bright = rng.random() < 0.3
    coat = rng.uniform(0.15, 0.6, 3) if bright else rng.uniform(0.008, 0.05, 3)
    trousers = rng.uniform(0.008, 0.06, 3) * (1, 1, 1.5)
    skin = np.array((0.5, 0.32, 0.23)) * rng.choice((0.35, 0.7, 1.0))
    # Clothes lie between the skin's temperature and the air's; a coat holds back more than jeans.
    sunny = 0.0 if climate.night else 5.0
    leak = 33 - climate.air
    part = lambda colour, share: canvas.part(  # noqa: E731
        colour, climate.air + share * leak + sunny, "person", instance, (x, 1.0, z)
    )
    profile = rng.random() < 0.6
    face = rng.choice((-1.0, 1.0))
    stride = rng.uniform(0.12, 0.42) if profile else rng.uniform(0.05, 0.12)
    width = 0.78 if profile else 1.0

    def limb(points, radii, number):
        """Tapered capsules through points in units of the body's height."""
        turn = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        ring = np.stack([np.cos(turn), np.sin(turn)], axis=1)
        for (p, q), (r, s) in zip(pairwise(points), pairwise(radii), strict=True):
            p, q = np.array(p), np.array(q)
            along = q - p
            ahead = ring @ along > 0
            rim = np.where(ahead[:, None], q + s * ring, p + r * ring)
            order = np.argsort(np.arctan2(*(rim - (p + q) / 2).T[::-1]))
            world = [(x + face * tall * px, tall * py, z) for px, py in rim[order]]
            canvas.polygon(world, number)

    hip, knee, ankle = 0.5, 0.28, 0.04
    shade, shoe = part(trousers, 0.48), part((0.02, 0.015, 0.012), 0.22)
    for side in (-1, 1):
        foot = side * stride * 0.5
        lift = 0.03 if side < 0 else 0.0
        splay = 0.0 if profile else side * 0.035
        joint = (foot * 0.45 + 0.02 * profile + splay, knee + 0.01)
        limb([(splay, hip), joint, (foot + splay, ankle + lift)], (0.052, 0.04, 0.026), shade)
        toe = 0.07 if profile else 0.0
        limb([(foot + splay, 0.025 + lift), (foot + splay + toe, 0.02)], (0.025, 0.02), shoe)
    jacket, sleeve, hand = part(coat, 0.6), part(coat * 0.8, 0.54), part(skin, 0.86)
    arms = []
    for side in (-1, 1):
        swing = -side * stride * 0.45
        shoulder = (0.0 if profile else side * 0.105, 0.79)
        elbow = (shoulder[0] * 1.15 + swing * 0.4, 0.63)
        wrist = (shoulder[0] * 1.1 + swing + 0.03 * profile, 0.5)
        arms.append((shoulder, elbow, wrist))
    for number, (shoulder, elbow, wrist) in enumerate(arms):
        if number == 1:  # the trunk lies between the far arm and the near one
            trunk = [(0.0, 0.49), (0.0, 0.64), (0.01 * profile, 0.77)]
            limb(trunk, (0.078 * width, 0.08 * width, 0.09 * width), jacket)
        limb([shoulder, elbow, wrist], (0.036, 0.03, 0.024), sleeve)
        limb([wrist, (wrist[0], wrist[1] - 0.03)], (0.021, 0.019), hand)
    head, hair = part(skin, 0.97), part((0.03, 0.02, 0.012), 0.62)
    limb([(0.01, 0.82), (0.015, 0.87)], (0.03, 0.03), head)
    limb([(0.02, 0.905), (0.02, 0.945)], (0.046, 0.05), hair)
    if profile or rng.random() < 0.5:
        limb([(0.028 if profile else 0.02, 0.895), (0.03 if profile else 0.02, 0.93)],
             (0.038, 0.04), head)  # fmt: skip
    canvas.cast([(x - 0.2, z - 0.1), (x + 0.2, z - 0.1), (x + 0.2, z + 0.15), (x - 0.2, z + 0.15)])
    if not climate.night:
        dx, dz = (tall * s for s in climate.sun)
        canvas.cast(
            [(x - 0.12, z), (x + 0.12, z), (x + dx + 0.15, z + dz), (x + dx - 0.15, z + dz)]
        )


def tree(canvas: Canvas, rng, climate: Climate, x: float, z: float) -> None:
    """A street tree: a forked trunk and a crown of leaf clumps, darker beneath than above."""
    tall, crown = rng.uniform(5.0, 7.2), rng.uniform(1.7, 2.5)
    place = (x, tall * 0.6, z)
    bark = canvas.part((0.07, 0.05, 0.035), climate.air + 1, "vegetation", 0, (x, 1.0, z))
    split = tall - 1.6 * crown
    for lean, foot, top, r in ((0, 0, split + 0.4, 0.14), (-0.7, split, tall - 0.9 * crown, 0.07),
                               (0.8, split, tall - 0.7 * crown, 0.06)):  # fmt: skip
        canvas.polygon([(x - r, foot, z), (x + r, foot, z), (x + lean + r * 0.7, top, z),
                        (x + lean - r * 0.7, top, z)], bark)  # fmt: skip
    green = np.array((0.10, 0.17, 0.035)) * rng.uniform(0.7, 1.2) * (rng.uniform(0.7, 1.5), 1, 1)
    tones = [canvas.part(green * tone, climate.air + warm, "vegetation", 0, place)
             for tone, warm in ((0.4, 0.3), (0.7, 0.9), (1.0, 1.6), (1.5, 2.2))]  # fmt: skip
    clumps = int(np.clip(4500 / z, 70, 380))
    turn = rng.uniform(0, 2 * np.pi, clumps)
    lobes = 0.86 + 0.1 * np.sin(3 * turn + rng.uniform(0, 6)) + 0.06 * np.sin(7 * turn)
    out = np.sqrt(rng.random(clumps)) * lobes
    spread = np.stack([out * np.cos(turn), 0.9 * out * np.sin(turn)], axis=1)
    light = spread[:, 1] * 1.5 - spread[:, 0] * 0.5 * np.sign(climate.sun[0])
    tone = np.clip(np.rint(light + 1.4 + rng.normal(0, 0.7, clumps)), 0, 3).astype(int)
    order = np.argsort(tone + rng.random(clumps))
    radii = crown * rng.uniform(0.4, 1.0, clumps) * (0.17 - 0.11 * out)
    centres = np.stack(
        [x + crown * spread[:, 0], tall - 0.8 * crown + crown * spread[:, 1], np.full(clumps, z)], 1
    )
    canvas.discs(centres[order], radii[order], [tones[t] for t in tone[order]])
    if not climate.night:
        dx, dz = (s * (tall - crown) for s in climate.sun)
        turn = np.linspace(0, 6.28, 20)
        ragged = crown * rng.uniform(0.6, 1.1, 20)
        canvas.cast([(x + dx + r * np.cos(t), z + dz + r * np.sin(t))
                     for t, r in zip(turn, ragged, strict=True)])  # fmt: skip


def lamp(canvas: Canvas, climate: Climate, x: float, z: float, arm: float, glow, instance: int):
    """A street lamp with an arm over the road; returns the place of its light."""
    steel = canvas.part((0.09, 0.1, 0.1), climate.air + (0 if climate.night else 7), "lamp",
                        instance, (x, 3.0, z))  # fmt: skip
    tall = 6.3
    for (x0, y0), (x1, y1), r in (
        ((x, 0), (x, tall), 0.07),
        ((x, tall), (x + arm, tall + 0.25), 0.05),
    ):
        canvas.polygon([(x0 - r, y0 - r, z), (x0 + r, y0 - r, z), (x1 + r, y1 + r, z),
                        (x1 - r, y1 + r, z)], steel)  # fmt: skip
    light = (x + arm, tall + 0.15, z)
    head = canvas.part((0.5, 0.5, 0.48), climate.air + (22 if climate.night else 6), "lamp",
                       instance, light, glow)  # fmt: skip
    canvas.polygon([(light[0] + px, light[1] + py, z) for px, py in
                    ((-0.36, 0), (-0.26, 0.16), (0.26, 0.16), (0.36, 0))], head)  # fmt: skip
    return light
