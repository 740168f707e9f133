"""What a run's results mean, in words: warnings, verdicts, and what would reduce forgetting."""

from collections.abc import Mapping
from typing import Any

from sft_recipes.config.metrics import METRICS, as_mapping, finite_number, get_number, get_path
from sft_recipes.reporting.provenance import TRAINER_DEFAULTS
from sft_recipes.reporting.run_folder import RunFiles, iterate_leaves
from sft_recipes.reporting.setup_sections import format_seconds
from sft_recipes.reporting.text import format_value


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


def describe_forgetting(metrics: Mapping[str, Any]) -> str:
    """The verdict on the loss on raw text, or why there is none."""
    if verdict := get_path(metrics, "forgetting.verdict"):
        return f"Verdict: {verdict}. {describe_change(metrics)}"
    if METRICS["raw_text_loss"].tuned_value(metrics) is not None:
        return "The loss on raw text is in the first table; the run has no verdict on it."
    return "Not measured. `evaluate.raw_text=FILE` takes the loss on a text file before and after training."


def forgetting_advice(run: RunFiles) -> list[str]:
    """What would reduce forgetting in this run, each with the config for it; none where the check passed.

    What the run does already is left out. A lower learning rate and fewer epochs change the model less; LoRA learns
    less and forgets less (Biderman et al. 2024, arXiv 2405.09673); raw text in the mixture rehearses what should stay.
    """
    if get_path(run.metrics, "forgetting.verdict") in (None, "passed"):
        return []
    trainer, advice = TRAINER_DEFAULTS | as_mapping(run.config.get("trainer")), []
    rate, epochs = trainer["learning_rate"], trainer["num_train_epochs"]
    advice.append(f"A lower learning rate than {rate:g}: `trainer.learning_rate={0.3 * rate:.0e}`")
    if epochs > 1 and trainer["max_steps"] < 0:
        advice.append(f"Fewer epochs than {epochs:g}: `trainer.num_train_epochs={epochs // 2 or 1:g}`")
    if get_path(run.config, "adapter.type") in (None, "none"):
        advice.append("LoRA, which keeps the weights of the base model as they are: `adapter=lora`")
    sources = [name for name, source in as_mapping(run.config.get("data")).items() if isinstance(source, dict)]
    if not any(is_raw_text(run, name) for name in sources):
        names = ",".join([*sources, "prose"])
        advice.append(f"2 to 10 % raw text in the mixture: `'data=[{names}]' data.prose.share=0.05`")
    return advice


def is_raw_text(run: RunFiles, name: str) -> bool:
    """Whether a source is raw text: every token of it carries loss, and not because the config says so of answers."""
    audit = as_mapping(get_path(run.supervision, "sources")).get(name, {})
    return get_path(run.config["data"][name], "train_on") != "all" and (
        0 < audit.get("tokens", 0) == audit.get("supervised_tokens")
    )


def describe_training_result(metrics: Mapping[str, Any]) -> str:
    """Steps, time, size and losses in one sentence; empty where nothing was trained."""
    steps, seconds = get_number(metrics, "steps"), get_number(metrics, "train_seconds")
    parts = []
    if steps:
        time = "" if seconds is None else f" in {format_seconds(seconds)}"
        parts.append(f"{steps:,} step{'s' * (steps != 1)}{time}")
    for key, form, name in (
        ("trainable_parameters", ",", "trained parameters"),
        ("train_loss", ".3f", "mean training loss"),
        ("eval_loss", ".3f", "held-out loss at the end"),
    ):
        value = get_number(metrics, key)
        parts += [f"{format_value(value, form)} {name}"] if value is not None else []
    return f"{', '.join(parts)}." if steps is not None and parts else ""


def weight_changes(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The norm of the change over the norm before, for each part of the model that has a finite one."""
    changes = iterate_leaves(as_mapping(metrics.get("weight_change")))
    return {part: value for part, value in changes if finite_number(value) is not None}


def describe_weights(metrics: Mapping[str, Any]) -> str:
    """What the figure of the weights shows, and where they changed most."""
    changes = weight_changes(metrics)
    most = max(changes, key=changes.get)
    text = "The norm of the change over the norm of the base model's weights"
    return f"{text}; most in `{most}`, {changes[most]:.2%}."
