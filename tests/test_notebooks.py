"""Every notebook runs from top to bottom on a small run, and is stored without outputs."""

import json
import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# one in the default run shows that notebooks work at all; each takes longer than five seconds
EACH = [pytest.param(p, marks=pytest.mark.slow if i else ()) for i, p in enumerate(NOTEBOOKS)]


@pytest.mark.filterwarnings("ignore")  # the kernel is another process: only its errors count
@pytest.mark.parametrize("path", EACH, ids=lambda p: p.stem)
def test_notebook__runs_from_top_to_bottom(path, small_run, monkeypatch):
    notebook = execute(path, *small_run, monkeypatch)
    shown = [o.output_type for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert "error" not in shown
    assert shown.count("execute_result") + shown.count("display_data") >= 4


def execute(path, scan, run, monkeypatch):
    """The notebook with its outputs; raises what a cell raises."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setitem(os.environ, "FCUNET_SCAN", str(scan))
    monkeypatch.setitem(os.environ, "FCUNET_RUN", str(run))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(FOLDER)}}).execute()
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook__is_stored_without_outputs(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert cells
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in cells)
