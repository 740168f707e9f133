"""What mode=curate found, as report.md and report.html."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_recipes.reporting.document import Picture, save_pictures, write_pages
from sft_recipes.reporting.figures import styled_subplots
from sft_recipes.reporting.text import Rows, compact_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curation_tables(record: Mapping[str, Any]) -> list[Rows]:
    """The findings, types of task, lengths, leading verbs and languages; tables without a row are left out."""
    findings = [["finding", "rows", "removed", "for example"]]
    for name, entry in record["findings"].items():
        first = "; ".join(f"{e['source']} {e['row']}: {e['reason']}" for e in entry["examples"][:1])
        findings.append([name.replace("_", " "), f"{entry['rows']:,}", f"{entry['removed']:,}", first])
    found = record["diversity"]
    rows = max(1, found["rows"])
    tasks = [["type of task", "rows", "share"]]
    tasks += [[task, f"{number:,}", f"{number / rows:.1%}"] for task, number in found["tasks"].items()]
    lengths = [["", *found["answer_tokens"]]]
    keys = {"instruction, tokens": "instruction_tokens", "answer, tokens": "answer_tokens", "turns": "turns"}
    for label, key in keys.items():
        lengths.append([label, *(f"{value:,}" for value in found[key].values())])
    verbs = [["leading verb", "rows", "with objects"]]
    for verb, number in list(found["verbs"].items())[:10]:
        objects = ", ".join(f"{what} {times:,}" for what, times in found["objects"][verb].items())
        verbs.append([verb, f"{number:,}", objects])
    languages = [["language of the answers", "rows"]]
    languages += [[name, f"{number:,}"] for name, number in (found["languages"] or {}).items()]
    return list(filter(None, map(compact_table, (findings, tasks, lengths, verbs, languages))))


def draw_lengths(counts: Mapping[str, Mapping[int, int]]) -> "Figure":
    """How many rows have instructions and answers of so many tokens; the last bar holds the longer ones, too."""
    figure, axes = styled_subplots(1, 2, height=2.6)
    for side, (name, rows) in zip(axes, counts.items(), strict=True):
        bounds = [*rows, 0, 1][:2]
        side.bar(rows.keys(), rows.values(), width=0.9 * max(1, bounds[1] - bounds[0]), align="edge")
        side.set_title(f"{name.partition('_')[0]}s")
        side.set_xlabel("tokens")
    axes[0].set_ylabel("rows")
    return figure


def write_curation_report(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Writes `report.md`, `report.html` and `lengths.png`."""
    lengths = Picture(draw_lengths(record["diversity"]["length_counts"]), "lengths.png", "Rows by their lengths")
    save_pictures(folder, [lengths])
    values = {"record": record, "tables": curation_tables(record), "lengths": lengths}
    write_pages(folder, "curation.jinja", f"{name}: curation", **values)
