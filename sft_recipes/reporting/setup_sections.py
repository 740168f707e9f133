"""How a run was made, as lines and tables of a report: model, recipe, data, data checks, cost, environment."""

from collections.abc import Mapping
from typing import Any

from sft_recipes.config.metrics import metrics_on
from sft_recipes.config.nested_values import as_mapping, get_number, get_path, iterate_leaves
from sft_recipes.reporting.document import render_lines
from sft_recipes.reporting.provenance import TRAINER_DEFAULTS, compare_with_source, effective_batch_size
from sft_recipes.reporting.run_folder import RunFiles
from sft_recipes.reporting.text import Rows, compact_table, fit_cell, flat_table, format_value, shorten_path


def setup_lines(run: RunFiles) -> list[str]:
    """Model, training and recipe in words, and whether training's prompts were compared with inference's."""
    trainer = TRAINER_DEFAULTS | as_mapping(run.config.get("trainer"))
    recipe = [override for override in run.overrides if override.startswith("+")]
    if not recipe and run.config.get("provenance") and run.config.get("name"):
        recipe = [run.config["name"]]  # the recipe of a command without one
    typed = [override for override in run.overrides if not override.startswith("+")]
    values = {"run": run, "trainer": trainer, "recipe": recipe, "typed": typed}
    values["method"] = describe_method(as_mapping(run.config.get("adapter")))
    values["batch"] = effective_batch_size(trainer, count_processes(run))
    return render_lines("setup.jinja", **values)


def describe_method(adapter: Mapping[str, Any]) -> str:
    """What the config's `adapter` trains, in two words.

    >>> describe_method({"type": "lora", "lora": {"r": 64}, "quantization": {"load_in_4bit": True}})
    'QLoRA r=64'
    """
    kind = adapter.get("type") or "none"
    if kind == "lora":
        return f"{'QLoRA' if adapter.get('quantization') else 'LoRA'} r={get_path(adapter, 'lora.r') or 8}"
    return "full" if kind == "none" else str(kind)


def count_processes(run: RunFiles) -> int:
    """The number of processes that trained together."""
    return get_number(run.metrics, "environment.processes") or 1


def source_table(run: RunFiles) -> Rows:
    """A row for every source: where it was read from and how, and the fingerprint of what was read."""
    rows = [["source", "read from", "formatter", "share", "fingerprint"]]
    for name, source in as_mapping(run.config.get("data")).items():
        if isinstance(source, dict):
            formatter = source.get("formatter") or get_path(run.config, "formatter.name") or ""
            formatter = formatter.get("name", "") if isinstance(formatter, dict) else formatter
            fingerprint = as_mapping(get_path(run.supervision, "sources")).get(name, {}).get("fingerprint", "")
            share = source.get("share", "")
            rows.append([name, describe_origin(source), str(formatter), str(share), str(fingerprint)[:16]])
    return compact_table(rows)


def describe_origin(source: Mapping[str, Any]) -> str:
    """Where a source's rows are read from: the name on the hub, or the files."""
    listed = [found if isinstance(found, list) else [found] for _, found in iterate_leaves(source.get("data_files"))]
    if files := [file for some in listed for file in some if file]:
        return ", ".join(map(shorten_path, files))
    parts = [shorten_path(source.get("path", "")), source.get("name"), source.get("split")]
    return ", ".join(str(part) for part in parts if part)


def provenance_table(run: RunFiles) -> Rows:
    """The source's values beside the run's, departures marked; empty where the recipe has no source but us."""
    if (get_path(run.config, "provenance.source") or "ours") == "ours":
        return []
    rows = [[shorten_path(cell) for cell in row] for row in compare_with_source(run.config, count_processes(run))]
    return compact_table(rows)


def audit_tables(audit: Mapping[str, Mapping[str, Any]]) -> tuple[Rows, Rows, Rows]:
    """What every source gave, the share of the mixture that it was asked for and got, and the issues in its rows."""
    keys = ("rows", "held_out", "kept", "tokens", "supervised_tokens")
    rows = [["source", "rows", "held out", "kept", "tokens", "with loss"]]
    shares = [["source", "share asked", "share got", "of", "times in it"]]
    issues = [["source", "problem", "in rows", "policy"]]
    for name, part in audit.items():
        rows.append([name, *(f"{part.get(key) or 0:,}" for key in keys)])
        if found := part.get("mix"):
            times = format_value(found.get("times"), ".2f")
            shares.append([name, f"{found['asked']:.2%}", f"{found['got']:.2%}", found["of"], times])
        for issue, entry in (part.get("problems") or {}).items():
            for field, count in (entry.get("fields") or {"": entry["rows"]}).items():
                label = issue.replace("_", " ") + (f": {field}" if field else "")
                issues.append([name, fit_cell(label, 34), f"{count:,}", entry["policy"]])
        for kind, count in (part.get("thoughts") or {}).items():
            issues.append([name, f"{kind} thoughts", f"{count:,}", "keep"])
    return compact_table(rows), compact_table(shares), compact_table(issues)


def cost_table(metrics: Mapping[str, Any], price_per_hour: float | None) -> Rows:
    """The training's time, tokens and memory, and its price where that of an hour is known."""
    rows = [["", ""]]
    for metric in metrics_on("cost"):
        rows.append([metric.label, format_value(get_number(metrics, metric.name), metric.format)])
    seconds = get_number(metrics, "train_seconds")
    price = get_number(metrics, "price_per_hour") if price_per_hour is None else price_per_hour
    if price is not None and seconds is not None:
        paid = price * seconds / 3600
        rows.append([f"price of the training, at {price:g} an hour", f"{paid:,.2f}" if paid >= 0.1 else f"{paid:.2g}"])
    return compact_table(rows)


def environment_table(run: RunFiles) -> Rows:
    """The machine, what was chosen for it, the commit, the versions."""
    found = as_mapping(run.metrics.get("environment")) | as_mapping(run.metrics.get("choices"))
    found |= {"started": run.metrics.get("started") or ""} | as_mapping(run.supervision.get("versions"))
    if day := run.metrics.get("template_date"):
        found["date in the chat template"] = f"{day} in training; serving writes its own day"
    return flat_table(found)
