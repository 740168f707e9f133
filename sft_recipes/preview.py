"""What the trainer will get, before any weights are loaded: `python -m sft_recipes +recipe=lima mode=preview`."""

import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from hydra.core.hydra_config import HydraConfig
from trl import SFTConfig

from sft_recipes import comparison, memory, streaming
from sft_recipes.adapters import peft_config, quantization_config
from sft_recipes.arguments import trainer_arguments
from sft_recipes.binding import call
from sft_recipes.config import Config
from sft_recipes.data import Data, load, streamed
from sft_recipes.encoding import Encoder
from sft_recipes.mask import STYLE, Token, html, terminal, tokens
from sft_recipes.model import load_tokenizer
from sft_recipes.packing import pack
from sft_recipes.report import ledger_table
from sft_recipes.rows import lengths_of
from sft_recipes.sources import find_formatter, load_rows, sources


@dataclass(frozen=True)
class Options:
    """The config's `preview`."""

    rows: int = 1  # drawn, besides the first and the longest


def main(config: Config) -> float:
    """Prints a few rows, raw, as messages, as text and as supervised tokens, then the counts; writes preview.html."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    arguments, _ = trainer_arguments(config, folder)
    call(comparison.Options, config.evaluate, "evaluate")
    drawn = call(Options, config.preview, "preview").rows
    peft_config(config.adapter)
    quantization_config(config.adapter)
    tokenizer, template, new = call(load_tokenizer, config.model, "model")
    encoder = Encoder(tokenizer, template)
    if streamed(config):
        data, _ = streaming.load(config, encoder, arguments.max_length, arguments.packing)
    else:
        data = load(config, encoder, arguments.max_length)
    width = shutil.get_terminal_size().columns
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    page = [f"<!doctype html><meta charset=utf-8><title>{escape(config.name)}: preview</title>{STYLE}"]
    for why, index in chosen(data.train, drawn, config.seed):
        shown = steps(config, encoder, data.train[index])
        title = f"{why} row: {shown['title']}"
        mask = tokens(encoder, data.train[index]["input_ids"], data.train[index]["labels"])
        print(title, "=" * len(title), sep="\n")
        for label in ("raw", "messages", "text"):
            print(f"\n{label}:\n{cut(shown[label])}")
        marks = "on green, the stop token on yellow" if colour else "between ⟦ and ⟧, ■ behind the stop token"
        print(f"\ntokens, with loss {marks}:")
        print(terminal(mask, width, colour), end="\n\n")
        page.append(section(title, shown, mask))
    longest = arguments.max_length if arguments.packing else int(lengths_of(data.train).max())
    summary = f"{counts(data, arguments)}\n{memory_lines(config, longest, new)}"
    print(summary)
    page.append(f"<pre>{escape(summary)}</pre>")
    (folder / "preview.html").write_text("\n".join(page), encoding="utf-8")
    there = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    print(f"\n{there / 'preview.html'} shows the same in a browser.")
    return 0.0


def chosen(rows: Dataset, drawn: int, seed: int) -> list[tuple[str, int]]:
    """The first row in the order of the files, the longest, and some drawn with the run's seed; each once."""
    first, longest = int(np.lexsort((rows["row"], rows["source"]))[0]), int(lengths_of(rows).argmax())
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    others = [index for index in order if index not in (first, longest)][:drawn]
    found = dict.fromkeys(others, "drawn") | {longest: "longest", first: "first"}
    return [(found[index], index) for index in dict.fromkeys([first, longest, *others])]


def steps(config: Config, encoder: Encoder, row: dict) -> dict[str, str]:
    """One training row on its way: as it stands in its file, as messages, as rendered text."""
    name = list(sources(config))[row["source"]]
    source = sources(config)[name]
    rows = load_rows(name, source, source.split)
    raw = next(iter(rows.skip(row["row"])))
    conversation = find_formatter(name, source, config.formatter, rows.column_names)(raw)
    text = conversation["text"] if "text" in conversation else encoder.render(**conversation)[0]
    return {
        "title": f"data.{name} {row['row']}, {len(row['input_ids'])} tokens",
        "raw": json.dumps(raw, indent=2, ensure_ascii=False, default=str),
        "messages": json.dumps(conversation.get("messages", "(raw text, no messages)"), indent=2, ensure_ascii=False),
        "text": text,
    }


def cut(text: str, lines: int = 24) -> str:
    """The first lines of a long text, and how many more there are."""
    rows = text.splitlines()
    return "\n".join([*rows[:lines], f"… {len(rows) - lines} more lines"] if len(rows) > lines else rows)


def counts(data: Data, arguments: SFTConfig) -> str:
    """The ledger, the lengths, and the steps they make."""
    lengths, rows = lengths_of(data.train), len(data.train)
    lines = [*ledger_table(data.ledger), "", "Tokens a row:", *histogram(lengths), ""]
    if arguments.packing:
        rows = len(pack(lengths, arguments.max_length))
        fill = lengths.sum() / rows / arguments.max_length
        lines.append(f"Packed into {rows:,} rows of {arguments.max_length} tokens, {fill:.1%} full.")
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps > 0:
        lines.append(f"{arguments.max_steps:,} steps of {batch} rows.")
    else:
        steps, epochs = math.ceil(rows / batch), arguments.num_train_epochs
        lines.append(f"{steps:,} steps an epoch of {batch} rows; {epochs:g} epochs.")
    return "\n".join(lines)


def memory_lines(config: Config, length: int, new: list[int]) -> str:
    """What the run will hold here at its peak; without a GPU, also what it would hold on one."""
    here, there = memory.estimate(config, length, new=new), memory.available()
    lines = memory.text(here, there)
    if here.total > there:
        lines += f"\nIt does not fit. {memory.advice(config, length, there, new=new)}"
    if not torch.cuda.is_available():
        lines += f"\n  On a GPU, in bf16: {memory.gib(memory.estimate(config, length, gpu=True, new=new).total)}."
    return lines


def histogram(lengths: np.ndarray, bars: int = 10, width: int = 40) -> list[str]:
    """How many rows have how many tokens, as bars of whole numbers.

    >>> histogram(np.array([3, 4, 4, 9]), bars=4, width=4)
    ['3 to 4 ████ 3', '5 to 6 0', '7 to 8 0', '9 to 9 ██ 1']
    >>> histogram(np.array([3, 4, 4]), width=4)
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


def section(title: str, shown: dict[str, str], mask: list[Token]) -> str:
    """One row of preview.html."""
    folded = (
        f"<details><summary>{key}</summary><pre>{escape(shown[key])}</pre></details>"
        for key in ("raw", "messages", "text")
    )
    return f"<h2>{escape(title)}</h2>{''.join(folded)}{html(mask)}"
