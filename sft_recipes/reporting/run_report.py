"""A run's folder as report.md, report.html, a model card and the terminal's table."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.errors import ConfigError
from sft_recipes.reporting.document import save_pictures, to_html, to_markdown
from sft_recipes.reporting.model_card import write_model_card
from sft_recipes.reporting.result_sections import build_sections, forgetting_advice, run_warnings
from sft_recipes.reporting.result_tables import result_table
from sft_recipes.reporting.run_folder import RunFiles, as_mapping, get_path, iterate_leaves, read_json, read_run
from sft_recipes.reporting.setup_sections import audit_rows
from sft_recipes.reporting.text import fit_cell, render_table


def write_report(folder: Path, price_per_hour: float | None = None) -> str:
    """Writes `report.md`, `report.html` and the model's card from the run's files; gives back the terminal's table.

    Raises ConfigError for a folder where no run has finished, and for files that cannot be read.
    """
    run = read_run(folder)
    found = build_sections(run, price_per_hour)
    (folder / "report.md").write_text(to_markdown(run.name, found), encoding="utf-8")
    (folder / "report.html").write_text(to_html(run.name, found, home="sft_recipes"), encoding="utf-8")
    save_pictures(folder, found)
    write_model_card(run, found)
    return terminal_report(run, shutil.get_terminal_size().columns)


def terminal_report(run: RunFiles, width: int) -> str:
    """What came of the run in so many columns: the figures, what there is to worry about, three examples."""
    lines = render_table(result_table(run.metrics))
    for concern in [*run_warnings(run), *forgetting_advice(run)]:
        lines += ["", *textwrap.wrap(fit_cell(concern.replace("`", ""), 10_000), width)]
    cell = max(20, (width - 10) // 3)
    return "\n".join([*lines, "", *example_answers(run.answers, cell)]).rstrip()


def example_answers(answers: Sequence[Mapping[str, Any]], width: int, number: int = 3) -> list[str]:
    """A few held-out questions with both answers, spread over the whole list."""
    if not answers:
        return []
    some = answers[:: max(1, len(answers) // number)][:number]
    keys = [key for key in ("prompt", "base", "tuned") if any(key in answer for answer in some)]
    rows = [["question" if key == "prompt" else key for key in keys]]
    rows += [[terminal_cell(answer.get(key, ""), width) for key in keys] for answer in some]
    return render_table(rows)


def terminal_cell(text: str, width: int) -> str:
    """A text as a cell of the terminal's table, with a | of its own marked as such."""
    return fit_cell(str(text).replace("|", "\\|"), width)


def audit_table(ledger: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What every source gave, and the problems that were found in it, as two tables that fit 80 columns."""
    rows, problems = audit_rows(ledger)
    rows, problems = ([[terminal_cell(name, 15), *rest] for name, *rest in some] for some in (rows, problems))
    return [*render_table(rows), "", *(render_table(problems) if problems else ["No problem was found in the rows."])]


def compare_runs(first: Path, second: Path) -> str:
    """Whether two runs trained on the same tokens and, if not, where they part and what differs in their making."""
    a, b = (read_json(folder / "supervision.json") for folder in (first, second))
    for folder, values in ((first, a), (second, b)):
        if not get_path(values, "digest.sha256"):
            raise ConfigError(f"{folder} is not the folder of a finished run: it has no digest in supervision.json.")
    if a["digest"]["sha256"] == b["digest"]["sha256"]:
        same = f"{a['digest']['rows']:,} rows, {a['digest']['sha256'][:16]}"
        return f"Both trained on the same tokens, labels and packing: {same}."
    same = 0
    for one, other in zip(a["digest"]["chunks"], b["digest"]["chunks"], strict=False):
        same += one == other
    chunk = a["digest"]["chunk"]
    lines = [
        f"They trained on different tokens: {a['digest']['rows']:,} and {b['digest']['rows']:,} rows, which part "
        f"between row {same * chunk:,} and {(same + 1) * chunk:,} of the training order."
    ]
    for part in ("sources", "versions", "config"):
        old, new = (dict(iterate_leaves(as_mapping(values.get(part)), part)) for values in (a, b))
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                lines.append(f"{key}: {old.get(key, 'not there')} and {new.get(key, 'not there')}")
    return "\n".join(lines)
