"""The features that stand in for a trained VGG-16: its layout, and that they can be learned."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import vgg16

from fusionkit.methods import TaskTraining
from fusionkit.methods.caf_features import EachSource, NarrowVGG, VGGSegmentation
from fusionkit.methods.caf_terms import VGGFeatures, searched_terms


def half_bright(items: int = 4) -> dict:
    """Pictures whose bright half is class 1; the infrared is the visible turned dark to bright."""
    torch.manual_seed(0)
    labels = torch.zeros(items, 32, 32, dtype=torch.int64)
    for label in labels:
        label[:, int(torch.randint(8, 24, ())) :] = 1
    b = 0.2 + 0.6 * labels[:, None].float()
    return {"a": 1 - b, "b": b, "labels": labels}


def test_the_layers_are_those_of_vgg_16():
    narrow = NarrowVGG(2)
    with torch.device("meta"):
        full = vgg16(weights=None)
    assert [type(x) for x in narrow.features] == [type(x) for x in full.features]
    for ours, theirs in zip(narrow.features, full.features, strict=True):
        if isinstance(ours, nn.Conv2d):
            assert 32 * ours.out_channels == theirs.out_channels
    assert VGGFeatures(narrow).taps == VGGFeatures(full).taps


def test_every_map_has_a_part_in_the_logits():
    torch.manual_seed(0)
    task = VGGSegmentation(["left", "right"], width=2)
    picture = torch.rand(2, 1, 32, 48)
    logits = task.logits(picture)
    assert logits.shape == (2, 2, 32, 48)
    gradients = torch.autograd.grad(logits.square().sum(), [h.weight for h in task.heads])
    assert [g.shape[1] for g in gradients] == [2, 4, 8, 16, 16]
    assert all(g.abs().max() > 0 for g in gradients)


def test_they_learn_and_then_stand_still():
    batch = half_bright()
    torch.manual_seed(0)
    task = VGGSegmentation(["left", "right"], width=2)
    method = TaskTraining(task, EachSource(), lr=5e-3)
    losses = [method.step(batch)["task"] for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]
    features = task.frozen()
    assert not any(p.requires_grad for p in features.parameters())
    fused = torch.rand(4, 1, 32, 32, requires_grad=True)
    terms = searched_terms(batch["a"], batch["b"], fused, features)
    (gradient,) = torch.autograd.grad(terms["perceptual_visible"], fused)
    assert gradient.abs().max() > 0


def test_each_source_is_seen_in_turn():
    a, b = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    assert EachSource()(a, b).flatten(1).mean(1).tolist() == [0, 1, 0]
