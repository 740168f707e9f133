"""A run's or a sweep's folder as a report, or two runs compared: `python -m sft_recipes.report outputs/lima/<date>`."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes import card, sweep
from sft_recipes.binding import ConfigError
from sft_recipes.making import ledger_rows
from sft_recipes.measures import result_table
from sft_recipes.page import save_pictures, shown, table, to_html, to_markdown
from sft_recipes.run_folder import Run, find, json_of, leaves, mapping, read
from sft_recipes.sections import advice, concerns, sections


def write(folder: Path, price_per_hour: float | None = None) -> str:
    """Writes `report.md`, `report.html` and the model's card from the run's files; gives back the terminal's table.

    Raises ConfigError for a folder where no run has finished, and for files that cannot be read.
    """
    run = read(folder)
    found = sections(run, price_per_hour)
    (folder / "report.md").write_text(to_markdown(run.name, found), encoding="utf-8")
    (folder / "report.html").write_text(to_html(run.name, found, home="sft_recipes"), encoding="utf-8")
    save_pictures(folder, found)
    card.write(run, found)
    return terminal(run, shutil.get_terminal_size().columns)


def terminal(run: Run, width: int) -> str:
    """What came of the run in so many columns: the figures, what there is to worry about, three examples."""
    lines = table(result_table(run.metrics))
    for concern in [*concerns(run), *advice(run)]:
        lines += ["", *textwrap.wrap(shown(concern.replace("`", ""), 10_000), width)]
    cell = max(20, (width - 10) // 3)
    return "\n".join([*lines, "", *examples(run.answers, cell)]).rstrip()


def examples(answers: Sequence[Mapping[str, Any]], width: int, number: int = 3) -> list[str]:
    """A few held-out questions with both answers, spread over the whole list."""
    if not answers:
        return []
    some = answers[:: max(1, len(answers) // number)][:number]
    keys = [key for key in ("prompt", "base", "tuned") if any(key in answer for answer in some)]
    rows = [["question" if key == "prompt" else key for key in keys]]
    rows += [[cell(answer.get(key, ""), width) for key in keys] for answer in some]
    return table(rows)


def cell(text: str, width: int) -> str:
    """A text as a cell of the terminal's table, with a | of its own marked as such."""
    return shown(str(text).replace("|", "\\|"), width)


def ledger_table(ledger: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What every source gave, and the problems that were found in it, as two tables that fit 80 columns."""
    rows, problems = ledger_rows(ledger)
    rows, problems = ([[cell(name, 15), *rest] for name, *rest in some] for some in (rows, problems))
    return [*table(rows), "", *(table(problems) if problems else ["No problem was found in the rows."])]


def compare(first: Path, second: Path) -> str:
    """Whether two runs trained on the same tokens and, if not, where they part and what differs in their making."""
    a, b = (json_of(folder / "supervision.json") for folder in (first, second))
    for folder, values in ((first, a), (second, b)):
        if not find(values, "digest.sha256"):
            raise ConfigError(f"{folder} is not the folder of a finished run: it has no digest in supervision.json.")
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
        old, new = (dict(leaves(mapping(values.get(part)), part)) for values in (a, b))
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                lines.append(f"{key}: {old.get(key, 'not there')} and {new.get(key, 'not there')}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Writes the report of a run's folder again and prints its table; two folders are compared."""
    parser = argparse.ArgumentParser(prog="python -m sft_recipes.report", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help="outputs/NAME/DATE; two of them are compared")
    parser.add_argument("--price-per-hour", type=float, help="of the machine: the report says what the training cost")
    options = parser.parse_args(arguments)
    if len(options.folder) == 1 and sweep.is_sweep(*options.folder):
        print(sweep.write(*options.folder))
        return
    if len(options.folder) > 2:
        sys.exit("One folder is reported, two are compared; more are not.")
    try:
        print(write(*options.folder, options.price_per_hour) if len(options.folder) == 1 else compare(*options.folder))
    except ConfigError as error:
        sys.exit(str(error))
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # values that no run writes
        sys.exit(f"{options.folder[0]}: its files do not hold what a run writes: {type(error).__name__}, {error}.")


if __name__ == "__main__":
    main()
