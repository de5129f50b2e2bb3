"""The example notebook runs from a clean kernel, and every cell shows what it is for."""

import os
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


@pytest.mark.slow
def test_the_notebook_shows_the_whole_path(tmp_path, monkeypatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, sys.path)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    if kept := os.environ.get("S2AP_KEEP_NOTEBOOK"):
        nbformat.write(notebook, kept)
    shown = [
        "".join(output.data.get("text/html", "") or output.data.get("image/svg+xml", "")
                for output in cell.outputs if "data" in output)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]  # fmt: skip
    version, dense, pruned, certificates, file, verdict, plot, links = shown
    assert not version
    assert "<th>dense</th>" in dense
    assert "data:image/svg+xml;base64," in pruned
    assert "<td>90.00%</td>" in pruned
    assert "robust accuracy (upper bound)" in certificates
    assert "times smaller than dense" in file
    assert "robust-accuracy" in verdict
    assert plot.lstrip().startswith("<svg")
    assert "report.html" in links
