"""Cards: what stands on them, and that a failed write leaves the old one."""

import os

import pandas as pd
import pytest

from fusionkit.cards import write_card

RESULTS = pd.DataFrame(
    {"ssim": [0.70312, 0.69]}, index=pd.Index(["ours", "theirs"], name="weights")
)


def test_a_card_holds_facts_results_and_notes(tmp_path):
    path = tmp_path / "card.md"
    write_card(path, title="A card", facts={"steps": 30}, results=RESULTS, notes="Research use.")
    assert path.read_text().splitlines() == [
        "# A card",
        "",
        "- **steps**: 30",
        "",
        "| weights | ssim |",
        "| --- | --- |",
        "| ours | 0.703 |",
        "| theirs | 0.690 |",
        "",
        "Research use.",
    ]


def test_a_full_disk_leaves_the_old_card(tmp_path, monkeypatch):
    path = tmp_path / "card.md"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_card(path, title="new", facts={}, results=RESULTS)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
