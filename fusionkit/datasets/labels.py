"""Label files of the public data sets: label maps, Pascal VOC boxes, YOLO boxes.

Every reader returns what an item gains: `labels` (H, W) int64, or `boxes` (N, 4) float32 (left,
top, right, bottom in pixels, right and bottom exclusive) and `classes` (N,) int64, both empty where
nothing is marked. What is wrong with a file is a ValueError that begins with its path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

# Annotation tools let a box end a pixel or two past the edge: so much is clipped, more refused.
SLACK = 2.0
IGNORED = 255  # of a label map: no class


def read_label_map(
    path: Path, classes: Sequence[str], size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """A picture whose gray levels, or palette indices, are the numbers of classes.

    Args:
        classes: names by number; pixels may also be 255, which stands for no class.
        size: (height, width) of the pair.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture of one channel, another size than the pair, unknown numbers.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            mode, array = picture.mode, np.asarray(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such label map") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not a readable label map ({error})") from error
    if array.ndim != 2:
        raise ValueError(
            f"{path}: a picture of mode {mode}; expected one channel of class numbers, not colours"
        )
    if array.shape != tuple(size):
        raise ValueError(
            f"{path}: label map is {array.shape[0]}×{array.shape[1]} but the pair is "
            f"{size[0]}×{size[1]}"
        )
    labels = array.astype(np.int64)
    unknown = np.setdiff1d(labels, [*range(len(classes)), IGNORED])
    if len(unknown):
        raise ValueError(
            f"{path}: numbers {', '.join(map(str, unknown[:10]))}; expected classes 0 to "
            f"{len(classes) - 1}, or {IGNORED}"
        )
    return {"labels": torch.from_numpy(labels)}


def read_boxes(
    path: Path, classes: Sequence[str], size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Boxes from Pascal VOC XML (`.xml`) or YOLO text (`.txt`), by the file's suffix.

    VOC: `object/name`, whatever its case, and `object/bndbox/{xmin,ymin,xmax,ymax}` as they stand.
    YOLO: a line for each object, `class centre-x centre-y width height`, in shares of the picture;
    an empty file is a picture without objects.

    Args:
        classes: names by number.
        size: (height, width) of the pair.

    Raises:
        FileNotFoundError: no such file.
        ValueError: malformed; another size than the pair; an unknown class; a box of no area, or
            one that leaves the picture by more than 2 pixels (less is clipped).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of boxes")
    read = _read_voc if path.suffix == ".xml" else _read_yolo
    try:
        found = read(path, classes, size)
    except (UnicodeDecodeError, ElementTree.ParseError) as error:
        raise ValueError(f"{path}: malformed ({error})") from error
    boxes = torch.tensor([box for box, _ in found], dtype=torch.float32).reshape(-1, 4)
    height, width = size
    limit = torch.tensor([width, height, width, height])
    clipped = boxes.clamp(min=torch.zeros(4), max=limit)
    far = (boxes - clipped).abs().amax(1) > SLACK
    flat = ~(clipped[:, 2:] > clipped[:, :2]).all(1)
    for wrong, complaint in ((far, f"leaves the {height}×{width} picture"), (flat, "has no area")):
        if wrong.any():
            box = ", ".join(f"{side:g}" for side in boxes[wrong][0].tolist())
            raise ValueError(f"{path}: box ({box}), left, top, right, bottom, {complaint}")
    numbers = torch.tensor([number for _, number in found], dtype=torch.int64)
    return {"boxes": clipped, "classes": numbers}


Found = list[tuple[list[float], int]]


def _read_voc(path: Path, classes: Sequence[str], size: tuple[int, int]) -> Found:
    root = ElementTree.parse(path).getroot()
    claimed = [_number(path, root, f"size/{side}", 0.0) for side in ("height", "width")]
    if all(claimed) and tuple(claimed) != tuple(size):
        raise ValueError(
            f"{path}: boxes for a picture of {claimed[0]:g}×{claimed[1]:g}, but the pair is "
            f"{size[0]}×{size[1]}"
        )
    numbers = {name.lower(): number for number, name in enumerate(classes)}
    found = []
    for element in root.iter("object"):
        name = (element.findtext("name") or "").strip()
        if name.lower() not in numbers:
            raise ValueError(f"{path}: object {name!r}; expected one of {', '.join(classes)}")
        sides = ("xmin", "ymin", "xmax", "ymax")
        box = [_number(path, element, f"bndbox/{side}") for side in sides]
        found.append((box, numbers[name.lower()]))
    return found


def _number(
    path: Path, element: ElementTree.Element, tag: str, default: float | None = None
) -> float:
    text = element.findtext(tag)
    if text is None and default is not None:
        return default
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{path}: {tag} of a {element.tag} is {text!r}; expected a number")
    return number


def _read_yolo(path: Path, classes: Sequence[str], size: tuple[int, int]) -> Found:
    height, width = size
    found = []
    for count, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            number, x, y, w, h = map(float, line.split())
        except ValueError:
            number = x = y = w = h = math.nan
        if not all(map(math.isfinite, (x, y, w, h))) or max(x, y, w, h) > 2:
            raise ValueError(
                f"{path}, line {count}: {line.strip()!r}; expected class, centre x and y, width "
                "and height, the last four as shares of the picture"
            )
        if number not in range(len(classes)):
            raise ValueError(
                f"{path}, line {count}: class {number:g}; expected 0 to {len(classes) - 1} "
                f"({', '.join(classes)})"
            )
        box = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
        found.append((box, int(number)))
    return found
