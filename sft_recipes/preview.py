"""What the trainer will get, before any weights are loaded: `python -m sft_recipes +recipe=lima mode=preview`."""

import json
import logging
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from markupsafe import Markup

from sft_recipes.config.schema import Config
from sft_recipes.data.fields import RowFields
from sft_recipes.data.issues import ISSUE_BIT
from sft_recipes.data.mask_view import MASK_LEGEND, MASK_STYLE, Token, mask_tokens, render_html, render_terminal
from sft_recipes.data.packing import pack_lengths
from sft_recipes.data.prepare import TrainingData, with_settings
from sft_recipes.data.sources import find_formatter, load_rows, stream_rows
from sft_recipes.data.token_rows import row_lengths
from sft_recipes.encoding.encoder import IGNORE_INDEX
from sft_recipes.errors import is_first_process, plural, printable
from sft_recipes.reporting.document import wrap_html
from sft_recipes.reporting.run_report import audit_table
from sft_recipes.training import memory
from sft_recipes.training.run_metadata import describe_time, measure_padding
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
    """Prints what `preview` returns, in the first of several processes."""
    result = preview(config, folder)
    if is_first_process():
        print(result)
    return 0.0


def preview(config: Config, folder: str | Path | None = None) -> Preview:
    """A few rows, raw, as messages, as text and as supervised tokens, then what the data checks counted.

    Writes preview.html, and preview.jsonl for tools, into `folder`, else outputs/NAME/DATE_TIME. Loads no weights.
    """
    setup = set_up_run(config, folder := open_run_folder(config, folder))
    width, colour = shutil.get_terminal_size().columns, sys.stdout.isatty() and "NO_COLOR" not in os.environ
    marks = "on green, the stop token on yellow" if colour else "between ⟦ and ⟧, ■ behind the stop token"
    lines, records, page = [], [], [MASK_STYLE, MASK_LEGEND]
    for why, record, messages, mask in describe_rows(setup, select_rows(setup.data, config.preview.rows, config.seed)):
        records.append(record)
        title = f"{why} row: data.{record['source']} {record['row']}, {len(record['input_ids'])} tokens".strip()
        texts = {
            "raw": json.dumps(record["raw"], indent=2, ensure_ascii=False, default=str),
            "messages": json.dumps(messages or "(raw text, no messages)", indent=2, ensure_ascii=False),
            "text": record["text"],
        }
        lines += [title, "=" * len(title), *(f"\n{key}:\n{cut_lines(printable(text))}" for key, text in texts.items())]
        lines += [f"\ntokens, with loss {marks}:", render_terminal(mask, width, colour) + "\n"]
        page.append(f"<h2>{escape(title)}</h2>")
        page += [f"<details><summary>{key}</summary><pre>{escape(text)}</pre></details>" for key, text in texts.items()]
        page.append(render_html(mask))
    lines.append(summary := describe_training(setup))
    html = printable("\n".join([*page, f"<pre>{escape(summary)}</pre>"]))
    if setup.arguments.process_index == 0:  # of several processes the first one writes
        (folder / "preview.html").write_text(wrap_html(f"{config.name}: preview", Markup(html)), encoding="utf-8")
        written = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
        (folder / "preview.jsonl").write_text("".join(written), encoding="utf-8")
    shown_folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    lines.append(f"\n{shown_folder / 'preview.html'} shows the same in a browser.")
    return Preview("\n".join(lines), html)


def select_rows(data: TrainingData, drawn: int | str, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """The first training row in the order of the files, the longest, and some drawn with the run's seed; each once.

    `all` gives every row in the order of the files, those that a check or their length left out, too.
    """
    rows = data.train
    if drawn == "all" and data.left_out is not None:
        rows = concatenate_datasets([rows, data.left_out])
    by_file = np.lexsort((rows["piece"], rows["row"], rows["source"]))
    if drawn == "all":
        return [("left out" if index >= len(data.train) else "", rows[index]) for index in by_file.tolist()]
    first, longest = int(by_file[0]), int(row_lengths(rows).argmax())
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    others = [index for index in order if index not in (first, longest)][:drawn]
    found = dict.fromkeys(others, "drawn") | {longest: "longest", first: "first"}
    return [(found[index], rows[index]) for index in dict.fromkeys([first, longest, *others])]


def describe_rows(
    setup: RunSetup, chosen: Sequence[tuple[str, dict[str, Any]]]
) -> Iterator[tuple[str, dict[str, Any], list | None, list[Token]]]:
    """For each row why it is shown, its line of preview.jsonl, its messages, which raw text lacks, and its tokens."""
    names, encoder = list(setup.config.sources), setup.encoder
    sources = []
    for place, name in enumerate(names):
        numbers = sorted({row["row"] for _, row in chosen if row["source"] == place})
        sources.append(read_raw_rows(setup, name, numbers))
    for why, row in chosen:
        name, ids, (raw_rows, formatter) = names[row["source"]], row["input_ids"], sources[row["source"]]
        raw, source = raw_rows[row["row"]], setup.config.sources[name]
        conversation = with_settings(formatter(raw), source.chat_template_kwargs)
        if "messages" in conversation:
            context = encoder.contexts(conversation, source.train_on, source.unroll)[-1 - row["piece"]]
            conversation = context.conversation
            text = "".join(text for _, text, _ in context.pieces)
        else:  # which may be a piece of a longer one
            whole = row["piece"] == 0 and ids[-1] == encoder.tokenizer.eos_token_id
            text = conversation["text"] if whole else encoder.tokenizer.decode(ids)
        labels = [IGNORE_INDEX] * len(ids) if why == "left out" else row["labels"]  # no loss is taken on it
        mask, fields = mask_tokens(encoder, ids, labels), RowFields(formatter)
        record = {"source": name, "row": row["row"]} | ({"piece": row["piece"]} if row["piece"] >= 0 else {})
        record |= {"raw": dict(raw), "text": text, "input_ids": ids, "labels": labels}
        record |= {"supervised": supervised_texts(mask), "unread": fields.unread(fields.parse(raw))}
        record["checks"] = [issue for issue, bit in ISSUE_BIT.items() if row["problems"] & bit]
        record["left_out"] = why == "left out"
        yield why, record, conversation.get("messages"), mask


def read_raw_rows(setup: RunSetup, name: str, numbers: Sequence[int]) -> tuple[dict[int, Any], Any]:
    """The rows of these numbers, in order, as they stand in a source's split, and the source's formatter."""
    source, where, wanted = setup.config.sources[name], f"data.{name}", set(numbers)
    if not numbers:
        return {}, None
    if setup.stream:
        records = islice(stream_rows(where, source, source.split), numbers[-1] + 1)
        return {number: row for number, row, _ in records if number in wanted}, setup.stream.formatters[name]
    rows = load_rows(where, source, source.split)
    formatter = find_formatter(name, source, setup.config.formatter, rows.columns, logging.DEBUG)  # it has been told
    return {number: row for number, row, _ in rows.records(numbers)}, formatter


def supervised_texts(mask: Sequence[Token]) -> list[str]:
    """The texts that carry loss, in order, each without the stop token at its end and what is behind it.

    >>> supervised_texts([("Hi?", False, False), ("No", True, False), (".", True, False), ("</s>", True, True)])
    ['No.']
    """
    texts = []
    for supervised, tokens in groupby(mask, key=lambda token: token[1]):
        if supervised:
            tokens = list(tokens)
            ends = [place for place, (_, _, stop) in enumerate(tokens) if stop and place >= len(tokens) - 2]
            texts.append("".join(text for text, _, _ in tokens[: ends[-1] if ends else None]))
    return texts


def cut_lines(text: str, lines: int = 24) -> str:
    """The first lines of a long text, and how many more there are."""
    rows = text.splitlines()
    return "\n".join([*rows[:lines], f"… {len(rows) - lines} more lines"] if len(rows) > lines else rows)


def describe_training(setup: RunSetup) -> str:
    """What the data checks counted, the lengths, the steps they make, the memory that takes here, and the time.

    Without a GPU also what it would hold on one.
    """
    arguments, lengths = setup.arguments, row_lengths(setup.data.train)
    lines = [*audit_table(setup.data.audit), "", "Tokens a row:", *length_histogram(lengths), ""]
    rows = len(lengths)
    if arguments.packing:
        rows = len(pack_lengths(lengths, arguments.max_length))
        fill = lengths.sum() / rows / arguments.max_length
        lines.append(f"Packed into {plural(rows, 'row')} of {arguments.max_length} tokens, {fill:.1%} full.")
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps, epochs = math.ceil(rows / batch), arguments.num_train_epochs
    if arguments.max_steps > 0:
        epochs = arguments.max_steps * batch / rows
        lines.append(f"{plural(arguments.max_steps, 'step')} of {plural(batch, 'row')}.")
    else:
        lines.append(
            f"{plural(steps, 'step')} an epoch of {plural(batch, 'row')}; {epochs:g} epoch{'s' * (epochs != 1)}."
        )
    step = memory.describe_step(setup.config, arguments, setup.longest, setup.new_token_ids)
    estimate, available = memory.estimate_if_possible(step), memory.available_memory()
    if estimate is None:
        return "\n".join(lines)
    lines.append(memory.describe_memory(estimate, available))
    if estimate.total > available:
        lines.append(f"It does not fit. {memory.memory_advice(step, available)}")
    if not torch.cuda.is_available():
        on_gpu = memory.estimate_memory(replace(step, gpu=True)).total
        lines.append(f"  On a GPU, in bf16: {memory.format_bytes(on_gpu)}.")
    tokens = epochs * lengths.sum() / (1 - measure_padding(setup.data.train, arguments))
    again, devices = arguments.activation_checkpointing, arguments.world_size
    return "\n".join(
        [*lines, *textwrap.wrap(describe_time(tokens, estimate, setup.config.preview, again, devices), 79)]
    )


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
