"""Aligned slices of one synthetic head: MRI beside CT, PET or SPECT.

An axial slice is drawn as soft tissue fractions from analytic distances to the skull, to the sulci
and to the ventricles; every modality is then a weighted sum of the same tissues, so the pair is
aligned by construction, as in the Whole Brain Atlas of Harvard Medical School.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from fusionkit.datasets.noise import quantize, smooth_noise

KINDS = ("ct", "pet", "spect")

TISSUES = ("scalp", "muscle", "bone", "marrow", "fluid", "gray", "white", "nuclei", "lesion", "rim")
# One value a tissue: signal for MRI, window-levelled Hounsfield units for CT, relative uptake for
# emission tomography (FDG in PET, a perfusion tracer in SPECT).
T1 = (0.88, 0.45, 0.07, 0.42, 0.10, 0.46, 0.74, 0.54, 0.30, 0.95)
T2 = (0.62, 0.30, 0.05, 0.33, 0.97, 0.60, 0.38, 0.44, 0.88, 0.55)
CT = (0.16, 0.36, 1.00, 0.86, 0.20, 0.42, 0.36, 0.43, 0.33, 0.52)
PET = (0.05, 0.09, 0.03, 0.05, 0.05, 0.95, 0.34, 0.92, 0.20, 1.20)
SPECT = (0.07, 0.09, 0.04, 0.05, 0.08, 0.90, 0.42, 0.88, 0.25, 1.10)

# Display palettes as equally spaced RGB stops from no uptake to the highest.
HOT = ((0, 0, 0), (0.45, 0, 0), (0.9, 0.15, 0), (1, 0.6, 0), (1, 0.95, 0.35), (1, 1, 1))
RAINBOW = ((0, 0, 0), (0.1, 0, 0.5), (0, 0.3, 0.95), (0, 0.75, 0.5), (0.5, 0.9, 0), (1, 0.8, 0),
           (1, 0.2, 0), (1, 0.9, 0.9))  # fmt: skip


def scene(rng: np.random.Generator, size: tuple[int, int], kind: str) -> dict[str, np.ndarray]:
    """`a` as CT (H, W) or as pseudo-coloured PET or SPECT (H, W, 3), and `b` as MRI (H, W)."""
    fractions, head = _anatomy(rng, size)
    side = min(size)
    mri = _mri(rng, _mix(fractions, T1 if rng.random() < 0.5 else T2), head)
    if kind == "ct":
        a = gaussian_filter(_mix(fractions, CT), side / 420)
        grain = gaussian_filter(rng.standard_normal(size, dtype=np.float32), side / 300)
        a = quantize((a + 0.03 * grain * head) * (head > 0.02))
    else:
        a = _emission(rng, fractions, kind)
    return {"a": a, "b": mri}


def _mix(fractions: np.ndarray, values: tuple[float, ...]) -> np.ndarray:
    return np.tensordot(np.array(values, np.float32), fractions, axes=1)


def _soft(distance: np.ndarray, pixel: float) -> np.ndarray:
    """Fraction of a pixel inside, from a signed distance (positive inside)."""
    return np.clip(distance / pixel + 0.5, 0, 1)


def _ellipse(x: np.ndarray, y: np.ndarray, centre: tuple, radii: tuple, tilt: float = 0.0):
    """Approximate signed distance to an ellipse, positive inside."""
    cos, sin = np.cos(tilt), np.sin(tilt)
    u, v = x - centre[0], y - centre[1]
    u, v = cos * u + sin * v, cos * v - sin * u
    return (1 - np.hypot(u / radii[0], v / radii[1])) * min(radii)


def _anatomy(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Tissue fractions (tissues, H, W), float32, in the order of TISSUES, and the head's mask.

    Coordinates: x to the patient's left, y from the forehead (-1) to the back (1).
    """
    side = min(size)
    pixel = 2.0 / side
    rows, columns = (np.arange(n, dtype=np.float32) - (n - 1) / 2 for n in size)
    tilt, zoom = rng.uniform(-0.06, 0.06), rng.uniform(0.96, 1.04)
    y, x = np.meshgrid(rows * pixel * zoom, columns * pixel * zoom, indexing="ij")
    x, y = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
    pixel *= zoom

    # The skull's outline in polar form: longer than wide, broader at the back, a little uneven.
    wide, long = rng.uniform(0.68, 0.75), rng.uniform(0.86, 0.92)
    angle = np.arctan2(y / long, x / wide)
    uneven = sum(
        rng.normal(0, 0.006) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in (2, 3, 4, 5)
    )
    breadth = 1 + 0.05 * np.sin(angle) * np.cos(angle) ** 2
    radius = np.hypot(x / wide, y / long) / (breadth + uneven)
    depth = (1 - radius) * (wide + (long - wide) * np.sin(angle) ** 2)  # below the skin

    scalp = rng.uniform(0.05, 0.065) + 0.008 * np.cos(2 * angle)
    skull = rng.uniform(0.06, 0.075) * (1 + 0.25 * np.abs(np.sin(angle)) ** 3)
    temple = 0.6 * np.exp(-(((np.abs(np.cos(angle)) - 0.93) / 0.07) ** 2))  # temporalis muscle
    brain = depth - scalp - skull - 0.012

    csf, gray_edge, fissure = _folds(rng, x, y, brain, angle)
    ventricle = _ventricles(rng, x, y)
    nuclei = np.full_like(x, -1.0)
    for sign in (-1, 1):
        wobble = rng.uniform(0.95, 1.05)
        for centre, radii, lean in (
            ((0.1, 0.12), (0.075, 0.12), 0.5),  # thalamus
            ((0.25, -0.07), (0.045, 0.15), -0.25),  # putamen
            ((0.125, -0.2), (0.035, 0.085), -0.3),  # head of the caudate nucleus
        ):
            place = (sign * centre[0] * wobble, centre[1])
            nuclei = np.maximum(nuclei, _ellipse(x, y, place, radii, -sign * lean))

    layers = np.zeros((len(TISSUES), *size), np.float32)

    def paint(name: str, cover: np.ndarray) -> None:
        layers[:] *= 1 - cover
        layers[TISSUES.index(name)] += cover * head

    head = _soft(depth, pixel)
    layers[TISSUES.index("scalp")] = head
    paint("muscle", _soft(depth - scalp * 0.35, pixel) * temple)
    paint("muscle", 0.5 * (_soft(depth, pixel) - _soft(depth - 0.012, pixel)))  # skin
    paint("bone", _soft(depth - scalp, pixel))
    marrow = np.minimum(depth - scalp - 0.3 * skull, scalp + 0.7 * skull - depth)
    paint("marrow", 0.8 * _soft(marrow, pixel))
    paint("fluid", _soft(depth - scalp - skull, pixel))
    paint("gray", _soft(csf, pixel))
    paint("white", _soft(gray_edge, 2 * pixel))
    paint("nuclei", 0.85 * _soft(nuclei, 2 * pixel))
    paint("fluid", _soft(np.maximum(ventricle, fissure), 1.5 * pixel))
    if rng.random() < 0.5:
        _lesion(rng, x, y, brain, pixel, paint)
    return layers, head


def _folds(rng: np.random.Generator, x, y, brain, angle):
    """Signed distances of the folded cortex: inside the pia, inside the white matter, fissure.

    Sulci are the zero lines of a noise that varies fast along the surface and slowly inwards; the
    noise over its own gradient is the distance to such a line.
    """
    turns, layers = 42, 9
    grid = rng.standard_normal((layers, turns)).astype(np.float32)
    grid = np.concatenate([grid, grid[:, :4]], axis=1)
    warp_a = smooth_noise(rng, x.shape, (9, 9)) * 0.55
    warp_d = smooth_noise(rng, x.shape, (9, 9)) * 0.035
    turn = (angle / (2 * np.pi) % 1.0) * turns + warp_a
    inward = np.clip((brain + warp_d) * 9, 0, layers - 2)
    noise = map_coordinates(grid, [inward, turn % turns + 1], order=2, mode="nearest")
    slope = np.hypot(*np.gradient(noise)) * (min(x.shape) / 2) + 1.5
    sulcus = np.abs(noise) / slope
    reach = rng.uniform(0.17, 0.22) * (1 + 0.35 * warp_a)
    width = rng.uniform(0.006, 0.011) * np.clip(1.3 - brain / reach, 0, 1.3)
    sulcus = sulcus - width + np.maximum(brain - reach, 0)  # no fold reaches the centre
    wave = 0.012 * np.sin(9 * y + rng.uniform(0, 6.3)) * np.clip(brain * 4, 0, 1)
    middle = np.abs(x - wave)
    falx = np.where((y > -0.36) & (y < 0.42), middle + 0.3, middle - 0.008)
    falx = np.minimum(falx, middle - 0.008 + 2.0 * np.clip(np.minimum(y + 0.36, 0.42 - y), 0, None))
    sylvius = np.full_like(x, 1.0)
    for sign in (-1, 1):
        bend = y - 0.02 - 0.25 * (sign * x - 0.45) + 0.05 * np.sin(14 * x + sign)
        along = np.maximum(0.36 - sign * x, 0)
        sylvius = np.minimum(sylvius, np.hypot(bend, along) - 0.014)
    pia = np.minimum(np.minimum(brain, sulcus), np.minimum(falx, sylvius))
    thick = 0.045 + 0.006 * warp_a
    fissure = -falx
    return pia, pia - thick, np.where(brain > 0, fissure, -1.0)


def _ventricles(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance inside the lateral ventricles' horns and the third ventricle."""
    scale = rng.uniform(0.75, 1.35)
    inside = _ellipse(x, y, (0, 0.06), (0.014 * scale, 0.1))
    for sign in (-1, 1):
        grow = scale * rng.uniform(0.9, 1.1)
        u = sign * x
        front = _ellipse(u - 0.5 * (y + 0.2) ** 2, y, (0.065, -0.2), (0.034 * grow, 0.13), 0.45)
        back = _ellipse(u + 0.9 * (y - 0.3) ** 2, y, (0.215, 0.32), (0.036 * grow, 0.15), -0.35)
        inside = np.maximum(inside, np.maximum(front, back))
    return inside


def _lesion(rng: np.random.Generator, x, y, brain, pixel, paint) -> None:
    """A round mass with an enhancing rim and swollen white matter, somewhere off the middle."""
    sign, turn = rng.choice((-1, 1)), rng.uniform(-1.2, 1.2)
    centre = (sign * 0.36 * np.cos(turn), 0.5 * np.sin(turn))
    size = rng.uniform(0.06, 0.12)
    ragged = smooth_noise(rng, x.shape, (12, 12)) * 0.018
    mass = _ellipse(x, y, centre, (size, size * rng.uniform(0.8, 1.2))) + ragged
    within = np.clip(brain / 0.05, 0, 1)
    paint("lesion", 0.45 * _soft(mass + 0.07 + ragged, 0.05) * within)
    paint("rim", _soft(mass, 2 * pixel) * within)
    paint("lesion", _soft(mass - 0.022, 2 * pixel) * within)


def _mri(rng: np.random.Generator, signal: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Receive-coil shading, point spread and Rician noise: (H, W) in [0, 1]."""
    shape, side = signal.shape, min(signal.shape)
    shading = 1 + 0.06 * smooth_noise(rng, shape, (2, 2))
    mottle = 1 + 0.03 * smooth_noise(rng, shape, (40, 40))
    signal = gaussian_filter(signal * shading * mottle, side / 450)
    real, imaginary = rng.standard_normal((2, *shape), dtype=np.float32) * 0.016
    noisy = np.hypot(signal + real, imaginary)
    # Viewers window the background to black.
    return quantize(np.where(head > 0, noisy, noisy * 0.4) - 0.01)


def _emission(rng: np.random.Generator, fractions: np.ndarray, kind: str) -> np.ndarray:
    """Uptake through the scanner's blur and counting noise, in false colour: (H, W, 3)."""
    shape, side = fractions.shape[1:], min(fractions.shape[1:])
    blur = side / 70 if kind == "pet" else side / 42
    uptake = _mix(fractions, PET if kind == "pet" else SPECT)
    regional = 1 + (0.09 if kind == "pet" else 0.13) * smooth_noise(rng, shape, (5, 5))
    uptake = gaussian_filter(uptake * regional, blur)
    cells = 60 if kind == "pet" else 36
    counts = smooth_noise(rng, shape, (cells, cells)) * np.sqrt(np.maximum(uptake, 0))
    uptake = uptake + (0.03 if kind == "pet" else 0.04) * counts
    level = np.clip(uptake / np.percentile(uptake, 99.7) - 0.03, 0, 1)
    palette = HOT if kind == "pet" and rng.random() < 0.5 else RAINBOW
    stops = np.linspace(0, 1, len(palette))
    colour = [np.interp(level, stops, channel) for channel in np.array(palette, float).T]
    return quantize(np.stack(colour, axis=-1))
