"""Segmentation: the loss and its gradients, scores by hand, sizes of labels, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from fusionkit.datasets import LabelledCrops, collate_labelled
from fusionkit.datasets.embedded import STREET_CLASSES, EmbeddedPairs
from fusionkit.tasks import PerceptionTask
from fusionkit.tasks.segmentation import SegFormer, Segmentation

CLASSES = ("road", "car", "person")


@pytest.fixture
def task() -> SegFormer:
    torch.manual_seed(0)
    return SegFormer(CLASSES, "tiny").eval()


def pictures(channels: int = 1, height: int = 32, width: int = 40, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.rand(batch, channels, height, width, generator=generator)


def labelled(height: int = 32, width: int = 40, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(len(CLASSES), (batch, height, width), generator=generator)
    return {"labels": labels, "name": [f"p{i}" for i in range(batch)]}


# The network and its loss


@pytest.mark.parametrize(("variant", "millions"), [("tiny", 0.219), ("b0", 3.715), ("b1", 13.678)])
def test_sizes_of_the_networks(variant, millions):
    network = SegFormer(CLASSES, variant)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)


def test_b0_sees_a_small_picture():
    torch.manual_seed(0)
    task = SegFormer(CLASSES).eval()
    assert task.logits(pictures()).shape == (2, 3, 32, 40)
    assert task.loss(pictures(), labelled()).item() == pytest.approx(math.log(3), abs=0.3)


def test_the_loss_is_the_cross_entropy_of_the_logits(task):
    fused, target = pictures(3), labelled()
    expected = F.cross_entropy(task.logits(fused), target["labels"])
    torch.testing.assert_close(task.loss(fused, target), expected)
    torch.testing.assert_close(task(fused, target), expected)


def test_luminance_is_repeated(task):
    gray = pictures()
    torch.testing.assert_close(task.logits(gray), task.logits(gray.repeat(1, 3, 1, 1)))


def test_the_slope_by_the_picture(task):
    task.double()
    fused = pictures().double().requires_grad_()
    slope = torch.autograd.grad(task.loss(fused, labelled()), fused)[0]
    direction = pictures(batch=2).double() - 0.5
    step = 1e-5
    losses = [task.loss(fused.detach() + s * direction, labelled()) for s in (step, -step)]
    numeric = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close((slope * direction).sum(), numeric, rtol=1e-5, atol=1e-9)
    assert (slope != 0).double().mean() > 0.9


def test_functional_call_with_stepped_weights(task):
    fused, target = pictures(), labelled()
    weights = dict(task.named_parameters())
    before = task(fused, target)
    gradients = torch.autograd.grad(before, list(weights.values()), create_graph=True)
    stepped = {k: w - 0.1 * g for (k, w), g in zip(weights.items(), gradients, strict=True)}
    after = functional_call(task, stepped, (fused, target))
    assert after < before
    torch.testing.assert_close(task(fused, target), before)
    torch.autograd.grad(after, list(weights.values()))  # through the step


def test_evaluation_mode_leaves_the_statistics_alone(task):
    before = {k: v.clone() for k, v in task.named_buffers()}
    task.loss(pictures(), labelled())
    task.train().predict(pictures())
    assert all(torch.equal(v, before[k]) for k, v in task.named_buffers())
    assert all(part.training for part in task.modules())
    task.loss(pictures(), labelled())
    assert not all(torch.equal(v, before[k]) for k, v in task.named_buffers())


def test_ignored_pixels_do_not_count(task):
    fused, target = pictures(), labelled()
    labels = target["labels"].clone()
    labels[:, 10:] = 255
    logits = task.logits(fused)[:, :, :10]
    expected = F.cross_entropy(logits, labels[:, :10])
    torch.testing.assert_close(task.loss(fused, {"labels": labels}), expected)
    nothing = task.loss(fused.requires_grad_(), {"labels": torch.full_like(labels, 255)})
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, fused)[0].abs().max() == 0


@pytest.mark.parametrize("size", [(64, 80), (16, 20), (33, 41)])
def test_labels_of_another_size_of_the_same_field(task, size):
    fused, target = pictures(), labelled(*size)
    expected = F.cross_entropy(task.logits(fused, size), target["labels"])
    torch.testing.assert_close(task.loss(fused, target), expected)
    task.score([task.predict(fused)], [target])


def test_it_learns():
    torch.manual_seed(0)
    pairs = EmbeddedPairs("ivif", 2, (64, 64), time="day")
    batch = collate_labelled([LabelledCrops(pairs, 64, augment=False)[k] for k in range(2)])
    task = SegFormer(STREET_CLASSES, "tiny")
    optimizer = torch.optim.AdamW(task.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        task.loss(batch["b"], batch).backward()
        optimizer.step()
    score = task.score([task.predict(batch["b"])], [batch])
    assert score["mIoU"] > 0.3  # 0.05 before


def test_pretrained_weights_from_a_folder(tmp_path, task):
    task.network.save_pretrained(tmp_path)
    same = SegFormer(CLASSES, pretrained=tmp_path).eval()
    torch.testing.assert_close(same.logits(pictures()), task.logits(pictures()))
    other = SegFormer(("a", "b"), pretrained=tmp_path).eval()
    assert other.logits(pictures()).shape[1] == 2
    encoders = [t.network.segformer.state_dict() for t in (task, other)]
    assert all(torch.equal(v, encoders[1][k]) for k, v in encoders[0].items())


# Scores


def test_scores_by_hand(task):
    labels = torch.tensor([[[0, 0, 1, 1], [0, 255, 1, 1]]])
    predicted = torch.tensor([[[0, 1, 1, 1], [0, 2, 1, 2]]])
    scores = task.score([predicted], [{"labels": labels}])
    # road: 2 hits of 3, union 3; car: 3 hits of 4, union 5; person: never labelled, once predicted
    assert scores["IoU/road"] == pytest.approx(2 / 3)
    assert scores["IoU/car"] == pytest.approx(3 / 5)
    assert scores["IoU/person"] == 0
    assert scores["mIoU"] == pytest.approx((2 / 3 + 3 / 5) / 3)
    assert scores["mAcc"] == pytest.approx((2 / 3 + 3 / 4) / 2)


def test_scores_are_over_all_pictures(task):
    labels, predicted = torch.randint(3, (2, 6, 8, 8))
    target = {"labels": labels}
    whole = task.score([predicted], [target])
    parts = task.score(predicted.split(2), ({"labels": part} for part in labels.split(2)))
    assert whole == pytest.approx(parts)
    assert task.score([labels], [target])["mIoU"] == 1


def test_an_absent_class_has_no_iou(task):
    labels = torch.tensor([[[0, 1]]])
    scores = task.score([labels], [{"labels": labels}])
    assert math.isnan(scores["IoU/person"])
    assert scores["mIoU"] == scores["mAcc"] == 1


# Refusals


def test_labels_that_do_not_fit(task):
    fused = pictures()
    with pytest.raises(ValueError, match="labels are 32×32 but the picture is 32×40"):
        task.loss(fused, labelled(32, 32))
    with pytest.raises(ValueError, match="'labels' for 3 pictures, but 2 were fused"):
        task.loss(fused, labelled(batch=3))
    with pytest.raises(ValueError, match="the target has no 'labels', only name"):
        task.loss(fused, {"name": ["x"]})
    target = labelled()
    with pytest.raises(ValueError, match=r"float32; expected integers"):
        task.loss(fused, {"labels": target["labels"].float()})
    target["labels"][1, 3, 3] = 7
    target["labels"][1, 3, 4] = -1
    with pytest.raises(ValueError, match=r"p1: labels \[-1, 7\]; expected 0 to 2, or 255"):
        task.loss(fused, target)
    del target["name"]
    with pytest.raises(ValueError, match="picture 1 of the batch: labels"):
        task.score([task.predict(fused)], [target])


def test_pictures_that_do_not_fit(task):
    for shape in ((2, 2, 32, 40), (3, 32, 40)):
        with pytest.raises(ValueError, match=r"expected \(B, 1 or 3, H, W\)"):
            task.predict(torch.rand(shape))


def test_options():
    with pytest.raises(ValueError, match="unknown variant 'b9'; expected one of tiny, b0, b1"):
        SegFormer(CLASSES, "b9")
    with pytest.raises(ValueError, match="ignore_index 1 is class 'car'"):
        SegFormer(CLASSES, "tiny", ignore_index=1)
    for classes in ((), "car"):
        with pytest.raises(ValueError, match="expected the names of at least one class"):
            SegFormer(classes, "tiny")


def test_other_weights_are_refused(tmp_path, task):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4)
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    task.network.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not the weights of a SegFormer: no segformer\."):
        SegFormer(CLASSES, pretrained=tmp_path)


# A task of one's own


def test_a_task_that_defines_nothing_says_so():
    task = PerceptionTask(CLASSES)
    for call in (lambda: task(1, {}), lambda: task.predict(1), lambda: task.score([], [])):
        with pytest.raises(TypeError, match="PerceptionTask defines no"):
            call()


def test_a_segmentation_without_logits_says_so():
    with pytest.raises(TypeError, match="Segmentation defines no logits"):
        Segmentation(["road"]).predict(torch.rand(1, 1, 8, 8))
