"""The Python door to the configs: `compose("lima", "trainer.learning_rate=1e-5")`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from sft_recipes.config.hydra_errors import USER_ERRORS, user_message
from sft_recipes.config.hydra_plugin import config_folder, register_with_hydra
from sft_recipes.config.schema import Config, from_hydra
from sft_recipes.config.validation import validate_kwargs
from sft_recipes.errors import ConfigError


def compose(recipe: str | None = None, *overrides: str, **groups: Mapping[str, Any]) -> Config:
    """The config that `python -m sft_recipes +recipe=RECIPE OVERRIDES` runs, for a notebook or a pipeline.

    `overrides` are Hydra's own (`"adapter=lora"`, `"trainer.learning_rate=1e-5"`). `groups` are plain values that
    are laid over the result: `trainer={"max_steps": 100}`; datasets of `data={"file": {…}}` replace the recipe's own.
    Raises ConfigError for whatever the command would refuse.

    >>> compose("lima", "trainer.num_train_epochs=3", data={"mine": {"data_files": "my.jsonl"}}).sources.keys()
    dict_keys(['mine'])
    """
    chosen = [f"+recipe={recipe}"] if recipe else []
    with hydra_initialized():
        try:
            composed = hydra.compose("config", [*chosen, *overrides])
        except USER_ERRORS as error:
            raise ConfigError(user_message(error)) from error
        for group, values in groups.items():
            lay_over(composed, group, values)
        config = from_hydra(composed)
    from trl import SFTConfig  # seconds, in which the command would only be waiting to train

    validate_kwargs(SFTConfig, config.trainer.fields, "trainer")
    return config


def lay_over(composed: DictConfig, group: str, values: Any) -> None:
    """Merges `values` into a group of the composed config; datasets replace those that were composed."""
    OmegaConf.set_struct(composed, False)
    if group == "data" and any(isinstance(value, Mapping) for value in values.values()):
        composed.data = {key: value for key, value in composed.data.items() if not isinstance(value, DictConfig)}
    composed.merge_with({group: values})


@contextmanager
def hydra_initialized() -> Iterator[None]:
    """Hydra with our configs; a Hydra that runs already, of the application around us, is put back afterwards."""
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    register_with_hydra()
    try:
        with hydra.initialize_config_dir(str(config_folder("conf")), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer
