"""What the trainer will get, before any weights are loaded: `python -m sft_recipes +recipe=lima mode=preview`."""

import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from sft_recipes.config.schema import Config
from sft_recipes.data.mask_view import MASK_STYLE, Token, mask_tokens, render_html, render_terminal
from sft_recipes.data.packing import pack_lengths
from sft_recipes.data.sources import find_formatter, load_rows
from sft_recipes.data.token_rows import row_lengths
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.reporting.run_report import audit_table
from sft_recipes.training.memory import (
    available_memory,
    describe_memory,
    describe_step,
    estimate_memory,
    format_bytes,
    memory_advice,
)
from sft_recipes.training.setup import RunSetup, open_run_folder, set_up_run


@dataclass(frozen=True)
class Preview:
    """What a run will train on: as text for a terminal, as HTML in a notebook."""

    text: str
    html: str

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def main(config: Config, folder: Path) -> float:
    """Prints what `preview` returns."""
    print(preview(config, folder))
    return 0.0


def preview(config: Config, folder: str | Path | None = None) -> Preview:
    """A few rows, raw, as messages, as text and as supervised tokens, then what the data checks counted.

    Writes preview.html into `folder`, else outputs/NAME/DATE_TIME. Loads no weights.
    """
    setup = set_up_run(config, folder := open_run_folder(config, folder))
    encoder, rows = setup.encoder, setup.data.train
    width = shutil.get_terminal_size().columns
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    page = [f"<!doctype html><meta charset=utf-8><title>{escape(config.name)}: preview</title>{MASK_STYLE}"]
    lines = []
    for why, index in select_rows(rows, config.preview.rows, config.seed):
        shown = row_steps(config, encoder, rows[index])
        title = f"{why} row: {shown['title']}"
        mask = mask_tokens(encoder, rows[index]["input_ids"], rows[index]["labels"])
        lines += [title, "=" * len(title)]
        for label in ("raw", "messages", "text"):
            lines.append(f"\n{label}:\n{cut_lines(shown[label])}")
        marks = "on green, the stop token on yellow" if colour else "between ⟦ and ⟧, ■ behind the stop token"
        lines += [f"\ntokens, with loss {marks}:", render_terminal(mask, width, colour) + "\n"]
        page.append(html_section(title, shown, mask))
    summary = f"{describe_counts(setup)}\n{describe_memory_need(setup)}"
    page.append(f"<pre>{escape(summary)}</pre>")
    (folder / "preview.html").write_text("\n".join(page), encoding="utf-8")
    shown_folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    lines += [summary, f"\n{shown_folder / 'preview.html'} shows the same in a browser."]
    return Preview("\n".join(lines), "\n".join(page))


def select_rows(rows: Dataset, drawn: int, seed: int) -> list[tuple[str, int]]:
    """The first row in the order of the files, the longest, and some drawn with the run's seed; each once."""
    first, longest = int(np.lexsort((rows["row"], rows["source"]))[0]), int(row_lengths(rows).argmax())
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    others = [index for index in order if index not in (first, longest)][:drawn]
    found = dict.fromkeys(others, "drawn") | {longest: "longest", first: "first"}
    return [(found[index], index) for index in dict.fromkeys([first, longest, *others])]


def row_steps(config: Config, encoder: Encoder, row: dict) -> dict[str, str]:
    """One training row on its way: as it stands in its file, as messages, as rendered text."""
    name, source = list(config.sources.items())[row["source"]]
    rows = load_rows(name, source, source.split)
    raw = next(iter(rows.skip(row["row"])))
    conversation = find_formatter(name, source, config.formatter, rows.column_names)(raw)
    given = (conversation.get(key) for key in ("messages", "tools", "chat_template_kwargs"))
    text = conversation["text"] if "text" in conversation else encoder.render(*given)[0]
    return {
        "title": f"data.{name} {row['row']}, {len(row['input_ids'])} tokens",
        "raw": json.dumps(raw, indent=2, ensure_ascii=False, default=str),
        "messages": json.dumps(conversation.get("messages", "(raw text, no messages)"), indent=2, ensure_ascii=False),
        "text": text,
    }


def cut_lines(text: str, lines: int = 24) -> str:
    """The first lines of a long text, and how many more there are."""
    rows = text.splitlines()
    return "\n".join([*rows[:lines], f"… {len(rows) - lines} more lines"] if len(rows) > lines else rows)


def describe_counts(setup: RunSetup) -> str:
    """What the data checks counted, the lengths, and the steps they make."""
    arguments, lengths = setup.arguments, row_lengths(setup.data.train)
    lines = [*audit_table(setup.data.audit), "", "Tokens a row:", *length_histogram(lengths), ""]
    rows = len(lengths)
    if arguments.packing:
        rows = len(pack_lengths(lengths, arguments.max_length))
        fill = lengths.sum() / rows / arguments.max_length
        lines.append(f"Packed into {rows:,} rows of {arguments.max_length} tokens, {fill:.1%} full.")
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps > 0:
        lines.append(f"{arguments.max_steps:,} steps of {batch} rows.")
    else:
        steps, epochs = math.ceil(rows / batch), arguments.num_train_epochs
        lines.append(f"{steps:,} steps an epoch of {batch} rows; {epochs:g} epochs.")
    return "\n".join(lines)


def describe_memory_need(setup: RunSetup) -> str:
    """What the run will hold here at its peak; without a GPU, also what it would hold on one."""
    step = describe_step(setup.config, setup.arguments, setup.longest, setup.new_token_ids)
    estimate, available = estimate_memory(step), available_memory()
    lines = describe_memory(estimate, available)
    if estimate.total > available:
        lines += f"\nIt does not fit. {memory_advice(step, available)}"
    if not torch.cuda.is_available():
        lines += f"\n  On a GPU, in bf16: {format_bytes(estimate_memory(replace(step, gpu=True)).total)}."
    return lines


def length_histogram(lengths: np.ndarray, bars: int = 10, width: int = 40) -> list[str]:
    """How many rows have how many tokens, as bars of whole numbers.

    >>> length_histogram(np.array([3, 4, 4, 9]), bars=4, width=4)
    ['3 to 4 ████ 3', '5 to 6 0', '7 to 8 0', '9 to 9 ██ 1']
    >>> length_histogram(np.array([3, 4, 4]), width=4)
    ['3 ██ 1', '4 ████ 2']
    """
    least, most = int(lengths.min()), int(lengths.max())
    step = math.ceil((most - least + 1) / bars)
    starts, label, lines = range(least, most + 1, step), len(str(most)), []
    numbers = np.bincount((lengths - least) // step)
    for start, number in zip(starts, numbers, strict=True):
        name = f"{start:>{label}}" + (f" to {min(start + step - 1, most):<{label}}" if step > 1 else "")
        bar = "█" * math.ceil(width * number / numbers.max())
        lines.append(" ".join(filter(None, [name, bar, f"{number:,}"])))
    return lines


def html_section(title: str, shown: dict[str, str], mask: list[Token]) -> str:
    """One row of preview.html."""
    folded = (
        f"<details><summary>{key}</summary><pre>{escape(shown[key])}</pre></details>"
        for key in ("raw", "messages", "text")
    )
    return f"<h2>{escape(title)}</h2>{''.join(folded)}{render_html(mask)}"
