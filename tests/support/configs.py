"""Configs as a command line or a test makes them, and the line of an error that one of them causes."""

from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from sft_recipes.config.hydra_plugin import config_folder, register_with_hydra
from sft_recipes.config.schema import Config, from_hydra
from sft_recipes.errors import ConfigError


def composed(*overrides: str) -> Config:
    """What a command line with these overrides runs."""
    GlobalHydra.instance().clear()
    register_with_hydra()
    with initialize_config_dir(str(config_folder("conf")), version_base="1.3"):
        return from_hydra(compose("config", list(overrides)))


def data_config(formatter: str = "auto", groups: dict[str, Any] | None = None, **data: Any) -> Config:
    """A config of which only the data is of interest, through a run's own parser; `groups` are other keys."""
    values = {"name": "test", "model": {"id": "tiny"}, "formatter": {"name": formatter}, "data": data}
    values |= {"adapter": {"type": "none"}, "trainer": {}, "evaluate": {}}
    return from_hydra(OmegaConf.create(values | (groups or {})))


def error_of(function, *arguments) -> str:
    """The line of the ConfigError that this call raises."""
    with pytest.raises(ConfigError) as raised:
        function(*arguments)
    return str(raised.value)
