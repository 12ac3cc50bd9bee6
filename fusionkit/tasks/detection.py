"""Object detection: what all detectors share, and torchvision's lightest single-shot detector.

Source of the network: Liu et al., SSD: Single Shot MultiBox Detector, ECCV 2016, in the light form
of Howard et al., Searching for MobileNetV3, ICCV 2019. It stands in for YOLOv8n, which TDFusion
trains: `tasks.yolo` has that one, under a licence that not everybody can accept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

from fusionkit.tasks.base import PerceptionTask, as_rgb, entry, evaluating, picture_name

SCORES = {"mAP50": "map_50", "mAP75": "map_75", "mAP50:95": "map"}


class Detection(PerceptionTask):
    """Targets and scores of detectors; a subclass adds the network, `loss` and `predict`.

    A target has `boxes`, for each picture (N, 4): left, top, right, bottom in pixels of the fused
    picture, right and bottom exclusive; and `classes`, for each (N,) integers, indices of the
    task's classes. Pictures without a box have N = 0. `predict` gives for each picture a mapping
    `boxes` (N, 4), `classes` (N,) and `scores` (N,) in [0, 1], best first.
    """

    keys = ("boxes", "classes")

    def targets(
        self, target: Mapping[str, Any], fused: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The boxes (float32) and classes (int64) of each picture, checked, on its device.

        Raises:
            ValueError: an entry is missing; boxes that are not (N, 4), of no area or outside the
                picture; classes of another number or out of range. The message names the picture.
        """
        height, width = fused.shape[-2:]
        limit = torch.tensor([width, height, width, height])
        checked = []
        lists = (entry(target, key, len(fused)) for key in self.keys)
        for index, (boxes, classes) in enumerate(zip(*lists, strict=True)):
            name = picture_name(target, index)
            boxes, classes = boxes.detach().float().cpu(), classes.detach().cpu()
            if boxes.ndim != 2 or boxes.shape[1] != 4 or classes.shape != boxes.shape[:1]:
                raise ValueError(
                    f"{name}: boxes {tuple(boxes.shape)} and classes {tuple(classes.shape)}; "
                    "expected (N, 4) and (N,)"
                )
            flat = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
            outside = ~((boxes >= 0) & (boxes <= limit + 1e-3)).all(1)
            for wrong, complaint in ((flat, "has no area"), (outside, f"leaves {height}×{width}")):
                if wrong.any():
                    box = ", ".join(f"{side:g}" for side in boxes[wrong][0].tolist())
                    raise ValueError(
                        f"{name}: box ({box}) {complaint}; expected left < right and "
                        "top < bottom, in pixels inside the picture"
                    )
            strange = classes[(classes < 0) | (classes >= len(self.classes))]
            if classes.is_floating_point() or len(strange):
                raise ValueError(
                    f"{name}: classes {strange.unique().tolist() or classes.dtype}; expected "
                    f"integers from 0 to {len(self.classes) - 1}"
                )
            checked.append((boxes.to(fused.device), classes.long().to(fused.device)))
        return checked

    def score(
        self,
        predictions: Iterable[Sequence[Mapping[str, torch.Tensor]]],
        targets: Iterable[Mapping[str, Any]],
    ) -> dict[str, float]:
        """COCO's average precision in [0, 1]: `mAP50`, `mAP75`, `mAP50:95`, `AP50:95/NAME`.

        The number is the overlap (IoU, in percent) from which a box counts as found; 50:95 is the
        mean over 50, 55, …, 95. At most 100 boxes a picture count. Classes without any box in the
        targets have no precision (NaN), and the means are over the others.
        """
        metric = MeanAveragePrecision(class_metrics=True, backend="pycocotools")
        metric.warn_on_many_detections = False
        for predicted, target in zip(predictions, targets, strict=True):
            truth = zip(*(entry(target, key, len(predicted)) for key in self.keys), strict=True)
            metric.update(
                [
                    {
                        "boxes": p["boxes"].cpu(),
                        "scores": p["scores"].cpu(),
                        "labels": p["classes"].cpu(),
                    }
                    for p in predicted
                ],
                [{"boxes": boxes.cpu(), "labels": classes.cpu()} for boxes, classes in truth],
            )
        found = metric.compute()
        scores = {name: found[key].item() for name, key in SCORES.items()}
        scores |= dict.fromkeys((f"AP50:95/{name}" for name in self.classes), math.nan)
        for index, value in zip(
            found["classes"].reshape(-1).tolist(),
            found["map_per_class"].reshape(-1).tolist(),
            strict=True,
        ):
            scores[f"AP50:95/{self.classes[index]}"] = value
        return {name: math.nan if value < 0 else value for name, value in scores.items()}


def resize_boxes(
    boxes: Sequence[torch.Tensor], size: tuple[int, int], new_size: tuple[int, int]
) -> list[torch.Tensor]:
    """Boxes (N, 4) of pictures of `size` (height, width), after these are resized to `new_size`."""
    across, down = new_size[1] / size[1], new_size[0] / size[0]
    return [each * each.new_tensor([across, down, across, down]) for each in boxes]


class SSDLite(Detection):
    """SSD-lite on MobileNetV3-large, random weights: 2.2 million parameters at width 1.

    The loss is the sum of its two: smooth L1 of the boxes and cross-entropy of the classes, with
    three of the hardest negatives for each default box that matches an object. A batch without
    any box thus has no negatives either: its loss is 0, with gradients of 0. MobileNetV3's hard
    sigmoid has no second derivative in PyTorch: a step of this network cannot be differentiated
    through, while the loss after such a step can.

    Args:
        classes: names of the classes.
        size: the picture is resized to a square of this side.
        width: channels of the backbone, as a share of MobileNetV3-large's.
        smallest: side of the smallest default boxes, as a share of the picture's; 0.2 is
            torchvision's. Objects much smaller than that are seldom found.
    """

    def __init__(
        self, classes: Sequence[str], size: int = 320, width: float = 1.0, smallest: float = 0.2
    ) -> None:
        super().__init__(classes)
        if size < 64 or not 0 < width <= 4 or not 0 < smallest < 0.95:
            raise ValueError(
                f"size {size}, width {width}, smallest {smallest}; expected at least 64, a share "
                "in (0, 4] and one in (0, 0.95)"
            )
        self.network = ssdlite320_mobilenet_v3_large(
            weights=None,
            weights_backbone=None,
            num_classes=len(self.classes) + 1,  # 0 is the background
            width_mult=width,
            # torchvision's momentum of 0.03 leaves the statistics behind the weights for hundreds
            # of steps, in which evaluation finds nothing.
            norm_layer=partial(nn.BatchNorm2d, eps=0.001, momentum=0.1),
        )
        # The network is fully convolutional: 320 is only what its transform resizes to.
        self.network.transform.fixed_size = (size, size)
        levels = len(self.network.anchor_generator.aspect_ratios)
        self.network.anchor_generator = DefaultBoxGenerator(
            [[2, 3]] * levels, min_ratio=smallest, max_ratio=0.95
        )

    def loss(self, fused: torch.Tensor, target: Mapping[str, Any]) -> torch.Tensor:
        pictures = list(as_rgb(fused))
        truth = [{"boxes": b, "labels": c + 1} for b, c in self.targets(target, fused)]
        # torchvision gives losses in training mode only. The flag of the outermost module decides
        # that, and the parts keep theirs, so that batch norm does as the task's mode says.
        training = self.network.training
        self.network.training = True
        try:
            losses = self.network(pictures, truth)
        finally:
            self.network.training = training
        return sum(losses.values())

    def predict(self, fused: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """At most 300 boxes a picture, overlapping ones of a class thinned out."""
        with evaluating(self):
            found = self.network(list(as_rgb(fused)))
        return [
            {"boxes": f["boxes"], "classes": f["labels"] - 1, "scores": f["scores"]} for f in found
        ]
