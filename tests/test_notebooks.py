"""Every notebook, in its "fast" profile, under nbval; and the rules that notebooks follow."""

import subprocess
import sys

import nbformat
import papermill
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from fusionkit import run
from fusionkit.run import all_notebooks, check_parameters, find_notebook, main

NOTEBOOKS = all_notebooks()
PARAMETERS = {"profile", "task", "data_root", "seed", "device", "out_dir"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_reproduces_its_marked_outputs(path, tmp_path):
    copy = tmp_path / path.name
    notebook = load_notebook_node(str(path))
    # A fresh folder of results, so that nothing of an earlier run is taken up.
    notebook = parameterize_notebook(notebook, {"out_dir": str(tmp_path / "out")})
    nbformat.write(notebook, copy)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax"]
    command += ["--nbval-current-env", "--nbval-cell-timeout", "600", "--rootdir", tmp_path, copy]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert any((tmp_path / "out").rglob("*.csv")), "the notebook left no table in out_dir"
    assert any((tmp_path / "out").rglob("*.png")), "the notebook left no figure in out_dir"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_as_the_project_wants_it(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert papermill.inspect_notebook(path).keys() >= PARAMETERS
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert max(len(cell.source.splitlines()) for cell in code) <= 25
    assert path.stat().st_size < 1_500_000


def test_an_unknown_parameter_stops_before_anything_runs(tmp_path, capsys):
    assert main(["00", "-p", "epoch", "3", "--runs", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "'epoch'" in message
    assert "profile" in message
    assert not list(tmp_path.iterdir())


def test_a_known_parameter_passes():
    check_parameters(find_notebook("03"), {"profile": "full", "steps": 10})


def test_an_unknown_notebook_lists_those_there_are():
    with pytest.raises(FileNotFoundError, match="00_quickstart"):
        find_notebook("99")


def test_a_stored_study_is_read_and_an_unknown_one_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "STUDIES", tmp_path)
    (tmp_path / "05_sequence.csv").write_text("arm,seed,entropy\nalone,0,6.5\n")
    assert run.measured("05_sequence").to_dict("records") == [
        {"arm": "alone", "seed": 0, "entropy": 6.5}
    ]
    with pytest.raises(FileNotFoundError, match="there are 05_sequence"):
        run.measured("05_order")
