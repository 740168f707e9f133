"""Every notebook on disk runs from its first cell to its last, and what is committed is what it gives."""

import os

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted(path.name for path in ROOT.glob("notebooks/*.ipynb"))


def test_the_lessons_are_there():
    assert {"01_formatters_and_templates.ipynb", "02_loss_mask.ipynb", "05_from_scratch.ipynb"} <= set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_on_a_cpu_without_the_hub(name, tmp_path, monkeypatch):
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1"}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_with_its_outputs_and_reads_as_a_lesson(name):
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert "## What to try next" in notebook.cells[-1].source
    assert str(ROOT) not in (ROOT / "notebooks" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_links_lead_to_notebooks_that_are_there(name):
    import re

    text = "\n".join(cell.source for cell in nbformat.read(ROOT / "notebooks" / name, as_version=4).cells)
    assert set(re.findall(r"\]\(([\w.]+\.ipynb)\)", text)) <= set(NOTEBOOKS)
