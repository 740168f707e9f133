"""The Python door to the configs: `compose("lima", "trainer.learning_rate=1e-5")`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from sft_recipes.config.config_files import check_choices, check_recipes
from sft_recipes.config.hydra_errors import USER_ERRORS, user_message
from sft_recipes.config.hydra_plugin import OPEN_GROUPS, config_folder, register_with_hydra
from sft_recipes.config.own_configs import store_recipe_file, store_saved_run
from sft_recipes.config.run_folder import quote_value
from sft_recipes.config.schema import Config, from_hydra
from sft_recipes.config.validation import show_value, validate_kwargs
from sft_recipes.errors import ConfigError


def compose(
    recipe: str | None = None, *overrides: str, run: str | Path | None = None, **groups: Mapping[str, Any]
) -> Config:
    """The config that `python -m sft_recipes +recipe=RECIPE OVERRIDES` runs, for a notebook or a pipeline.

    `recipe` is one of ours or a YAML file. `run` is the folder of a finished run, whose own config takes the place of a
    recipe: `evaluate(compose(run="outputs/lima/2026-11-20_15-26-03"))`. `overrides` are Hydra's own (`"adapter=lora"`,
    `"trainer.learning_rate=1e-5"`). `groups` are plain values that are laid over the result:
    `trainer={"max_steps": 100}`; datasets of `data={"file": {…}}` replace the recipe's own,
    but for those of the same names.
    Raises ConfigError for whatever the command would refuse.

    >>> compose("lima", "trainer.num_train_epochs=3", data={"mine": {"data_files": "my.jsonl"}}).sources.keys()
    dict_keys(['mine'])
    """
    with hydra_initialized():
        try:
            primary, chosen = "config", [f"+recipe={recipe}"] if recipe else []
            loader = GlobalHydra.instance().config_loader()
            if recipe and recipe.endswith((".yaml", ".yml")):
                chosen = [store_recipe_file(Path(recipe))]
                check_recipes(loader, primary, [*chosen, *overrides])
            if run:
                primary = store_saved_run(Path(run), {key.partition("=")[0] for key in overrides} & set(OPEN_GROUPS))
                chosen += [f"evaluate.run={quote_value(str(run))}"]
            composed = hydra.compose(primary, [*chosen, *overrides], return_hydra_config=True)
            check_choices(composed, composed.hydra, loader)
            OmegaConf.set_struct(composed, False)
            del composed["hydra"]
            for group, values in groups.items():
                if group in OPEN_GROUPS and not isinstance(values, Mapping):
                    raise ConfigError(f"{group} should be a mapping, not {show_value(values)}.")
                if group == "data" and any(isinstance(value, Mapping) for value in values.values()):  # in place of ours
                    composed.data = {
                        key: each
                        for key, each in composed.data.items()
                        if key in values or not isinstance(each, DictConfig)
                    }
                composed.merge_with({group: values})
            config = from_hydra(composed)
        except (*USER_ERRORS, OSError) as error:
            raise ConfigError(user_message(error)) from error
    from trl import SFTConfig  # seconds, in which the command would only be waiting to train

    validate_kwargs(SFTConfig, config.trainer.fields, "trainer")
    return config


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
