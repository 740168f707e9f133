"""Rows made by a model: `python -m sft_recipes mode=generate generate.what=replay`.

Tasks and answers by Self-Instruct, answers to your own instructions, or raw text of the model's own for replay; by the
config's model, or at an OpenAI-compatible endpoint: `generate.endpoint='{url: https://…/v1, model: NAME}'`.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from tqdm.auto import tqdm

from sft_recipes.config.endpoint_options import GenerateOptions
from sft_recipes.config.schema import Config
from sft_recipes.data.curate_sources import read_questions
from sft_recipes.errors import ConfigError, plural
from sft_recipes.evaluation.endpoint import Prompt, Reply, total_cost
from sft_recipes.making.model_replies import EndpointModel, LocalModel, Model
from sft_recipes.making.self_instruct import TaskPool, fill_prompt, parse_instances, parse_list, read_seed_tasks
from sft_recipes.reporting.run_folder import write_json
from sft_recipes.training.setup import open_run_folder

log = logging.getLogger(__name__)
COLUMNS = {"self_instruct": "instruction", "answers": "messages", "replay": "text"}  # by which its rows are told
IDLE = 5  # rounds without a new row, after which no more are asked for


def main(config: Config, folder: Path) -> float:
    """Makes rows, prints the result, and returns their number."""
    record = generate(config, folder)
    cost = "" if record["cost"] is None else f" This call cost {record['cost']:g}."
    print(f"{plural(record['rows'], 'row is', 'rows are')} in {record['out']}, {record['made']:,} made now.{cost}")
    for reason, number in record["rejected"].items():
        print(f"  left out: {number:,} · {reason}")
    return record["rows"]


def generate(config: Config, folder: str | Path | None = None) -> dict[str, Any]:
    """What generate.json holds: rows, made, rejected, tokens and cost of this call.

    Adds each row to `config.generate.out` as it is made, after those of earlier calls. What is left out stands with
    its reason in rejected.jsonl of `folder`, else outputs/NAME/DATE_TIME. Raises ConfigError and DataError.
    """
    options = config.generate
    rows = MadeRows(options, open_run_folder(config, folder))
    rows.model = EndpointModel(options.endpoint, options) if options.endpoint else LocalModel(config)
    make = {"self_instruct": make_tasks, "answers": make_answers, "replay": make_replay}[options.what]
    with tqdm(total=rows.wanted, initial=len(rows.rows), desc=options.what) as rows.bar:
        try:
            make(rows, config.seed)
        finally:  # also after Ctrl-C
            record = rows.write_record()
    if not rows.rows:
        often = "".join(f" ({reason})" for reason, _ in rows.reasons.most_common(1))
        raise ConfigError(
            f"generate.what={options.what}: no reply of {rows.model.name} could be used{often}, see {rows.rejected}. "
            "Ask a model that follows instructions: generate.endpoint='{url: https://…/v1, model: M}', or model=NAME."
        )
    return record


class MadeRows:
    """The file that rows are added to, the model that makes them, and the account of this call."""

    model: Model  # loaded once it is known that the file can go on
    bar: tqdm

    def __init__(self, options: GenerateOptions, folder: Path):
        self.options, self.path, self.folder = options, Path(options.out), folder
        self.wanted = options.rows or (None if options.what == "answers" else 100)
        self.rejected, self.reasons = folder / "rejected.jsonl", Counter()
        self.rows = read_made_rows(self.path, COLUMNS[options.what])
        self.before, self.replies = len(self.rows), []

    def ask(self, prompts: list[Prompt], seed: int) -> Iterator[tuple[int, Reply]]:
        """Those of the model's replies that are whole; the others are left out with their reason."""
        for number, reply in self.model.ask(prompts, seed):
            self.replies.append(reply)
            if reply.error or (reply.cut and not isinstance(prompts[number], str)):
                why = f"the request failed: {reply.error}" if reply.error else "the reply is cut off"
                self.reject(why, {"reply": reply.text})
            else:
                yield number, reply

    def add(self, row: dict[str, Any]) -> None:
        """Writes one row."""
        append_line(self.path, row)
        self.rows.append(row)
        if self.bar.update():  # not for every row, since all replies are added up
            cost = self.total_cost()["cost"]
            self.bar.set_postfix_str("" if cost is None else f"cost {cost:g}")

    def reject(self, reason: str, row: dict[str, Any]) -> None:
        """Writes what is left out, and why."""
        self.reasons[reason.partition(":")[0]] += 1
        append_line(self.rejected, {"reason": reason} | row)

    def total_cost(self) -> dict[str, Any]:
        """Tokens and cost of all replies so far, None where no endpoint counts them."""
        endpoint = self.options.endpoint
        nothing = {"input_tokens": None, "output_tokens": None, "cost": None}
        return total_cost(self.replies, endpoint) if endpoint else nothing

    def rounds(self, seed: int) -> Iterator[tuple[int, int]]:
        """A seed and a number of prompts for each round, until all rows are made or IDLE rounds brought nothing new."""
        idle = 0
        while (missing := self.wanted - len(self.rows)) > 0 and idle < IDLE:
            before = len(self.rows)
            # a call that goes on draws with the seeds that come next, and a round that brought nothing is drawn anew
            yield seed + before + 1000 * idle, min(self.model.at_once, missing)
            idle = 0 if len(self.rows) > before else idle + 1
        if missing > 0 and self.rows:
            log.warning("%d rounds brought nothing new, which leaves %d of %d rows.", IDLE, len(self.rows), self.wanted)

    def write_record(self) -> dict[str, Any]:
        """Writes the account of this call, and gives it back."""
        record = {"what": self.options.what, "out": str(self.path), "rows": len(self.rows)}
        record |= {"made": len(self.rows) - self.before, "requests": len(self.replies)}
        record |= {"rejected": dict(self.reasons.most_common())} | self.total_cost()
        write_json(self.folder / "generate.json", record)
        return record


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Adds a line to a .jsonl; raises ConfigError where it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. The rows before it are kept.") from error


def read_made_rows(path: Path, column: str) -> list[dict[str, Any]]:
    """The rows of an earlier call; a last line that was cut off by a crash is removed.

    Raises ConfigError for a file with other rows, which stays as it is.
    """
    if not path.is_file():
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"generate.out={path}: there is no folder {path.parent}.")
        if path.is_dir():
            raise ConfigError(f"generate.out={path} is a folder. Write generate.out={path / 'generated.jsonl'}.")
        return []
    *lines, cut = path.read_bytes().split(b"\n")  # not splitlines: a row's text may hold other line separators
    try:
        rows = [json.loads(line) for line in lines]
        ours = all(column in row and "model" in row for row in rows) and cut[:1] in (b"", b"{")
    except (ValueError, TypeError):
        ours = False
    if not ours:
        raise ConfigError(f"generate.out={path} holds other rows than these. Write another file.")
    os.truncate(path, path.stat().st_size - len(cut))
    return rows


def make_tasks(rows: MadeRows, seed: int) -> None:
    """Self-Instruct: instructions from examples, whether each is a classification, then its examples."""
    options = rows.options
    own, fill = list(dict.fromkeys(row["instruction"] for row in rows.rows)), partial(fill_prompt, options.prompts)
    pool = TaskPool(read_seed_tasks(options.source), own, options.rouge)
    for number, size in rows.rounds(seed):
        draw, new = Random(number), []
        asked = [fill("instructions.txt", examples=pool.draw_examples(draw)) for _ in range(size)]
        for _, reply in rows.ask(asked, number):
            found = parse_list(reply.text)
            if not found:
                rows.reject("no list can be read in the reply", {"reply": reply.text})
            for text in found:
                if reason := pool.try_to_add(text):
                    rows.reject(f"the instruction: {reason}", {"instruction": text})
                else:
                    new.append(text)
        kinds = {}
        for place, reply in rows.ask([fill("is_classification.txt", instruction=text) for text in new], number):
            kinds[new[place]] = reply.text.lower().lstrip(" *\n").startswith("yes")
        new = list(kinds)
        files = ["labelled_instance.txt" if kinds[text] else "instance.txt" for text in new]
        asked = [fill(file, instruction=text) for file, text in zip(files, new, strict=True)]
        for place, reply in rows.ask(asked, number):
            kind = "classification" if kinds[new[place]] else "generation"
            add_instances(rows, {"instruction": new[place], "category": kind}, reply.text)


def add_instances(rows: MadeRows, task: dict[str, str], text: str) -> None:
    """Writes the examples of one task that a reply gives and that pass."""
    found, answers = parse_instances(text), {}
    if not found:
        rows.reject("no example can be read in the reply", {"instruction": task["instruction"]})
    for given, answer in found:
        row = task | {"input": given, "output": answer, "model": rows.model.name}
        if not answer:
            rows.reject("the example: it has no answer", row)
        elif answer in (given, task["instruction"]):
            rows.reject("the example: the answer repeats the task", row)
        elif given in answers:
            other = "" if answers[given] == answer else ", with another answer"
            rows.reject(f"the example: its input is there already{other}", row)
        elif len(rows.rows) < rows.wanted:
            answers[given] = answer
            rows.add(row)


def make_answers(rows: MadeRows, seed: int) -> None:
    """An answer to each of the user's instructions; those that have one from an earlier call are not asked again."""
    source, out = rows.options.source, rows.options.out
    asked = islice(read_questions(f"generate.source={source}", source), rows.wanted)
    questions = dict(enumerate(question["messages"] for question in asked))
    rows.bar.total = len(questions)
    for row in rows.rows:
        if questions.pop(row.get("id"), None) != row["messages"][:-1]:
            raise ConfigError(f"generate.out={out} holds answers to other instructions. Write another file.")
    left = list(questions.items())
    for number, reply in rows.ask([question for _, question in left], seed):
        (place, question), answer = left[number], reply.text.strip()
        if answer:
            messages = [*question, {"role": "assistant", "content": answer}]
            rows.add({"id": place, "messages": messages, "model": rows.model.name})
        else:
            rows.reject("the answer is empty", {"id": place})


def make_replay(rows: MadeRows, seed: int) -> None:
    """Raw text that the model writes when given nothing: replay where its pretraining text is not at hand."""
    known = {row["text"] for row in rows.rows}
    for number, size in rows.rounds(seed):
        for _, reply in rows.ask([""] * size, number):
            text = reply.text.strip()
            if text and text not in known:
                known.add(text)
                rows.add({"text": text, "model": rows.model.name})
            else:
                rows.reject("the text is there already" if text else "the text is empty", {"text": text})
