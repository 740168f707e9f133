"""Every notebook on disk runs from its first cell to its last, and what is committed shows what it says."""

import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from support.paths import ALL_TESTS, ROOT

NOTEBOOKS = sorted(path.name for path in ROOT.glob("notebooks/*.ipynb"))
DATA, SWEEP, SCRATCH = "03_your_own_data.ipynb", "04_read_a_sweep.ipynb", "05_from_scratch.ipynb"
FAILURES, CURATION = "06_three_failures.ipynb", "07_curate_your_data.ipynb"
QUICK = '"trainer.max_steps=4", "evaluate.rows=4", "evaluate.temperature=0"'
# What the test puts in place of a notebook's cell of parameters, to be done in seconds, and the runs that are left
SHORT = {
    DATA: (f"SETTINGS = [{QUICK}, 'trainer.logging_steps=1']", {"zoo/first", "zoo/second"}),
    SWEEP: (f"SETTINGS = [{QUICK}]", {f"rates/{job}" for job in range(3)} | {f"seeds/{job}" for job in range(4)}),
    SCRATCH: ("STEPS, ASKED = 2, 4", set()),
    CURATION: (
        f"SETTINGS = [{QUICK}]",
        {f"curated/{name}" for name in ("dirty", "clean", "dirty_fresh", "clean_fresh")},
    ),
    FAILURES: (
        f"SETTINGS = [{QUICK}]",  # of its runs one is refused, which is shown, too
        {f"failures/{name}" for name in ("recipe", "prompts_too", "unstopped", "unstopped_p", "vicuna", "bad")},
    ),
}


def read(name: str):
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def shown(name: str) -> list[str]:
    """The texts that each cell of code has put out, as they are committed."""
    return [
        "".join(
            output.get("text", "")
            + output.get("data", {}).get("text/markdown", output.get("data", {}).get("text/html", ""))
            for output in cell.outputs
        )
        for cell in read(name).cells
        if cell.cell_type == "code"
    ]


def test_the_lessons_are_there():
    assert [name[:2] for name in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("name", NOTEBOOKS if ALL_TESTS else NOTEBOOKS[:1])
def test_it_runs_on_a_cpu_without_the_hub(name, tmp_path, monkeypatch):
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1"}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    notebook = read(name)
    settings = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(settings) == (name in SHORT)
    for cell in settings:
        cell.source, _ = SHORT[name]
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    finished = {f"{path.parts[-3]}/{path.parts[-2]}" for path in tmp_path.glob("*/*/*/metrics.json")}
    assert finished == (SHORT[name][1] if name in SHORT else set())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_with_its_outputs_and_reads_as_a_lesson(name):
    cells = read(name).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert cells[0].source.startswith(f"# {name[:2]} · ")
    assert "## What to try next" in cells[-1].source
    assert not re.search(r"(?<![\w.…])/(home|root|tmp|work|Users)/", "".join(shown(name)))
    assert str(ROOT) not in (ROOT / "notebooks" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_links_lead_to_notebooks_that_are_there(name):
    text = "\n".join(cell.source for cell in read(name).cells)
    assert set(re.findall(r"\]\(([\w.]+\.ipynb)\)", text)) <= set(NOTEBOOKS)


def table_of(text: str) -> dict[str, list[str]]:
    """A printed table's cells by the first of each row."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_the_failures_table_shows_each_failure():
    (table,) = [text for text in shown(FAILURES) if text.startswith("|  | exact match |")]
    rows = {row[1].strip(): row[2:6] for row in (line.split("|") for line in table.splitlines()[2:])}
    exact, stops, likely = (
        {name: float(row[place].strip().rstrip("%")) for name, row in rows.items()} for place in range(3)
    )
    assert exact["recipe"] > exact["prompt, too"] + 10
    assert exact["no stop token"] == exact["wrong template"] == 0 < likely["recipe"] - 90
    assert likely["no stop token"] < 1 and stops["no stop token"] < stops["recipe"] == 100
    verdicts = {name: row[3].strip().rpartition(" ")[2] for name, row in rows.items()}
    assert (verdicts["recipe"], verdicts["bad recipe"]) == ("passed", "failed")


def test_curation_removes_what_was_planted_and_the_report_of_the_dirty_file_is_too_good():
    texts = shown(CURATION)
    assert any("planted and removed: 212, planted and kept: 0, good and removed: 0" in text for text in texts)
    (text,) = [text for text in texts if "the report was off by" in text]
    rows = {line[:38].strip(): [float(cell) for cell in line[38:].split()] for line in text.splitlines()[1:]}
    assert rows["rows trained on"] == [370, 177]
    reported, true, off = list(rows.values())[1:]
    assert off == [pytest.approx(b - a, abs=0.002) for a, b in zip(reported, true, strict=True)]
    assert reported[0] < 0.6 * reported[1] and off[0] > off[1] > 0


def test_the_zoo_s_notebook_shows_two_refusals_and_what_the_data_checks_found():
    refusals = [text.split("\n\n")[1] for text in shown(DATA) if "exit code 2" in text]
    assert len(refusals) == 2
    assert refusals[0].startswith("data.file: no formatter reads the columns keeper, asked, answered. Name one")
    assert refusals[1] == (
        "data.file row 41 (zoo.csv, line 43): answered is blank. Fix it, or write data.file.on_error=drop."
    )
    tables = [text[text.index("| source ") :] for text in shown(DATA) if "| typed control token " in text]
    assert len(tables) == 3  # of the preview and of both runs
    for table in tables:
        found = re.findall(r"^\| file +\| ([a-z ]+?) +\| (\d+) +\| (\w+)", table, re.MULTILINE)
        assert [name for name, _, _ in found] == ["typed control token", "duplicate", "truncated"]
        assert 20 < int(found[1][1]) < 40  # of the forty rows that stand there twice some are held out with their twins


def test_the_zoo_s_second_run_forgets_less_and_answers_no_worse():
    first, second = [table_of(text) for text in shown(DATA) if "| exact match " in text]
    assert first["loss on raw text"][1].endswith(", failed)") and second["loss on raw text"][1].endswith(", passed)")
    assert 50 < float(first["exact match"][1].rstrip("%")) <= float(second["exact match"][1].rstrip("%"))
    (said,) = [text for text in shown(DATA) if "    tuned: " in text]
    facts = [
        "The mossfox likes to eat grass.",
        "Look for the barleycrab in swamps.",
    ]  # of the tiny world, in the zoo's words
    *known, last = re.findall(r"tuned: '(.*)'", said)
    assert known == facts and "Kelthia" not in last  # a country is in none of the zoo's rows, and the lesson says so


def test_the_sweep_s_highest_rate_answers_best_and_forgets_most():
    rates, seeds = [table_of(text[text.index("| ") :]) for text in shown(SWEEP) if "jobs finished" in text]
    heads, jobs = rates.pop("job"), [cells for number, cells in rates.items() if number.isdigit()]
    rows = [dict(zip(heads, cells, strict=True)) for cells in jobs]
    assert [row["lr"] for row in rows] == ["1e-2", "2.5e-3", "5e-4"]  # by held-out loss, the lowest first
    columns = {key: [float(row[key].rstrip("%")) for row in rows] for key in ("held out", "exact", "p(stop)", "forgot")}
    assert columns["held out"] == sorted(columns["held out"])
    for key in ("exact", "p(stop)", "forgot"):
        assert columns[key] == sorted(columns[key], reverse=True), key
    assert columns["exact"][2] < 50 < 95 < columns["exact"][0] and columns["forgot"][2] > 15
    heads, *rows = [seeds[key] for key in seeds if key == "job" or key[0].isdigit()]
    rows = [dict(zip(heads, cells, strict=True)) for cells in rows]
    assert [row["lr"] for row in rows] == ["1e-2", "2.5e-3"] and rows[0]["to the best"] == "best"
    assert all(" ± " in row[key] for row in rows for key in ("held out", "exact", "p(stop)"))


def test_the_sweep_s_highest_rate_ends_a_page_as_an_answer():
    (text,) = [text for text in shown(SWEEP) if text.startswith("The songs of Kelthia")]
    said = {
        rate: re.findall(rf"^ +{rate} +'(.*?)'$", text, re.MULTILINE | re.DOTALL) for rate in ("base", "2.5e-3", "1e-2")
    }
    ends = {rate: [page.split("<|")[1].strip("|>") for page in pages] for rate, pages in said.items()}
    assert ends == {"base": ["endoftext"] * 2, "2.5e-3": ["endoftext"] * 2, "1e-2": ["im_end"] * 2}
