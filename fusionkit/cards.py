"""A card beside each file of weights: what they were trained on, how long, how well."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from fusionkit.images import write_atomically


def write_card(
    path: str | os.PathLike,
    *,
    title: str,
    facts: dict[str, object],
    results: pd.DataFrame,
    notes: str = "",
) -> Path:
    """Write a Markdown card.

    Args:
        facts: shown as a list, in order: data, steps, seed, hours and the like.
        results: one row a network, one column a metric, as measured in one run.
        notes: a paragraph on what was tried, and the terms.
    """
    lines = [f"# {title}", ""]
    lines += [f"- **{name}**: {value}" for name, value in facts.items()]
    lines += ["", *markdown_table(results), ""]
    if notes:
        lines += [notes, ""]
    text = "\n".join(lines)
    return write_atomically(path, lambda file: file.write(text.encode()))


def markdown_table(table: pd.DataFrame) -> list[str]:
    """The lines of a table in Markdown, numbers with three decimals."""
    header = [table.index.name or "", *map(str, table.columns)]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, row in table.iterrows():
        cells = [f"{x:.3f}" if isinstance(x, float) else str(x) for x in row]
        lines.append("| " + " | ".join([str(name), *cells]) + " |")
    return lines
