"""The notebooks: each runs from top to bottom in an empty folder, and is stored without what it printed."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "colabs").glob("*.ipynb"))
SLOW = ("quickstart", "segmentation")  # those that take longer than 40 seconds of one core


def cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def _slow_ones_marked():
    return [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in NOTEBOOKS]


@pytest.mark.parametrize("path", _slow_ones_marked())
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as a reader has
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources=where).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any(output.output_type in ("display_data", "execute_result") for output in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_clean_and_defines_nothing(path):
    for cell in cells(path):
        assert not cell.outputs and cell.execution_count is None
        defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        assert not any(isinstance(node, defined) for node in ast.walk(ast.parse(cell.source)))
