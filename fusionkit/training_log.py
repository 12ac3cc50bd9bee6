"""The log of a training run: a row a logged step, in memory and as CSV."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd

from fusionkit.images import write_atomically


class TrainingLog:
    """The rows of a run, and `log.csv`, which a resume brings back to the checkpoint's rows."""

    def __init__(self, path: Path, rows: list[dict[str, float]], write: bool) -> None:
        self.path, self.rows, self.write = path, rows, write
        self._rewrite()

    def append(self, step: int, losses: dict[str, float], seconds: float) -> None:
        row = {"step": step, **losses, "seconds": round(seconds, 3)}
        self.rows.append(row)
        if row.keys() - set(self.columns):  # a loss that no earlier step reported
            self._rewrite()
        elif self.write:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=self.columns)

    def _rewrite(self) -> None:
        names = dict.fromkeys(name for row in self.rows for name in row)
        names = [name for name in names if name not in ("step", "seconds")]
        self.columns = ["step", *names, "seconds"]
        if self.write:
            text = self.table().to_csv(index=False, lineterminator="\n")
            write_atomically(self.path, lambda file: file.write(text.encode()))
