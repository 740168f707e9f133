"""How a run was made, as sections of a report: model, data, recipe, supervision, cost, environment, command."""

import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from sft_recipes.reporting.document import Block, Table
from sft_recipes.reporting.provenance import compare_with_source, other_departures
from sft_recipes.reporting.run_folder import RunFiles, as_mapping, get_number, get_path, iterate_leaves
from sft_recipes.reporting.text import fit_cell


def training_setup(run: RunFiles) -> list[Block]:
    """Model, data with their fingerprints, recipe with what was typed on top of it, and the parity line."""
    if not run.config.get("model"):
        return []
    model = as_mapping(run.config.get("model"))
    kind = {"lora": "LoRA"}.get(get_path(run.config, "adapter.type"), "every weight")
    kind = "QLoRA" if get_path(run.config, "adapter.quantization") else kind
    sizes = [get_number(run.metrics, key) for key in ("trainable_parameters", "parameters")]
    share = "" if None in sizes else f", {sizes[0] / max(sizes[1], 1):.2%} of {sizes[1]:,} parameters"
    name = shorten_path(model.get("id", "not named"))
    lines = [f"Model: `{name}`, {kind}{share}; chat template {describe_template(model)}."]
    lines.append(describe_recipe(run.overrides))
    if run.supervision:
        lines.append(describe_parity(run.supervision.get("parity")))
    rows = data_rows(run)
    digest = get_path(run.supervision, "digest.sha256")
    said = [f"Digest of every token, label and length that was trained on: `{digest}`."] if digest else []
    return [lines, *([Table(rows)] if len(rows) > 1 else []), *said]


def data_rows(run: RunFiles) -> list[list[str]]:
    """A row for every source: where it was read from and how, and the fingerprint of what was read."""
    rows = [["source", "read from", "formatter", "share", "fingerprint"]]
    for name, source in as_mapping(run.config.get("data")).items():
        if isinstance(source, dict):
            formatter = source.get("formatter") or get_path(run.config, "formatter.name") or ""
            formatter = formatter.get("name", "") if isinstance(formatter, dict) else formatter
            fingerprint = as_mapping(get_path(run.supervision, "sources")).get(name, {}).get("fingerprint", "")
            share = source.get("share", "")
            rows.append([name, describe_origin(source), str(formatter), str(share), str(fingerprint)[:16]])
    return rows


def describe_template(model: Mapping[str, Any]) -> str:
    """Which chat template the run chose."""
    name = model.get("chat_template")
    return f"`{shorten_path(name)}`" if name else "of the tokenizer's own"


def describe_recipe(overrides: Sequence[str]) -> str:
    """The recipe, and what was typed on top of it."""
    added = [override for override in overrides if override.startswith("+")]
    typed = [override for override in overrides if not override.startswith("+")]
    base = ", ".join(f"`{override}`" for override in added) or "none was named"
    rest = ", ".join(f"`{override}`" for override in typed)
    return f"Recipe: {base}" + (f"; on top of it {rest}." if rest else ", with nothing changed." if added else ".")


def describe_parity(found: Any) -> str:
    """That training's prompt is serving's: the data is refused before training where it is not."""
    rows = found if isinstance(found, int) else get_number(found, "rows")
    count = f", as {rows:,} rows showed that were compared" if rows else ""
    return f"The prompt of training is the prompt of serving, the saved tokenizer's own template{count}."


def describe_origin(source: Mapping[str, Any]) -> str:
    """Where a source's rows are read from: the name on the hub, or the files."""
    listed = [found if isinstance(found, list) else [found] for _, found in iterate_leaves(source.get("data_files"))]
    files = sum(listed, [])
    if any(files):
        return ", ".join(map(shorten_path, files))
    parts = [shorten_path(source.get("path", "")), source.get("name"), source.get("split")]
    return ", ".join(str(part) for part in parts if part)


def shorten_path(path: Any) -> str:
    """A name of the hub's as it is; of an absolute path the last two parts.

    >>> shorten_path("Qwen/Qwen3-0.6B-Base"), shorten_path("/home/me/models/tiny/model")
    ('Qwen/Qwen3-0.6B-Base', '…/tiny/model')
    """
    return "/".join(("…", *Path(path).parts[-2:])) if Path(str(path)).is_absolute() else str(path)


def provenance_section(run: RunFiles) -> list[Block]:
    """The source's values beside the run's, departures marked, and the tokens that a step really held."""
    said = as_mapping(run.config.get("provenance"))
    if not said:
        return []
    processes = get_number(run.metrics, "environment.processes") or 1
    rows = [[shorten_path(cell) for cell in row] for row in compare_with_source(run.config, processes)]
    tokens, steps = get_number(run.metrics, "train_tokens"), get_number(run.metrics, "steps")
    if tokens and steps:
        rows.append(["tokens a step, the mean", "", f"{tokens / steps:,.0f}", ""])
    rows += [[key, "", "", f"departs: {reason}"] for key, reason in other_departures(said).items()]
    unknown = [f"Not said by the source: {what}." for what in said.get("unknown") or []]
    return [f"Source: {said['source']}", Table(rows, prose=True), *([unknown] if unknown else [])]


def data_checks_section(run: RunFiles) -> list[Block]:
    """What encoding found in the rows, and what padding takes."""
    sources = as_mapping(run.supervision.get("sources"))
    if not sources:
        return []
    rows, problems = audit_rows(sources)
    padding = get_number(run.supervision, "padding")
    said = [] if padding is None else [f"{padding:.1%} of what the model reads is padding."]
    return [Table(rows), Table(problems) if problems else "No problem was found in the rows.", *said]


def audit_rows(ledger: Mapping[str, Mapping[str, Any]]) -> tuple[list[list[str]], list[list[str]]]:
    """A row for every source, and one for every problem that was found in one, or for every field that it is about."""
    keys = ("rows", "held_out", "kept", "tokens", "supervised_tokens")
    rows, problems = [["source", "rows", "held out", "kept", "tokens", "with loss"]], []
    for name, part in ledger.items():
        rows.append([name, *(f"{part.get(key) or 0:,}" for key in keys)])
        for problem, entry in (part.get("problems") or {}).items():
            for field, count in (entry.get("fields") or {"": entry["rows"]}).items():
                label = problem.replace("_", " ") + (f": {field}" if field else "")
                problems.append([name, fit_cell(label, 34), f"{count:,}", entry["policy"]])
    return rows, [["source", "problem", "in rows", "policy"], *problems] if problems else []


def cost_section(run: RunFiles, price_per_hour: float | None) -> list[Block]:
    """What the training took: time, tokens, memory, and money where the price of an hour is known."""
    metrics, rows = run.metrics, [["", ""]]
    seconds = get_number(metrics, "train_seconds")
    rows += [["training time", format_seconds(seconds)]] if seconds is not None else []
    for key, label, form in (
        ("train_tokens", "tokens trained on", ",.0f"),
        ("tokens_per_second", "tokens a second", ",.0f"),
        ("peak_memory_gib", "peak memory, GiB", ".2f"),
        ("mfu", "model FLOPs utilization (MFU)", ".1%"),
    ):
        value = get_number(metrics, key)
        rows += [[label, f"{value:{form}}"]] if value is not None else []
    price = get_number(metrics, "price_per_hour") if price_per_hour is None else price_per_hour
    if price is not None and seconds is not None:
        paid = price * seconds / 3600
        rows.append([f"price of the training, at {price:g} an hour", f"{paid:,.2f}" if paid >= 0.1 else f"{paid:.2g}"])
    return [Table(rows)] if len(rows) > 1 else []


def format_seconds(seconds: float) -> str:
    """Seconds as they are up to two minutes, then as h:mm:ss."""
    return f"{seconds:.3g} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))


def environment_section(run: RunFiles) -> list[Block]:
    """The machine, the commit, the versions."""
    found = [
        (key.replace("_", " "), value) for key, value in iterate_leaves(as_mapping(run.metrics.get("environment")))
    ]
    found += [("started", run.metrics["started"])] if run.metrics.get("started") else []
    found += list(iterate_leaves(as_mapping(run.supervision.get("versions"))))
    rows = [["", ""], *([key, "none" if value is None else str(value)] for key, value in found)]
    return [Table(rows)] if len(rows) > 1 else []


def rerun_command(run: RunFiles) -> str:
    """What repeats the run: as it says itself, or from what was typed."""
    if run.metrics.get("command"):
        return str(run.metrics["command"])
    return f"python -m sft_recipes {shlex.join(run.overrides)}" if run.overrides else ""
