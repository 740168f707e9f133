"""How a run was made, as sections of a report: model, data, recipe, supervision, cost, environment, command."""

import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from sft_recipes.page import Block, Table
from sft_recipes.provenance import compared, elsewhere
from sft_recipes.run_folder import Run, find, leaves, mapping, number


def trained(run: Run) -> list[Block]:
    """Model, data with their fingerprints, recipe with what was typed on top of it, and the parity line."""
    if not run.config.get("model"):
        return []
    model = mapping(run.config.get("model"))
    kind = {"lora": "LoRA"}.get(find(run.config, "adapter.type"), "every weight")
    kind = "QLoRA" if find(run.config, "adapter.quantization") else kind
    sizes = [number(run.metrics, key) for key in ("trainable_parameters", "parameters")]
    share = "" if None in sizes else f", {sizes[0] / max(sizes[1], 1):.2%} of {sizes[1]:,} parameters"
    lines = [f"Model: `{short(model.get('id', 'not named'))}`, {kind}{share}; chat template {template(model)}."]
    lines.append(recipe(run.overrides))
    if run.supervision:
        lines.append(parity(run.supervision.get("parity")))
    rows = data_rows(run)
    digest = find(run.supervision, "digest.sha256")
    said = [f"Digest of every token, label and length that was trained on: `{digest}`."] if digest else []
    return [lines, *([Table(rows)] if len(rows) > 1 else []), *said]


def data_rows(run: Run) -> list[list[str]]:
    """A row for every source: where it was read from and how, and the fingerprint of what was read."""
    rows = [["source", "read from", "formatter", "share", "fingerprint"]]
    for name, source in mapping(run.config.get("data")).items():
        if isinstance(source, dict):
            formatter = source.get("formatter") or find(run.config, "formatter.name") or ""
            formatter = formatter.get("name", "") if isinstance(formatter, dict) else formatter
            fingerprint = mapping(find(run.supervision, "sources")).get(name, {}).get("fingerprint", "")
            share = source.get("share", "")
            rows.append([name, origin(source), str(formatter), str(share), str(fingerprint)[:16]])
    return rows


def template(model: Mapping[str, Any]) -> str:
    """Which chat template the run chose."""
    name = model.get("chat_template")
    return f"`{short(name)}`" if name else "of the tokenizer's own"


def recipe(overrides: Sequence[str]) -> str:
    """The recipe, and what was typed on top of it."""
    added = [override for override in overrides if override.startswith("+")]
    typed = [override for override in overrides if not override.startswith("+")]
    base = ", ".join(f"`{override}`" for override in added) or "none was named"
    rest = ", ".join(f"`{override}`" for override in typed)
    return f"Recipe: {base}" + (f"; on top of it {rest}." if rest else ", with nothing changed." if added else ".")


def parity(found: Any) -> str:
    """That training's prompt is serving's: the data is refused before training where it is not."""
    rows = found if isinstance(found, int) else number(found, "rows")
    count = f", as {rows:,} rows showed that were compared" if rows else ""
    return f"The prompt of training is the prompt of serving, the saved tokenizer's own template{count}."


def origin(source: Mapping[str, Any]) -> str:
    """Where a source's rows are read from: the name on the hub, or the files."""
    listed = [found if isinstance(found, list) else [found] for _, found in leaves(source.get("data_files"))]
    files = sum(listed, [])
    if any(files):
        return ", ".join(map(short, files))
    parts = [short(source.get("path", "")), source.get("name"), source.get("split")]
    return ", ".join(str(part) for part in parts if part)


def short(path: Any) -> str:
    """A name of the hub's as it is; of an absolute path the last two parts.

    >>> short("Qwen/Qwen3-0.6B-Base"), short("/home/me/models/tiny/model")
    ('Qwen/Qwen3-0.6B-Base', '…/tiny/model')
    """
    return "/".join(("…", *Path(path).parts[-2:])) if Path(str(path)).is_absolute() else str(path)


def provenance(run: Run) -> list[Block]:
    """The source's values beside the run's, departures marked, and the tokens that a step really held."""
    said = mapping(run.config.get("provenance"))
    if not said:
        return []
    processes = number(run.metrics, "environment.processes") or 1
    rows = [[short(cell) for cell in row] for row in compared(run.config, processes)]
    tokens, steps = number(run.metrics, "train_tokens"), number(run.metrics, "steps")
    if tokens and steps:
        rows.append(["tokens a step, the mean", "", f"{tokens / steps:,.0f}", ""])
    rows += [[key, "", "", f"departs: {reason}"] for key, reason in elsewhere(said).items()]
    unknown = [f"Not said by the source: {what}." for what in said.get("unknown") or []]
    return [f"Source: {said['source']}", Table(rows, prose=True), *([unknown] if unknown else [])]


def supervision(run: Run) -> list[Block]:
    """What encoding found in the rows, and what padding takes."""
    sources = mapping(run.supervision.get("sources"))
    if not sources:
        return []
    rows, problems = ledger_rows(sources)
    padding = number(run.supervision, "padding")
    said = [] if padding is None else [f"{padding:.1%} of what the model reads is padding."]
    return [Table(rows), Table(problems) if problems else "No problem was found in the rows.", *said]


def ledger_rows(ledger: Mapping[str, Mapping[str, Any]]) -> tuple[list[list[str]], list[list[str]]]:
    """A row for every source, and one for every problem that was found in one; none where there is no problem."""
    keys = ("rows", "held_out", "kept", "tokens", "supervised_tokens")
    rows, problems = [["source", "rows", "held out", "kept", "tokens", "with loss"]], []
    for name, part in ledger.items():
        rows.append([name, *(f"{part.get(key) or 0:,}" for key in keys)])
        for problem, entry in (part.get("problems") or {}).items():
            problems.append([name, problem.replace("_", " "), f"{entry['rows']:,}", entry["policy"]])
    return rows, [["source", "problem", "in rows", "policy"], *problems] if problems else []


def cost(run: Run, price_per_hour: float | None) -> list[Block]:
    """What the training took: time, tokens, memory, and money where the price of an hour is known."""
    metrics, rows = run.metrics, [["", ""]]
    seconds = number(metrics, "train_seconds")
    rows += [["training time", spent(seconds)]] if seconds is not None else []
    for key, label, form in (
        ("train_tokens", "tokens trained on", ",.0f"),
        ("tokens_per_second", "tokens a second", ",.0f"),
        ("peak_memory_gib", "peak memory, GiB", ".2f"),
        ("mfu", "model FLOPs utilization (MFU)", ".1%"),
    ):
        value = number(metrics, key)
        rows += [[label, f"{value:{form}}"]] if value is not None else []
    price = number(metrics, "price_per_hour") if price_per_hour is None else price_per_hour
    if price is not None and seconds is not None:
        paid = price * seconds / 3600
        rows.append([f"price of the training, at {price:g} an hour", f"{paid:,.2f}" if paid >= 0.1 else f"{paid:.2g}"])
    return [Table(rows)] if len(rows) > 1 else []


def spent(seconds: float) -> str:
    """Seconds as they are up to two minutes, then as h:mm:ss."""
    return f"{seconds:.3g} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))


def environment(run: Run) -> list[Block]:
    """The machine, the commit, the versions."""
    found = [(key.replace("_", " "), value) for key, value in leaves(mapping(run.metrics.get("environment")))]
    found += [("started", run.metrics["started"])] if run.metrics.get("started") else []
    found += list(leaves(mapping(run.supervision.get("versions"))))
    rows = [["", ""], *([key, "none" if value is None else str(value)] for key, value in found)]
    return [Table(rows)] if len(rows) > 1 else []


def command(run: Run) -> str:
    """What repeats the run: as it says itself, or from what was typed."""
    if run.metrics.get("command"):
        return str(run.metrics["command"])
    return f"python -m sft_recipes {shlex.join(run.overrides)}" if run.overrides else ""
