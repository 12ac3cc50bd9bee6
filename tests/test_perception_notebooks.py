"""What notebooks 02 and 04 promise beyond running: a quiet search, answers that run."""

from __future__ import annotations

import re

import nbformat
import pytest
import torch
from torch import nn

from fusionkit.datasets import LabelledCrops, collate_labelled
from fusionkit.datasets.embedded import EmbeddedPairs
from fusionkit.methods import TDFusionMethod
from fusionkit.models import create_model
from fusionkit.models.loss_generator import LossGenerator
from fusionkit.run import find_notebook
from fusionkit.tasks import base


def cells(number: str) -> list:
    return nbformat.read(find_notebook(number), as_version=4).cells


def class_lines(code: str) -> list[str]:
    """The lines of the first class in `code`."""
    lines = code[code.index("class ") :].splitlines()
    end = next((i for i, line in enumerate(lines[1:], 1) if line[:1].strip()), len(lines))
    return lines[:end]


@pytest.fixture(scope="module")
def answer() -> str:
    """The code of notebook 04's folded answer: a task that tells day from night."""
    folded = [part for c in cells("04") for part in c.source.split("<details>")[1:]]
    (found,) = (part for part in folded if "(PerceptionTask)" in part)
    return "\n".join(re.findall(r"(?s)```python\n(.*?)```", found))


def test_the_search_shows_a_live_picture_and_prints_nothing():
    (searching,) = (c for c in cells("02") if c.source.rstrip().endswith("for kind in kinds}"))
    assert [out.output_type for out in searching.outputs] == ["display_data"] * 2
    view = "application/vnd.jupyter.widget-view+json"
    assert all(view in out.data for out in searching.outputs)


def test_a_new_task_is_one_class_of_under_sixty_lines(answer):
    (own,) = (c.source for c in cells("02") if c.source.startswith("class TimeOfDay"))
    for code in (own, answer):
        lines = class_lines(code)
        assert lines[0].endswith("(PerceptionTask):")
        assert any(line.strip().startswith("def score(") for line in lines)
        assert len(lines) < 60


def test_the_folded_answer_guides_a_fusion_network(answer):
    names = {key: getattr(base, key) for key in ("PerceptionTask", "as_rgb", "entry", "evaluating")}
    names |= {"nn": nn, "torch": torch, "collate_labelled": collate_labelled}
    exec(answer, names)
    crops = LabelledCrops(EmbeddedPairs("ivif", 6, (48, 48), seed=0), 48, 6, augment=False)
    batch = names["collate"]([crops[k] for k in range(6)])
    assert sorted(batch["kind"].tolist()) == [0, 0, 1, 1, 1, 1]
    torch.manual_seed(0)
    method = TDFusionMethod(
        create_model("caf", dim=4),
        names["DayOrNight"](),
        generator=LossGenerator(4, 2, 1),
        swap=False,
        lr=3e-3,
        task_lr=1e-2,
        inner_lr=0.1,
        meta_steps=1,
        fusion_steps=3,
    )
    before = [p.clone() for p in method.generator.parameters()]
    losses = [method.step(batch) for _ in range(40)]
    assert losses[0]["meta"] > 0
    assert losses[-1]["task"] < 0.5 * losses[1]["task"]
    moved = zip(method.generator.parameters(), before, strict=True)
    assert any(not torch.equal(p, q) for p, q in moved)
    with torch.no_grad():
        told = method.task.predict(method.fusion(batch["a"], batch["b"]).clamp(0, 1))
    assert method.task.score([told], [batch])["accuracy"] > 0.9
