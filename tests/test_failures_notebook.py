"""The notebook of failures: it runs from top to bottom, and what it shows is what it says."""

import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

PATH = ROOT / "notebooks" / "04_three_failures.ipynb"
SHORT = 'SETTINGS = ["trainer.max_steps=4", "evaluate.rows=4", "evaluate.temperature=0"]'


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


def shown(cell) -> str:
    """The texts that a cell has put out."""
    texts = [output.get("text", "") for output in cell.outputs]
    return "".join([*texts, *(output.get("data", {}).get("text/markdown", "") for output in cell.outputs)])


def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    quick = nbformat.from_dict(notebook)
    (settings,) = [cell for cell in quick.cells if "parameters" in cell.metadata.get("tags", [])]
    settings.source = SHORT
    NotebookClient(quick, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    runs = {path.parent.name for path in (tmp_path / "outputs" / "failures").glob("*/metrics.json")}
    assert runs == {"recipe", "prompts_too", "unstopped", "unstopped_p", "vicuna", "bad"}  # and refused, which is


def test_it_is_committed_with_its_outputs(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in cells[-1].outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", "".join(map(shown, cells)))


def test_its_table_shows_each_failure(notebook):
    (table,) = [shown(cell) for cell in notebook.cells if cell.cell_type == "code" and "| exact match |" in shown(cell)]
    rows = {row[1].strip(): row[2:6] for row in (line.split("|") for line in table.splitlines()[2:])}
    exact, stops, likely = (
        {name: float(row[place].strip().rstrip("%")) for name, row in rows.items()} for place in range(3)
    )
    assert exact["recipe"] > exact["prompt, too"] + 10
    assert exact["no stop token"] == exact["wrong template"] == 0 < likely["recipe"] - 90
    assert likely["no stop token"] < 1 and stops["no stop token"] < stops["recipe"] == 100
    verdicts = {name: row[3].strip().rpartition(" ")[2] for name, row in rows.items()}
    assert (verdicts["recipe"], verdicts["bad recipe"]) == ("passed", "failed")
