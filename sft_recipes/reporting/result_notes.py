"""What a run's results mean, in words: warnings, verdicts, and what would reduce forgetting."""

from collections.abc import Mapping
from typing import Any

from sft_recipes.config.nested_values import as_mapping, finite_number, get_number, get_path, iterate_leaves
from sft_recipes.reporting.provenance import TRAINER_DEFAULTS
from sft_recipes.reporting.run_folder import RunFiles


def run_warnings(metrics: Mapping[str, Any]) -> list[str]:
    """The run's own warnings, then the verdicts that are not `passed`."""
    forgetting, benchmarks = (get_path(metrics, f"{check}.verdict") for check in ("forgetting", "benchmarks"))
    warnings = [str(warning) for warning in metrics.get("warnings") or []]
    if forgetting not in (None, "passed"):
        warnings.append(f"Forgetting: {forgetting}. {describe_change(metrics)}")
    if benchmarks not in (None, "passed"):
        warnings.append(f"Benchmarks: {benchmarks}.{describe_worst_task(metrics)}")
    return warnings


def describe_change(metrics: Mapping[str, Any]) -> str:
    """How the loss on raw text changed, and where the limits are."""
    change = get_number(metrics, "forgetting.change")
    limits = [get_number(metrics, f"forgetting.{key}") for key in ("warn_above", "fail_above")]
    text = "" if change is None else f"The loss on raw text changed by {change:+.1%}."
    if None not in limits:
        text += f" Above {limits[0]:+.0%} is a warning, above {limits[1]:+.0%} a failure."
    return text.strip()


def describe_worst_task(metrics: Mapping[str, Any]) -> str:
    """The benchmark that lost most, behind a space; empty where there is none."""
    worst = get_number(metrics, "benchmarks.worst")
    return "" if worst is None else f" The worst changed by {worst:+.1f} points."


def forgetting_advice(run: RunFiles) -> list[str]:
    """What would reduce forgetting in this run, each with the config for it; none where the check passed.

    What the run does already is left out. A lower learning rate and fewer epochs change the model less; LoRA learns
    less and forgets less (Biderman et al. 2024, arXiv 2405.09673); raw text in the mixture rehearses what should stay.
    """
    if get_path(run.metrics, "forgetting.verdict") in (None, "passed"):
        return []
    trainer, advice = TRAINER_DEFAULTS | as_mapping(run.config.get("trainer")), []
    rate, epochs = trainer["learning_rate"], trainer["num_train_epochs"]
    # a third, as rates are searched (1e-5, 3e-5, 1e-4)
    advice.append(f"A lower learning rate than {rate:g}: `trainer.learning_rate={0.3 * rate:.2g}`")
    if epochs > 1 and trainer["max_steps"] < 0:
        advice.append(f"Fewer epochs than {epochs:g}: `trainer.num_train_epochs={epochs // 2 or 1:g}`")
    if get_path(run.config, "adapter.type") in (None, "none"):
        advice.append("LoRA, which keeps the weights of the base model as they are: `adapter=lora`")
    sources = [name for name, source in as_mapping(run.config.get("data")).items() if isinstance(source, dict)]
    if not any(is_raw_text(run, name) for name in sources):
        names = ",".join([*sources, "prose"])
        advice.append(f"Raw text beside the rows, 1 % of all tokens or more: `'data=[{names}]' mix.raw_text=0.01`")
    return advice


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
