"""The values of a recipe's source, read from the recipe itself: what stands there is the source's, with exceptions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sft_recipes.config.nested_values import iterate_leaves

GROUPS = ("model", "data", "adapter", "trainer")  # evaluation, preview and names are ours
BATCH = ("trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps")


def read_source_values(recipe: Path) -> dict[str, Any]:
    """By dotted key what the recipe's source says: what the recipe sets, but for what its provenance excepts.

    A departure `{source: …, why: …}` gives the source's value; what `unknown` begins with is ours, as is the division
    of a step's rows among devices and accumulated steps; `effective_batch_size` is those rows.
    """
    recipe_values = OmegaConf.to_container(OmegaConf.load(recipe))
    provenance = recipe_values["provenance"]
    groups = {group: recipe_values[group] for group in GROUPS if group in recipe_values}
    values = dict(iterate_leaves(groups)) | {key: recipe_values[key] for key in ("seed",) if key in recipe_values}
    if "trainer.effective_batch_size" in values:
        values["effective_batch_size"] = values.pop("trainer.effective_batch_size")
        values = {key: value for key, value in values.items() if key not in BATCH}
    ours = {key for text in provenance["unknown"] for key in text.split(" (")[0].replace(",", " ").split()}
    for key, departure in provenance["departures"].items():
        if isinstance(departure, Mapping):
            values[key] = departure["source"]
        else:
            ours.add(key)
    return {key: value for key, value in values.items() if key not in ours and value is not None}
