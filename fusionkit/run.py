"""Run a notebook in batch: `python -m fusionkit.run 03 -p profile full`, as `make train` does.

`python -m fusionkit.run --store` executes every notebook and stores its outputs in place.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import yaml
from nbclient import NotebookClient
from tqdm.auto import tqdm

from fusionkit.images import write_atomically

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
STUDIES = NOTEBOOKS.with_name("figures")


def main(arguments: list[str] | None = None) -> int:
    """Execute one notebook with papermill; 2 for a wrong call, 1 if a cell fails."""
    parser = argparse.ArgumentParser(prog="python -m fusionkit.run", description=__doc__)
    parser.add_argument("notebook", nargs="?", help="a number such as 03, or a path")
    parser.add_argument("--store", action="store_true", help="execute and store all, or this one")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--runs", default="runs", help="folder of results (default: runs)")
    options = parser.parse_args(arguments)
    try:
        if options.store:
            for path in [find_notebook(options.notebook)] if options.notebook else all_notebooks():
                store(path)
            return 0
        if options.notebook is None:
            raise ValueError("name a notebook, such as 03")
        path = find_notebook(options.notebook)
        parameters = {name: yaml.safe_load(value) for name, value in options.p}
        check_parameters(path, parameters)
    except (ValueError, FileNotFoundError) as error:
        print(f"fusionkit.run: {error}", file=sys.stderr)
        return 2
    out = Path(parameters.setdefault("out_dir", str(Path(options.runs).resolve() / path.stem)))
    out.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(path, out / path.name, parameters, cwd=path.parent)
    except papermill.PapermillExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"results are in {out}")
    return 0


def all_notebooks() -> list[Path]:
    """Every numbered notebook, in order."""
    return sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))


def store(path: Path) -> None:
    """Execute a notebook from top to bottom and put its outputs into the file."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}})
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    with tqdm(total=len(code), desc=path.stem, unit="cell") as bar:
        client.on_cell_complete = lambda cell, cell_index: bar.update()
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # timestamps would change the file at every run
    notebook.metadata.pop("widgets", None)  # live state; readers without a kernel see the figures
    text = nbformat.writes(notebook) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def find_notebook(name: str) -> Path:
    """The notebook of that number or path; otherwise a FileNotFoundError that lists all."""
    if Path(name).is_file():
        return Path(name)
    found = sorted(NOTEBOOKS.glob(f"{name}*.ipynb"))
    if len(found) != 1:
        known = ", ".join(path.stem for path in all_notebooks())
        raise FileNotFoundError(f"{name}: no such notebook; expected one of {known}")
    return found[0]


def measured(name: str) -> pd.DataFrame:
    """The table of a long study, `figures/NAME.csv`, as the full profile of a notebook wrote it.

    Raises:
        FileNotFoundError: no such study is stored; the message lists those there are.
    """
    path = STUDIES / f"{name}.csv"
    if not path.is_file():
        known = ", ".join(sorted(study.stem for study in STUDIES.glob("*.csv"))) or "none"
        raise FileNotFoundError(f"{path}: no such stored study; there are {known}")
    return pd.read_csv(path)


def check_parameters(path: Path, parameters: dict) -> None:
    """Raise a ValueError for a parameter that the notebook does not have.

    papermill only warns, and hours of training would run with the default.
    """
    known = papermill.inspect_notebook(path)
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise ValueError(
            f"{path.name} has no parameter {unknown[0]!r}; expected some of {', '.join(known)}"
        )


if __name__ == "__main__":
    sys.exit(main())
