"""A run's folder as report.md, report.html, a model card and the terminal's table."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.config.nested_values import as_mapping, get_path, iterate_leaves
from sft_recipes.errors import ConfigError
from sft_recipes.reporting import result_notes, result_tables, setup_sections
from sft_recipes.reporting.curation_report import curation_tables
from sft_recipes.reporting.document import Picture, render_html, render_markdown, save_pictures
from sft_recipes.reporting.figures import has_curve, plot_losses, plot_weight_change
from sft_recipes.reporting.model_card import write_model_card
from sft_recipes.reporting.run_folder import RunFiles, read_json, read_run, replace_file
from sft_recipes.reporting.text import fit_cell, render_table


def write_report(folder: Path, price_per_hour: float | None = None) -> str:
    """Writes `report.md`, `report.html` and the model card from the run's files; gives back the terminal's table.

    Raises ConfigError for a folder where no run has finished, and for files that cannot be read.
    """
    run = read_run(folder)
    values = report_values(run, price_per_hour)
    pictures = [values[name] for name in ("curves", "weight_curves") if values[name]]
    save_pictures(folder, pictures)
    replace_file(folder / "report.md", render_markdown("report.jinja", **values))
    write_model_card(run, values, pictures)
    replace_file(folder / "report.html", render_html("report.jinja", run.name, **values))  # the last file of a run
    return terminal_report(run, shutil.get_terminal_size().columns)


def report_values(run: RunFiles, price_per_hour: float | None = None) -> dict[str, Any]:
    """What templates/report.jinja is given: the run, its figures, and the modules whose functions it calls."""
    values = {
        "run": run,
        "price_per_hour": price_per_hour,
        "card": False,
        "curves": None,
        "weight_curves": None,
        "curation": [],
    }
    if has_curve(result_tables.loss_history(run.metrics)):
        figure = plot_losses(result_tables.loss_history(run.metrics))
        values["curves"] = Picture(figure, "loss.png", "Training loss, held-out loss and learning rate")
    if changes := result_notes.weight_changes(run.metrics):
        figure = plot_weight_change(changes)
        values["weight_curves"] = Picture(figure, "weight_change.png", "Relative change of the weights")
    if record := run.supervision.get("curation"):
        values["curation"] = curation_tables(record)
    return values | {"notes": result_notes, "setup": setup_sections, "tables": result_tables}


def terminal_report(run: RunFiles, width: int) -> str:
    """The result in so many columns: the metrics, the warnings, what reduces forgetting, three examples."""
    results = result_tables.result_table(run.metrics)
    lines = render_table(results) if results else []
    notes = [result_notes.describe_prompt(run.metrics), *result_notes.run_warnings(run.metrics)]
    for note in filter(None, [*notes, result_notes.describe_stop(run.metrics)]):
        lines += ["", *textwrap.wrap(fit_cell(note.replace("`", ""), 10_000), width)]
    if advice := result_notes.forgetting_advice(run):
        lines += ["", "What reduces forgetting:"]
        for line in advice:
            lines += textwrap.wrap(f"- {line.replace('`', '')}", width, subsequent_indent="  ")
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


def audit_table(audit: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What every source gave, its share and the issues in its rows, as tables that fit 80 columns."""
    rows, issues, shares = (
        [[terminal_cell(name, 15), *rest] for name, *rest in table]
        for table in (*setup_sections.audit_tables(audit), setup_sections.mixture_table(audit))
    )
    lines = [*render_table(rows), "", *([*render_table(shares), ""] if shares else [])]
    return [*lines, *(render_table(issues) if issues else ["No issue was found in the rows."])]


def compare_runs(first: Path, second: Path) -> str:
    """Whether two runs trained on the same tokens; if not, from which row on they differ, and in what else.

    Raises ConfigError for a folder without a digest.
    """
    runs = [read_json(folder / "supervision.json") for folder in (first, second)]
    for folder, values in zip((first, second), runs, strict=True):
        if not get_path(values, "digest.sha256"):
            raise ConfigError(f"{folder} is not the folder of a finished run: it has no digest in supervision.json.")
    a, b = (values["digest"] for values in runs)
    if a["sha256"] == b["sha256"]:
        return f"Both trained on the same tokens, labels and packing: {a['rows']:,} rows, {a['sha256'][:16]}."
    same = sum(one == other for one, other in zip(a["chunks"], b["chunks"], strict=False))
    lines = [
        f"They trained on different tokens: {a['rows']:,} and {b['rows']:,} rows, which part between row "
        f"{same * a['chunk']:,} and {(same + 1) * a['chunk']:,} of the training order."
    ]
    for part in ("sources", "versions", "config"):
        old, new = (dict(iterate_leaves(as_mapping(values.get(part)), part)) for values in runs)
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                lines.append(f"{key}: {old.get(key, 'not there')} and {new.get(key, 'not there')}")
    return "\n".join(lines)
