"""A run's folder as report.md, a sweep's, or two runs compared: `python -m sft_recipes.report outputs/lima/<date>`."""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_recipes import sweep

LOSS_COLUMNS = (("loss", ".4f"), ("eval_loss", ".4f"), ("learning_rate", ".2e"))


def write(folder: Path) -> str:
    """Writes `report.md` from the run's JSON files and its config; gives back the table for the terminal."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    supervision = json.loads((folder / "supervision.json").read_text(encoding="utf-8"))
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    table = [*result_table(metrics), "", *examples(answers, width=60)]
    config = (folder / ".hydra" / "config.yaml").read_text(encoding="utf-8")
    page = [
        f"# {folder.parent.name} · {folder.name}",
        "",
        *table,
        "",
        "## Supervision",
        "",
        *ledger_table(supervision["sources"]),
        "",
        "## Training",
        "",
        f"{metrics['steps']} steps in {metrics['train_seconds']:.0f} s, {metrics['trainable_parameters']:,} trained "
        f"parameters, peak memory {metrics['peak_memory_gib']:.1f} GiB.",
        "",
        *loss_table(metrics["history"]),
        "",
        "## Config",
        "",
        "```yaml",
        config.rstrip(),
        "```",
    ]
    (folder / "report.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    cell = max(20, (shutil.get_terminal_size().columns - 10) // 3)
    return "\n".join([*result_table(metrics), "", *examples(answers, cell)])


def result_table(metrics: dict[str, Any]) -> list[str]:
    """Base and tuned model, measured alike."""
    before, after = metrics["before"], metrics["after"]
    rows = [["", "base", "tuned"]]
    for key, label in (("exact_match", "exact match"), ("stops", "stops by itself")):
        if key in after:
            rows.append([label, f"{before[key]:.1%}", f"{after[key]:.1%}"])
    if "raw_text_loss" in after:
        old, new = before["raw_text_loss"], after["raw_text_loss"]
        rows.append(["loss on raw text", f"{old:.3f}", f"{new:.3f} ({new / old - 1:+.1%})"])
    if "eval_loss" in metrics:
        rows.append(["held-out loss", "", f"{metrics['eval_loss']:.3f}"])
    rows.append(["training loss", "", f"{metrics['train_loss']:.3f}"])
    return markdown(rows)


def examples(answers: list[dict[str, Any]], width: int, number: int = 3) -> list[str]:
    """A few held-out questions with both answers, spread over the whole list."""
    if not answers:
        return []
    some = answers[:: max(1, len(answers) // number)][:number]
    rows = [["question", "base", "tuned"]]
    rows += [[shown(answer[key], width) for key in ("prompt", "base", "tuned")] for answer in some]
    return markdown(rows)


def ledger_table(ledger: dict[str, dict[str, Any]]) -> list[str]:
    """What every source gave: a line a source, and one for each problem that was found in it."""
    keys = ("rows", "held_out", "kept", "tokens", "supervised_tokens")
    rows = [["source", "rows", "held out", "kept", "tokens", "with loss", "problem", "in rows", "policy"]]
    for name, part in ledger.items():
        head = [name, *(f"{part[key]:,}" for key in keys)]
        for problem, entry in part["problems"].items() or [("none", {"rows": 0, "policy": ""})]:
            count = f"{entry['rows']:,}" if entry["rows"] else ""
            rows.append([*head, problem.replace("_", " "), count, entry["policy"]])
            head = [""] * len(head)
    return markdown(rows)


def loss_table(history: list[dict[str, float]], number: int = 12) -> list[str]:
    """The losses on the way, evenly thinned."""
    entries = [entry for entry in history if "loss" in entry or "eval_loss" in entry]
    entries = entries[:: max(1, len(entries) // number)]
    rows = [["step", "epoch", "training loss", "held-out loss", "learning rate"]]
    for entry in entries:
        cells = [format(entry[key], spec) if key in entry else "" for key, spec in LOSS_COLUMNS]
        rows.append([f"{entry['step']}", f"{entry['epoch']:.2f}", *cells])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> list[str]:
    """A table that reads alike in a terminal and as Markdown; the first row is the head.

    >>> print("\\n".join(markdown([["", "base"], ["exact match", "1 %"]])))
    |             | base |
    | ----------- | ---- |
    | exact match | 1 %  |
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]


def shown(text: str, width: int) -> str:
    """A text as one cell of a table: line breaks made visible, cut at `width`."""
    text = text.replace("\n", "⏎").replace("|", "\\|")
    return text if len(text) <= width else text[: width - 1] + "…"


def compare(first: Path, second: Path) -> str:
    """Whether two runs trained on the same tokens and, if not, where they part and what differs in their making."""
    a, b = (json.loads((folder / "supervision.json").read_text(encoding="utf-8")) for folder in (first, second))
    if a["digest"]["sha256"] == b["digest"]["sha256"]:
        same = f"{a['digest']['rows']:,} rows, {a['digest']['sha256'][:16]}"
        return f"Both trained on the same tokens, labels and packing: {same}."
    same = 0
    for one, other in zip(a["digest"]["chunks"], b["digest"]["chunks"], strict=False):
        same += one == other
    chunk = a["digest"]["chunk"]
    lines = [
        f"They trained on different tokens: {a['digest']['rows']:,} and {b['digest']['rows']:,} rows, which part "
        f"between row {same * chunk:,} and {(same + 1) * chunk:,} of the training order."
    ]
    for part in ("sources", "versions", "config"):
        old, new = dict(leaves(a[part], part)), dict(leaves(b[part], part))
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                lines.append(f"{key}: {old.get(key, 'not there')} and {new.get(key, 'not there')}")
    return "\n".join(lines)


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value in a nest of mappings with its dotted path.

    >>> list(leaves({"a": {"b": 1}}, "x"))
    [('x.a.b', 1)]
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    else:
        yield path, value


def main(arguments: list[str] | None = None) -> None:
    """Writes the report of a run's folder again and prints its table; two folders are compared."""
    parser = argparse.ArgumentParser(prog="python -m sft_recipes.report", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="outputs/NAME/DATE; two of them are compared")
    folders = parser.parse_args(arguments).folder
    if len(folders) == 1 and sweep.is_sweep(*folders):
        print(sweep.write(*folders))
        return
    for folder in folders:
        if not (folder / "supervision.json").is_file():
            sys.exit(f"{folder} is not the folder of a finished run: it has no supervision.json.")
    if len(folders) > 2:
        sys.exit("One folder is reported, two are compared; more are not.")
    print(write(*folders) if len(folders) == 1 else compare(*folders))


if __name__ == "__main__":
    main()
