"""A run's folder as report.md, report.html, a model card and the terminal's table."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.config.nested_values import as_mapping, get_path, iterate_leaves
from sft_recipes.errors import ConfigError, plural
from sft_recipes.reporting import result_tables, setup_sections
from sft_recipes.reporting.curation_report import curation_tables
from sft_recipes.reporting.document import Picture, render_lines, save_pictures, write_pages
from sft_recipes.reporting.figures import has_curve, plot_losses, plot_weight_change
from sft_recipes.reporting.model_card import write_model_card
from sft_recipes.reporting.provenance import TRAINER_DEFAULTS
from sft_recipes.reporting.run_folder import RunFiles, read_json, read_run
from sft_recipes.reporting.text import fit_cell, render_table


def write_report(folder: Path, price_per_hour: float | None = None) -> str:
    """Writes `report.md`, `report.html` and the model card from the run's files; gives back the terminal's table.

    Raises ConfigError for a folder where no run has finished, and for files that cannot be read.
    """
    run = read_run(folder)
    # What templates/report.jinja is given: the run, its figures, and the modules whose functions it calls
    values = {"setup": setup_sections, "tables": result_tables, "price_per_hour": price_per_hour, "card": False}
    values |= {"advice": forgetting_advice(run), "curves": None, "weight_curves": None, "curation": []}
    if has_curve(history := run.metrics.get("history") or []):
        label = "Training loss, held-out loss and learning rate"
        values["curves"] = Picture(plot_losses(history), "loss.png", label)
    if changes := result_tables.weight_changes(run.metrics):
        figure = plot_weight_change(changes)
        values["weight_curves"] = Picture(figure, "weight_change.png", "Relative change of the weights")
    if record := run.supervision.get("curation"):
        values["curation"] = curation_tables(record)
    pictures = [values[name] for name in ("curves", "weight_curves") if values[name]]
    save_pictures(folder, pictures)
    write_model_card(run, values, pictures)
    write_pages(folder, "report.jinja", run.name, run=run, **values)
    return terminal_report(run, values["advice"], shutil.get_terminal_size().columns)


def terminal_report(run: RunFiles, advice: Sequence[str], width: int) -> str:
    """The result in so many columns: the metrics, the warnings, what reduces forgetting, three examples."""
    lines = render_table(result_tables.result_table(run.metrics))
    for note in render_lines("terminal.jinja", metrics=run.metrics):
        lines += ["", *textwrap.wrap(fit_cell(note.replace("`", ""), 10_000), width)]
    if advice:
        lines += ["", "What reduces forgetting:"]
        for line in advice:
            lines += textwrap.wrap(f"- {line.replace('`', '')}", width, subsequent_indent="  ")
    examples = result_tables.example_table(run.answers, ("base", "tuned"), most=3)
    cell = max(20, (width - 10) // 3)
    table = [[terminal_cell(text, cell) for text in (question, *answers)] for question, _, *answers in examples]
    return "\n".join([*lines, "", *render_table(table)]).rstrip()


def forgetting_advice(run: RunFiles) -> list[str]:
    """What would reduce forgetting in this run, each with the config for it; none where the check passed."""
    if get_path(run.metrics, "forgetting.verdict") in (None, "passed"):
        return []
    trainer = TRAINER_DEFAULTS | as_mapping(run.config.get("trainer"))
    sources = [name for name, source in as_mapping(run.config.get("data")).items() if isinstance(source, dict)]
    rehearses = any(is_raw_text(run, name) for name in sources)
    return render_lines("advice.jinja", config=run.config, trainer=trainer, sources=sources, rehearses=rehearses)


def is_raw_text(run: RunFiles, name: str) -> bool:
    """Whether a source is raw text: every token of it carries loss, and not because the config says so of answers."""
    audit = as_mapping(get_path(run.supervision, "sources")).get(name, {})
    return get_path(run.config["data"][name], "train_on") != "all" and (
        0 < audit.get("tokens", 0) == audit.get("supervised_tokens")
    )


def terminal_cell(text: str, width: int) -> str:
    """A text as a cell of the terminal's table, with a | of its own marked as such."""
    return fit_cell(text.replace("|", "\\|"), width)


def audit_table(audit: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What every source gave, its share and the issues in its rows, as tables that fit 80 columns."""
    rows, shares, issues = (
        [[terminal_cell(name, 15), *rest] for name, *rest in table] for table in setup_sections.audit_tables(audit)
    )
    lines = [*render_table(rows), "", *([*render_table(shares), ""] if shares else [])]
    return [*lines, *(render_table(issues) or ["No issue was found in the rows."])]


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
        return f"Both trained on the same tokens, labels and packing: {plural(a['rows'], 'row')}, {a['sha256'][:16]}."
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
