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
    warnings += filter(None, [describe_lost_thinking(metrics), describe_cut_thoughts(metrics)])
    if forgetting not in (None, "passed"):
        warnings.append(f"Forgetting: {forgetting}. {describe_change(metrics)}")
    if benchmarks not in (None, "passed"):
        warnings.append(f"Benchmarks: {benchmarks}.{describe_worst_task(metrics)}")
    return warnings


def describe_lost_thinking(metrics: Mapping[str, Any], fall: float = 0.1) -> str:
    """A warning where the share of answers that think before they answer fell by more than `fall`; else empty."""
    base, tuned = (get_number(metrics, f"{when}.thinking.share") for when in ("before", "after"))
    if base is None or base - (tuned or 0) <= fall:
        return ""
    return (
        f"Thinking: {base:.0%} of the base model's answers begin with a thought, {tuned or 0:.0%} of the tuned "
        "model's. Rows without thoughts teach this: train on rows with them (a `thinking` key), or mix some in. Where "
        "it is meant, write `model.chat_template_kwargs={enable_thinking: false}`."
    )


def describe_cut_thoughts(metrics: Mapping[str, Any], enough: float = 0.9) -> str:
    """A warning where fewer than `enough` of the tuned model's thoughts are followed by an answer; else empty."""
    answered = get_number(metrics, "after.thinking.answered")
    if answered is None or answered >= enough:
        return ""
    return (
        f"Thinking: {answered:.0%} of the tuned model's thoughts are followed by an answer. Where "
        "`evaluate.max_new_tokens` cut the others, raise it."
    )


def describe_prompt(metrics: Mapping[str, Any]) -> str:
    """What the base model was given in the column `prompted`; empty where it was not."""
    prompted = as_mapping(get_path(metrics, "before.prompted"))
    if not prompted:
        return ""
    shots = prompted.get("few_shot")
    parts = ["a system prompt"] * bool(prompted.get("system"))
    parts += [f"{shots} row{'s' if shots > 1 else ''} with their answers"] * bool(shots)
    form = "turns of the chat template"
    if prompted.get("as_text"):
        form = "plain text, since it came without a chat template"
    return f"Prompted is the base model behind {' and '.join(parts)}, as {form}."


def describe_stop(metrics: Mapping[str, Any]) -> str:
    """What to do where other tools take the base's stop tokens, not the template's; else empty."""
    if get_path(metrics, "loading.base_stops") is not False:
        return ""
    stop = str(metrics["loading"].get("stop")).replace("`", "")
    return (
        f"The base does not stop at `{stop}`: PEFT and transformers run past it with this adapter, unless it is loaded "
        "as model/README.md says, or merged."
    )


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
