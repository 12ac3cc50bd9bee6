"""YOLOv8n through ultralytics: the detector of TDFusion. Optional, and under another licence.

ultralytics is licensed under the AGPL-3.0 (or bought from its makers). fusionkit neither contains
nor requires it; `pip install 'fusionkit[yolo]'` fetches it, and nothing imports it until a `YOLOv8`
is built. Whoever passes on a program that uses this class, or offers it over a network, has the
AGPL's duties. On import, ultralytics writes a settings file into the user's configuration folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_convert, clip_boxes_to_image

from fusionkit.tasks.base import as_rgb, evaluating
from fusionkit.tasks.detection import Detection

STRIDE = 32  # the coarsest of its three grids
LEAST_SCORE, OVERLAP, MOST_BOXES = 0.001, 0.7, 300  # as ultralytics evaluates
GRAY = 114 / 255  # its colour for margins


class YOLOv8(Detection):
    """YOLOv8 with random weights, 3.0 million parameters as "n", and its loss.

    The loss is the sum of ultralytics' three (boxes, classes, distances), with its own weights, a
    picture. A batch without any box has a loss: that of seeing none.

    Args:
        classes: names of the classes.
        variant: the size: "n", "s", "m", "l" or "x".

    Raises:
        ImportError: ultralytics is not installed.
        ValueError: unknown variant; in `loss`, what `Detection.targets` finds.
    """

    def __init__(self, classes: Sequence[str], variant: str = "n") -> None:
        super().__init__(classes)
        if variant not in ("n", "s", "m", "l", "x"):
            raise ValueError(f"variant {variant!r}; expected one of n, s, m, l, x")
        try:
            from ultralytics.cfg import get_cfg
            from ultralytics.nn.tasks import DetectionModel
        except ImportError as error:
            raise ImportError(
                "YOLOv8 needs ultralytics, which is under the AGPL-3.0: read the note in "
                "fusionkit.tasks.yolo, then pip install 'fusionkit[yolo]'; or use "
                "fusionkit.tasks.detection.SSDLite"
            ) from error
        count = len(self.classes)
        self.network = DetectionModel(f"yolov8{variant}.yaml", ch=3, nc=count, verbose=False)
        self.network.args = get_cfg()  # the weights of its losses
        # A few weights are constants: as buffers, so that `parameters()` are what is trained.
        for part in list(self.network.modules()):
            for name, weight in list(part.named_parameters(recurse=False)):
                if not weight.requires_grad:
                    delattr(part, name)
                    part.register_buffer(name, weight.detach())

    def loss(self, fused: torch.Tensor, target: Mapping[str, Any]) -> torch.Tensor:
        pictures = _pad(as_rgb(fused))
        height, width = pictures.shape[-2:]
        truth = self.targets(target, fused)
        boxes = box_convert(torch.cat([boxes for boxes, _ in truth]), "xyxy", "cxcywh")
        counts = torch.tensor([len(boxes) for boxes, _ in truth])
        batch = {
            "img": pictures,
            "bboxes": boxes / boxes.new_tensor([width, height, width, height]),
            "cls": torch.cat([classes for _, classes in truth])[:, None].float(),
            "batch_idx": torch.arange(len(truth)).repeat_interleave(counts).to(boxes),
        }
        losses, _ = self.network.loss(batch)  # it has multiplied them by the batch's size
        return losses.sum() / len(fused)

    def predict(self, fused: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """At most 300 boxes a picture, overlapping ones of a class thinned out."""
        with evaluating(self):
            out, *_ = self.network(_pad(as_rgb(fused)))  # (B, 4 + classes, places)
        found = []
        for boxes, likely in zip(out[:, :4].mT, out[:, 4:].mT, strict=True):
            scores, classes = likely.max(dim=1)
            seen = scores > LEAST_SCORE
            boxes, scores, classes = boxes[seen], scores[seen], classes[seen]
            boxes = clip_boxes_to_image(box_convert(boxes, "cxcywh", "xyxy"), fused.shape[-2:])
            kept = batched_nms(boxes, scores, classes, OVERLAP)[:MOST_BOXES]
            found.append({"boxes": boxes[kept], "classes": classes[kept], "scores": scores[kept]})
        return found


def _pad(pictures: torch.Tensor) -> torch.Tensor:
    """Gray margins to the right and below, up to multiples of the coarsest stride."""
    height, width = pictures.shape[-2:]
    return F.pad(pictures, (0, -width % STRIDE, 0, -height % STRIDE), value=GRAY)
