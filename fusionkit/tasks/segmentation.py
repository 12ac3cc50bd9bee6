"""Semantic segmentation: what all networks for it share, and SegFormer.

Source of the network: Xie et al., SegFormer: Simple and Efficient Design for Semantic Segmentation
with Transformers, NeurIPS 2021, as Hugging Face transformers has it. TDFusion (CVPR 2025) trains
its smallest, mit-b0, from scratch beside the fusion network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.transforms.functional import normalize
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from fusionkit.names import check_name
from fusionkit.tasks.base import PerceptionTask, as_rgb, entry, evaluating, picture_name

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
ATTENTION = "eager"  # the fused kernels have no second derivative, which meta-learning may want
# What differs from transformers' defaults, which are mit-b0's. `tiny` learns the embedded street
# scenes on a CPU within minutes; its drop path is off, as there is little to drop.
VARIANTS = {
    "tiny": {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [16, 32, 48, 64],
        "num_attention_heads": [1, 2, 3, 4],
        "decoder_hidden_size": 64,
        "drop_path_rate": 0.0,
    },
    "b0": {},
    "b1": {"hidden_sizes": [64, 128, 320, 512]},
}


class Segmentation(PerceptionTask):
    """Cross-entropy and scores of label maps; a subclass adds the network and `logits`.

    A target has `labels`, (B, h, w) integers: indices of `classes`, or `ignore_index`. They may be
    larger or smaller than the fused picture if they show the same field.

    Args:
        classes: names of the classes.
        ignore_index: pixels of this number count neither in the loss nor in the scores.

    Raises:
        ValueError: `ignore_index` is a class; in `loss` and `score`, labels that are missing, no
            integers, of another field, or out of range.
    """

    keys = ("labels",)

    def __init__(self, classes: Sequence[str], ignore_index: int = 255) -> None:
        super().__init__(classes)
        self.ignore_index = ignore_index
        count = len(self.classes)
        if 0 <= ignore_index < count:
            raise ValueError(
                f"ignore_index {ignore_index} is class {self.classes[ignore_index]!r}"
                f"; expected a number outside 0 to {count - 1}"
            )

    def logits(self, fused: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """(B, classes, *size), by default of the picture's size."""
        raise TypeError(f"{type(self).__name__} defines no logits")

    def loss(self, fused: torch.Tensor, target: Mapping[str, Any]) -> torch.Tensor:
        """Mean cross-entropy over the labelled pixels; 0 if there are none."""
        labels = self._labels(target, len(fused)).to(fused.device)
        _check_field(labels, fused, target)
        logits = self.logits(fused, labels.shape[-2:])
        total = F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")
        return total / (labels != self.ignore_index).sum().clamp(min=1)

    def predict(self, fused: torch.Tensor) -> torch.Tensor:
        """The likeliest class of each pixel, (B, H, W) int64."""
        with evaluating(self):
            return self.logits(fused).argmax(dim=1)

    def score(
        self, predictions: Iterable[torch.Tensor], targets: Iterable[Mapping[str, Any]]
    ) -> dict[str, float]:
        """`mIoU` and `mAcc`, and `IoU/NAME` for each class, all in [0, 1], over all pictures.

        IoU is the intersection over the union, the accuracy of a class its recall. As is usual,
        a class that neither labels nor predictions hold has no IoU (NaN), one that the labels do
        not hold has no accuracy, and the means are over the others. Predictions (B, H, W) of
        another size than the labels take the nearest pixel's.
        """
        matrix = MulticlassConfusionMatrix(len(self.classes), ignore_index=self.ignore_index)
        for predicted, target in zip(predictions, targets, strict=True):
            labels = self._labels(target, len(predicted))
            _check_field(labels, predicted, target)
            resized = F.interpolate(predicted[:, None].float(), labels.shape[-2:], mode="nearest")
            matrix.update(resized[:, 0].long().cpu(), labels.cpu())
        confusion = matrix.compute().double()  # rows are labels, columns predictions
        hits, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
        iou = hits / (labelled + predicted - hits)
        scores = {"mIoU": iou.nanmean().item(), "mAcc": (hits / labelled).nanmean().item()}
        names = [f"IoU/{name}" for name in self.classes]
        return scores | dict(zip(names, iou.tolist(), strict=True))

    def _labels(self, target: Mapping[str, Any], count: int) -> torch.Tensor:
        labels = entry(target, "labels", count)
        if labels.ndim != 3 or labels.is_floating_point():
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} and {labels.dtype}; expected integers "
                "(B, h, w)"
            )
        labels = labels.long()
        known = (labels >= 0) & (labels < len(self.classes)) | (labels == self.ignore_index)
        if not known.all():
            index = int((~known).flatten(1).any(1).nonzero()[0])
            strange = labels[index][~known[index]].unique().tolist()
            raise ValueError(
                f"{picture_name(target, index)}: labels {strange}; expected 0 to "
                f"{len(self.classes) - 1}, or {self.ignore_index} for none"
            )
        return labels


class SegFormer(Segmentation):
    """SegFormer; its logits, a quarter of the picture's size, are resized bilinearly.

    Args:
        classes, ignore_index: as in `Segmentation`.
        variant: "tiny", "b0" or "b1", with random weights.
        pretrained: a folder, or a name on the Hugging Face hub such as "nvidia/mit-b0" (NVIDIA's
            weights are for non-commercial use), in the place of `variant`. A head for another
            number of classes starts from random weights.

    Raises:
        ValueError: unknown variant, `pretrained` that holds no SegFormer.
    """

    def __init__(
        self,
        classes: Sequence[str],
        variant: str = "b0",
        pretrained: str | os.PathLike | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(classes, ignore_index)
        names = {"id2label": dict(enumerate(self.classes))}
        names["label2id"] = {name: number for number, name in enumerate(self.classes)}
        if pretrained is None:
            options = VARIANTS[check_name(variant, VARIANTS, "variant")]
            config = SegformerConfig(**names, **options, attn_implementation=ATTENTION)
            self.network = SegformerForSemanticSegmentation(config)
        else:
            self.network = _pretrained(pretrained, names)

    def logits(self, fused: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        coarse = self.network(normalize(as_rgb(fused), **IMAGENET)).logits
        size = tuple(fused.shape[-2:] if size is None else size)
        return F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)


def _check_field(labels: torch.Tensor, picture: torch.Tensor, target: Mapping[str, Any]) -> None:
    """Whether one is the other resized: within a pixel, the same ratio of the sides."""
    (h, w), (height, width) = labels.shape[-2:], picture.shape[-2:]
    if abs(h * width - w * height) > max(h, w, height, width):
        raise ValueError(
            f"{picture_name(target, 0)}: labels are {h}×{w} but the picture is {height}×{width}; "
            "expected the same size, or the same field at another size"
        )


def _pretrained(path: str | os.PathLike, names: dict) -> SegformerForSemanticSegmentation:
    network, report = SegformerForSemanticSegmentation.from_pretrained(
        path,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        attn_implementation=ATTENTION,
        **names,
    )
    lost = set(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]}
    if lost := sorted(key for key in lost if not key.startswith("decode_head.")):
        raise ValueError(
            f"{path}: not the weights of a SegFormer: no {', '.join(lost[:3])} of the right shape"
        )
    return network
