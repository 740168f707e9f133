"""Bad rows, near-duplicates and leaks out of data: `python -m sft_recipes data=lima mode=curate curation=light`.

No weights are loaded. The kept conversations are read back with `data=file data.file.data_files=…/curated.jsonl`.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from sft_recipes.config.schema import Config
from sft_recipes.data.curate_sources import curate_sources, find_source_leaks
from sft_recipes.data.prepare import count_text, open_source
from sft_recipes.data.sources import check_readers
from sft_recipes.errors import ConfigError, plural
from sft_recipes.modeling.loading import load_tokenizer
from sft_recipes.reporting.curation_report import curation_tables, write_curation_report
from sft_recipes.reporting.run_folder import write_json, write_jsonl
from sft_recipes.reporting.text import render_table
from sft_recipes.training.setup import open_run_folder

log = logging.getLogger(__name__)


def main(config: Config, folder: Path) -> float:
    """Curates, prints what was found, and gives back the share of the rows that were kept."""
    record = curate(config, folder)
    for table in curation_tables(record):
        print("\n".join([*render_table(table), ""]))
    for warning in record["diversity"]["warnings"]:
        log.warning(warning)
    kept = f"{record['kept']:,} of {plural(record['rows'], 'row')} {'is' if record['kept'] == 1 else 'are'}"
    print(f"{kept} in {folder / f'curated.{config.curation.output}'}.")
    return record["kept"] / max(1, record["rows"])


def curate(config: Config, folder: str | Path | None = None) -> dict[str, Any]:
    """What curation.json holds: rows, kept, removed, findings, diversity.

    Writes it into `folder`, else outputs/NAME/DATE_TIME, with curated.jsonl (or .parquet), removed.jsonl, which has
    the reasons for every removed row, and the report. All rows of a source are looked at, whatever data.held_out says;
    leaks are those of its held-out split and of curation.decontaminate.
    """
    if config.streamed:
        raise ConfigError("mode=curate needs all rows at once. Write data.NAME.streaming=false.")
    check_readers(config)
    folder = open_run_folder(config, folder)
    tokenizer = load_tokenizer(config.model)[0]
    whole = replace(config, sources={name: replace(one, held_out=0) for name, one in config.sources.items()})
    sources = {name: open_source(name, whole) for name, source in config.sources.items() if source.split}
    is_leak = find_source_leaks(config, sources.values())
    curation, record = curate_sources(config, sources, partial(count_text, tokenizer), is_leak)
    rows = [plain_row(curation.conversations[place]) for place in curation.remaining()]
    if config.curation.output == "parquet":
        Dataset.from_dict(as_columns(rows)).to_parquet(folder / "curated.parquet")
    else:
        write_jsonl(folder / "curated.jsonl", rows)
    removed = []
    for place, reasons in sorted(curation.reasons.items()):
        source, row = curation.origins[place]
        found = {"source": source, "row": row, "reasons": reasons, "score": curation.scores[place]}
        removed.append(found | plain_row(curation.conversations[place]))
    write_jsonl(folder / "removed.jsonl", removed)
    write_json(folder / "curation.json", record)
    write_curation_report(folder, config.name, record)
    return record


def as_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows by column, with JSON texts, which the formatters read, in the place of what Arrow would give one type
    and fill up with nulls: tools, settings of the template, and messages where some of them call tools.
    """
    calls = any(message.get("tool_calls") for row in rows for message in row.get("messages", ()))
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    for key in columns.keys() & {"tools", "chat_template_kwargs", *(["messages"] if calls else [])}:
        columns[key] = [value and json.dumps(value, ensure_ascii=False) for value in columns[key]]
    return columns


def plain_row(conversation: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation as the formatters chatml and text read it back."""
    return json.loads(json.dumps({key: value for key, value in conversation.items() if value not in (None, [], {})}))
