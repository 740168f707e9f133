"""How a run was made, as lines and tables of a report: model, data, recipe, data checks, cost, environment, command."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes.config.metrics import metrics_on
from sft_recipes.config.nested_values import as_mapping, get_number, get_path, iterate_leaves
from sft_recipes.reporting.provenance import (
    TRAINER_DEFAULTS,
    compare_with_source,
    effective_batch_size,
    other_departures,
)
from sft_recipes.reporting.result_tables import Rows, with_body
from sft_recipes.reporting.run_folder import RunFiles
from sft_recipes.reporting.text import fit_cell, format_value


def describe_training(trainer: Mapping[str, Any], processes: int = 1) -> str:
    """Learning rate, schedule, epochs, effective batch, length and packing in words.

    >>> describe_training({"learning_rate": 1e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "max_length": 2048})
    'Training: learning rate 1e-05, cosine schedule, warmup over 3% of the steps; 3 epochs; effective batch of 8 rows; rows of at most 2,048 tokens, not packed.'
    """  # noqa: E501
    values = TRAINER_DEFAULTS | trainer
    warmup, steps, length = values["warmup_steps"], values["max_steps"], values["max_length"]
    schedule = f"{values['lr_scheduler_type']} schedule".replace("_", " ")
    if warmup:
        schedule += f", warmup over {f'{warmup:.3g} steps' if warmup >= 1 else f'{warmup:.2%} of the steps'}"
        schedule = schedule.replace(".00%", "%")
    duration = f"{steps:,} steps" if steps > 0 else f"{values['num_train_epochs']:g} epochs"
    batch = f"effective batch of {effective_batch_size(values, processes):,} rows"
    rows = f"rows of at most {length:,} tokens" if length else "rows of any length"
    rows = f"packed into rows of {length:,} tokens" if values["packing"] and length else f"{rows}, not packed"
    return f"Training: learning rate {values['learning_rate']:g}, {schedule}; {duration}; {batch}; {rows}."


def describe_method(adapter: Mapping[str, Any]) -> str:
    """What the config's `adapter` trains, in two words.

    >>> describe_method({"type": "lora", "lora": {"r": 64}, "quantization": {"load_in_4bit": True}})
    'QLoRA r=64'
    """
    kind = adapter.get("type") or "none"
    if kind == "lora":
        return f"{'QLoRA' if adapter.get('quantization') else 'LoRA'} r={get_path(adapter, 'lora.r') or 8}"
    return "full" if kind == "none" else str(kind)


def describe_model(run: RunFiles) -> str:
    """The base, how it was trained, the share of the parameters where that is known, and the chat template."""
    parts = [f"Model: `{shorten_path(get_path(run.config, 'model.id'))}`"]
    parts.append(f"{describe_method(as_mapping(run.config.get('adapter')))} fine-tuning")
    trained, parameters = (get_number(run.metrics, key) for key in ("trainable_parameters", "parameters"))
    if trained and parameters:
        parts.append(f"{trained / parameters:.2%} of {parameters:,} parameters")
    template = get_path(run.config, "model.chat_template")
    named = f"`{shorten_path(template)}`" if template else "of the tokenizer's own"
    return f"{', '.join(parts)}; chat template {named}."


def count_processes(run: RunFiles) -> int:
    """The number of processes that trained together."""
    return get_number(run.metrics, "environment.processes") or 1


def describe_recipe(overrides: Sequence[str], name: str | None = None) -> str:
    """The recipe, by the override that added it or else by its name, and what was typed on top of it.

    >>> describe_recipe(["+recipe=lima", "seed=1"]), describe_recipe(["seed=1"])
    ('Recipe: `+recipe=lima`; overrides: `seed=1`.', 'Overrides: `seed=1`.')
    """
    recipe, typed = (
        ", ".join(f"`{override}`" for override in overrides if override.startswith("+") == added)
        for added in (True, False)
    )
    recipe = recipe or (f"`{name}`" if name else "")
    if recipe:
        return f"Recipe: {recipe}" + (f"; overrides: {typed}." if typed else ", unchanged.")
    return f"Overrides: {typed}." if typed else "No recipe, no overrides."


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
    return with_body(rows)


def describe_origin(source: Mapping[str, Any]) -> str:
    """Where a source's rows are read from: the name on the hub, or the files."""
    listed = [found if isinstance(found, list) else [found] for _, found in iterate_leaves(source.get("data_files"))]
    files = sum(listed, [])
    if any(files):
        return ", ".join(map(shorten_path, files))
    parts = [shorten_path(source.get("path", "")), source.get("name"), source.get("split")]
    return ", ".join(str(part) for part in parts if part)


def shorten_path(path: Any) -> str:
    """A name on the hub as it is; of an absolute path the last two parts.

    >>> shorten_path("Qwen/Qwen3-0.6B-Base"), shorten_path("/home/me/models/tiny/model")
    ('Qwen/Qwen3-0.6B-Base', '…/tiny/model')
    """
    return "/".join(("…", *Path(path).parts[-2:])) if Path(str(path)).is_absolute() else str(path)


def provenance_table(run: RunFiles) -> Rows:
    """The source's values beside the run's, departures marked, and the mean tokens of a step.

    Empty where the recipe has no source but us, or where there is no recipe.
    """
    provenance = as_mapping(run.config.get("provenance"))
    if provenance.get("source", "ours") == "ours":
        return []
    rows = [[shorten_path(cell) for cell in row] for row in compare_with_source(run.config, count_processes(run))]
    tokens, steps = get_number(run.metrics, "train_tokens"), get_number(run.metrics, "steps")
    if tokens and steps:
        rows.append(["mean tokens per step", "", f"{tokens / steps:,.0f}", ""])
    return rows + [[key, "", "", f"departs: {reason}"] for key, reason in other_departures(provenance).items()]


def audit_tables(audit: Mapping[str, Mapping[str, Any]]) -> tuple[Rows, Rows]:
    """A table of what every source gave, and one of the issues in its rows; empty where there are none."""
    keys = ("rows", "held_out", "kept", "tokens", "supervised_tokens")
    rows = [["source", "rows", "held out", "kept", "tokens", "with loss"]]
    issues = [["source", "problem", "in rows", "policy"]]
    for name, part in audit.items():
        rows.append([name, *(f"{part.get(key) or 0:,}" for key in keys)])
        for issue, entry in (part.get("problems") or {}).items():
            for field, count in (entry.get("fields") or {"": entry["rows"]}).items():
                label = issue.replace("_", " ") + (f": {field}" if field else "")
                issues.append([name, fit_cell(label, 34), f"{count:,}", entry["policy"]])
        for kind, count in (part.get("thoughts") or {}).items():
            issues.append([name, f"{kind} thoughts", f"{count:,}", "keep"])
    return with_body(rows), with_body(issues)


def mixture_table(audit: Mapping[str, Mapping[str, Any]]) -> Rows:
    """What share was asked of every source and what it got; empty where nothing was asked."""
    rows = [["source", "share asked", "share got", "of", "times in it"]]
    for name, part in audit.items():
        if found := part.get("mix"):
            times = f"{found['times']:.2f}" if "times" in found else ""
            rows.append([name, f"{found['asked']:.2%}", f"{found['got']:.2%}", found["of"], times])
    return with_body(rows)


def cost_table(metrics: Mapping[str, Any], price_per_hour: float | None) -> Rows:
    """The training's time, tokens and memory, and its price where that of an hour is known."""
    rows = [["", ""]]
    for metric in metrics_on("cost"):
        value = get_number(metrics, metric.name)
        rows += [] if value is None else [[metric.label, format_value(value, metric.format)]]
    seconds = get_number(metrics, "train_seconds")
    price = get_number(metrics, "price_per_hour") if price_per_hour is None else price_per_hour
    if price is not None and seconds is not None:
        paid = price * seconds / 3600
        rows.append([f"price of the training, at {price:g} an hour", f"{paid:,.2f}" if paid >= 0.1 else f"{paid:.2g}"])
    return with_body(rows)


def environment_table(run: RunFiles) -> Rows:
    """The machine, the commit, the versions."""
    found = {**dict(iterate_leaves(as_mapping(run.metrics.get("environment")))), "started": run.metrics.get("started")}
    found |= dict(iterate_leaves(as_mapping(run.supervision.get("versions"))))
    if day := run.metrics.get("template_date"):
        found["date in the chat template"] = f"{day} in training; serving writes its own day"
    rows = [["", ""]]
    for key, value in found.items():
        if key != "started" or value:
            rows.append([key.replace("_", " "), "none" if value is None else str(value)])
    return with_body(rows)
