"""A source's own values beside a run's: what a recipe's page and every report print."""

import math
from collections.abc import Mapping
from typing import Any

from sft_recipes.config.nested_values import get_path

# A report is written without torch, and of a run that may have set none of these.
# Of trl.SFTConfig, whose import takes seconds and torch; a test compares them.
TRAINER_DEFAULTS = {
    "learning_rate": 2e-5, "lr_scheduler_type": "linear", "warmup_steps": 0, "num_train_epochs": 3, "max_steps": -1,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_length": 1024, "packing": False,
}  # fmt: skip


def compare_with_source(config: Mapping[str, Any], processes: int = 1) -> list[list[str]]:
    """A row a value under a head: its key, the source's, this run's, and where they differ why; then other departures.

    `config` is a composed one as plain data, such as the `config` of supervision.json.
    """
    values, why = config["provenance"]["values"], departure_reasons(config["provenance"])
    batch, length = effective_batch_size(config["trainer"], processes), config["trainer"].get("max_length")
    rows = [["field", "source", "this run", "departure"]]
    for key, theirs in values.items():
        ours = batch if key == "effective_batch_size" else get_path(config, key)
        if ours is None and key.endswith(".train_on"):
            ours = "assistant"  # a source's default
        note = f"departs: {why[key]}" if key in why else "departs, without a reason given"
        if is_same_value(theirs, ours) or (ours is None and key not in why):
            note = ""
        rows.append([key, str(theirs), "not in the config" if ours is None else str(ours), note])
    if "effective_batch_size" not in values:
        rows.append(["effective_batch_size", "", str(batch), ""])
    if length:
        sizes = [values.get(key) for key in ("effective_batch_size", "trainer.max_length")]
        theirs = f"{math.prod(sizes):,}" if None not in sizes else ""
        rows.append(["tokens per step, at most", theirs, f"{batch * length:,}", ""])
    return rows + [[key, "", "", f"departs: {reason}"] for key, reason in why.items() if key not in values]


def departure_reasons(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Why each departure is made; one from a single value of the source stands beside that value.

    >>> departure_reasons({"departures": {"data.held_out": {"source": 0, "why": "to judge the run"}}})
    {'data.held_out': 'to judge the run'}
    """
    return {key: why["why"] if isinstance(why, Mapping) else why for key, why in provenance["departures"].items()}


def effective_batch_size(trainer: Mapping[str, Any], processes: int = 1) -> int:
    """Rows a step over all processes.

    >>> effective_batch_size({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}, processes=2)
    64
    """
    if trainer.get("effective_batch_size"):
        return trainer["effective_batch_size"]
    values = TRAINER_DEFAULTS | trainer
    return values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * processes


def is_same_value(one: Any, other: Any) -> bool:
    """Whether two values are equal, numbers also where one is text, as YAML reads 2e-5."""
    try:
        return math.isclose(float(one), float(other), rel_tol=1e-9)
    except (TypeError, ValueError):
        return one == other or str(one) == str(other)
