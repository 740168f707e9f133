"""What mode=curate found, as report.md and report.html."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes.reporting.document import render_html, render_markdown
from sft_recipes.reporting.result_tables import Rows, with_body


def curation_tables(record: Mapping[str, Any]) -> list[Rows]:
    """The findings, the types of task, the lengths and the leading verbs; those without a row are left out."""
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
    verbs = [["leading verb", "rows"], *([verb, f"{number:,}"] for verb, number in list(found["verbs"].items())[:10])]
    return [table for table in map(with_body, (findings, tasks, lengths, verbs)) if table]


def write_curation_report(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Writes `report.md` and `report.html`."""
    values = {"title": f"{name}: curation", "record": record, "tables": curation_tables(record)}
    (folder / "report.md").write_text(render_markdown("curation.jinja", **values), encoding="utf-8")
    (folder / "report.html").write_text(render_html("curation.jinja", **values), encoding="utf-8")
