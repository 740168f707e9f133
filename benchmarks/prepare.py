"""Real rows to packed ids and labels, by TRL, by us, and the bare tokenizer: `python benchmarks/prepare.py`."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import datasets
import numpy as np
from datasets import Dataset
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from sft_recipes.config.schema import from_hydra
from sft_recipes.data import prepare
from sft_recipes.data.formatters import Conversation, alpaca, sharegpt
from sft_recipes.data.packing import pack_rows
from sft_recipes.data.prepare import check_sources, encode_sources
from sft_recipes.data.raw_rows import ArrowRows
from sft_recipes.data.token_rows import count_tokens
from sft_recipes.encoding.chat_template import prepare_tokenizer
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.encoding.rendering import render_template

DATA = Path(__file__).parents[2] / "shared" / "data"
FILES = {"alpaca_en_demo": alpaca, "gpteacher_roleplay": alpaca, "gsm8k_train": alpaca}
FILES |= {"glaive_toolcall_en_demo": sharegpt}
MAX_LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the rows and the tokenizer")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    options = parser.parse_args()
    datasets.disable_caching()  # and the rows are in memory, where datasets caches nothing: every round computes anew
    datasets.disable_progress_bars()
    sources = real_rows(options.data)
    tokenizer, template = neox(options.data)
    conversations = [FILES[name](row) for name, rows in sources.items() for row in rows]
    messages = Dataset.from_list([trl_form(each) for each in conversations], on_mixed_types="use_json")
    texts = [render_template(tokenizer, template, each["messages"], each.get("tools"))[0] for each in conversations]
    sides = {
        "TRL: messages, masks, labels, bfd": lambda: trl(messages, tokenizer, template),
        "ours: raw rows, formatters, labels": lambda: ours(sources, options.data, tokenizer, template),
        "bare tokenizer: encode_batch": lambda: bare(texts, tokenizer),
    }
    print(f"{machine()}\n{len(texts):,} rows, NeoX tokenizer, ChatML, max_length {MAX_LENGTH}, packed\n")
    seconds, cores, (by_trl, by_us, by_none) = alternate(sides, options.rounds)
    first, second, third = seconds
    print(f"\nOurs is {first / second:.2f} times as fast as TRL and reaches {third / second:.0%} of the bare rate;")
    print(f"the bare tokenizer is {first / third:.2f} times as fast as TRL.")
    print(f"It had {cores[-1]:.1f} cores to itself: the fewer, the less parallel work shows (TRL uses one).\n")
    print(f"TRL:  {summary(by_trl)}\nours: {summary(by_us)}\nbare: {sum(map(len, by_none)):,} tokens")
    print("\nNot the same work: ours also turns raw rows into checked messages, which TRL's were before the clock ran.")
    print("Both start in memory, render, encode, mask and pack. The texts for the bare tokenizer were rendered before.")


def real_rows(folder: Path) -> dict[str, Dataset]:
    """The four files as datasets of their raw rows; exits where the folder is not there."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not here. Give the folder of the rows: --data path/to/data")
    return {name: Dataset.from_list(json.loads((folder / f"{name}.json").read_text("utf-8"))) for name in FILES}


def neox(folder: Path) -> tuple[PreTrainedTokenizerFast, str]:
    """GPT-NeoX's tokenizer with ChatML's control tokens, and the template with markers."""
    file, end = str(folder / "neox_20b_tokenizer.json"), "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, eos_token=end, bos_token=end)
    return tokenizer, prepare_tokenizer(tokenizer, "chatml")[0]


def trl_form(conversation: Conversation) -> Conversation:
    """The conversation as TRL's documentation has it: messages of role, content and tool calls, tools as JSON text."""
    kept = ("role", "content", "tool_calls")
    messages = [{key: message[key] for key in kept if key in message} for message in conversation["messages"]]
    return {"messages": messages, "tools": json.dumps(conversation["tools"]) if conversation.get("tools") else None}


def trl(messages: Dataset, tokenizer: PreTrainedTokenizerFast, template: str) -> Dataset:
    """TRL's own code. Of the trainer it reads three attributes, which stand in here, so that no model is built."""
    arguments = SFTConfig(max_length=MAX_LENGTH, packing=True, assistant_only_loss=True, bf16=False)
    trainer = SimpleNamespace(chat_template=template, completion_only_loss=False, _tokenizer=tokenizer)
    return SFTTrainer._prepare_dataset(trainer, messages, tokenizer, arguments, True, None, "train")


def ours(sources: dict[str, Dataset], folder: Path, tokenizer: PreTrainedTokenizerFast, template: str) -> Dataset:
    """A run's own code, `data.prepare` and `packed`, all rows to train on; only reading the files is left out."""
    entries = {name: {"data_files": str(folder / f"{name}.json")} for name in sources} | {"held_out": 0}
    rest = {"name": "benchmark", "model": {"id": "none"}, "formatter": {"name": "auto"}, "adapter": {}, "trainer": {}}
    rest |= {"curation": {"leaks": None, "near_duplicates": None}}  # which TRL does not look for
    with patch.object(prepare, "load_rows", lambda where, *_: ArrowRows(sources[where.removeprefix("data.")])):
        config = from_hydra(OmegaConf.create(rest | {"data": entries, "evaluate": {}}))
        rows = check_sources(config, encode_sources(config, Encoder(tokenizer, template)), MAX_LENGTH).train
    return pack_rows(rows, MAX_LENGTH, config.seed)


def bare(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list:
    """Rendered texts to ids and nothing else."""
    return tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)


def alternate(sides: dict[str, Callable], rounds: int) -> tuple[list[float], list[float], list]:
    """Every side's best wall time, the cores it kept busy then, and its last result; they take turns. Prints it all."""
    wall, cpu, results = {name: [] for name in sides}, {name: [] for name in sides}, {}
    for _ in range(rounds):
        for name, side in sides.items():
            results.pop(name, None)
            start, used = time.perf_counter(), time.process_time()
            results[name] = side()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
    width, seconds, cores = max(map(len, sides)), [], []
    print(f"{'seconds':{width}}  {'best':>7}  {'its CPU':>7}  all rounds")
    for name, times in wall.items():
        best = int(np.argmin(times))
        every = " ".join(f"{each:.2f}" for each in times)
        print(f"{name:{width}}  {times[best]:7.2f}  {cpu[name][best]:7.2f}  {every}")
        seconds.append(times[best])
        cores.append(cpu[name][best] / times[best])
    return seconds, cores, list(results.values())


def summary(rows: Dataset) -> str:
    """How many packed rows and tokens there are."""
    counts = count_tokens(rows)
    full = counts["tokens"] / len(rows) / MAX_LENGTH
    return f"{counts['tokens']:,} tokens, {counts['supervised_tokens']:,} supervised, {len(rows)} rows {full:.1%} full"


def machine() -> str:
    """The machine and the versions that the numbers belong to."""
    names = ("sft-recipes", "trl", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    cores = len(os.sched_getaffinity(0))
    return f"{cores} CPUs, load {load}; Python {platform.python_version()}, " + ", ".join(
        f"{name} {version(name)}" for name in names
    )


if __name__ == "__main__":
    main()
