"""What a run's results mean, in the words of templates: warnings, verdicts, and what would reduce forgetting."""

from collections.abc import Mapping
from typing import Any

from sft_recipes.config.nested_values import as_mapping, finite_number, get_path, iterate_leaves
from sft_recipes.reporting.document import render_lines
from sft_recipes.reporting.provenance import TRAINER_DEFAULTS
from sft_recipes.reporting.run_folder import RunFiles


def describe_prompt(metrics: Mapping[str, Any]) -> str:
    """What the base model was given in the column `prompted`; empty where it was not."""
    prompted = as_mapping(get_path(metrics, "before.prompted"))
    return "".join(render_lines("prompt.jinja", prompted=prompted)) if prompted else ""


def run_warnings(metrics: Mapping[str, Any]) -> list[str]:
    """The run's own warnings, then what it lost: thoughts, and the verdicts that are not `passed`."""
    return render_lines("warnings.jinja", metrics=metrics)


def describe_verdict(metrics: Mapping[str, Any], check: str) -> str:
    """The verdict of a check, `forgetting` or `benchmarks`, and what changed how much; empty where there is none."""
    found = as_mapping(metrics.get(check))
    return "".join(render_lines("verdict.jinja", found=found)) if found.get("verdict") else ""


def forgetting_advice(run: RunFiles) -> list[str]:
    """What would reduce forgetting in this run, each with the config for it; none where the check passed."""
    if get_path(run.metrics, "forgetting.verdict") in (None, "passed"):
        return []
    trainer = TRAINER_DEFAULTS | as_mapping(run.config.get("trainer"))
    sources = [name for name, source in as_mapping(run.config.get("data")).items() if isinstance(source, dict)]
    rehearses = any(is_raw_text(run, name) for name in sources)
    return render_lines("advice.jinja", config=run.config, trainer=trainer, sources=sources, rehearses=rehearses)


def is_raw_text(run: RunFiles, name: str) -> bool:
    """Whether a source is raw text: every token of it carries loss, and not because the config says so of answers."""
    audit = as_mapping(get_path(run.supervision, "sources")).get(name, {})
    return get_path(run.config["data"][name], "train_on") != "all" and (
        0 < audit.get("tokens", 0) == audit.get("supervised_tokens")
    )


def weight_changes(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The norm of the change over the norm before, for each part of the model that has a finite one."""
    changes = iterate_leaves(as_mapping(metrics.get("weight_change")))
    return {part: value for part, value in changes if finite_number(value) is not None}
