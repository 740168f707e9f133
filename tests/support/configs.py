"""Configs for tests, through the parser that a run uses."""

from typing import Any

from omegaconf import OmegaConf

from sft_recipes.config.options import AdapterOptions
from sft_recipes.config.schema import Config, from_hydra, parse_adapter


def make_config(formatter: str = "auto", groups: dict[str, Any] | None = None, **data: Any) -> Config:
    """The config of a run on the datasets and options of `data`; `groups` are other keys of the config."""
    values = {"name": "test", "model": {"id": "tiny"}, "formatter": {"name": formatter}, "data": data}
    values |= {"adapter": {"type": "none"}, "trainer": {}, "evaluate": {}}
    return from_hydra(OmegaConf.create(values | (groups or {})))


def make_adapter(kind: str, **fields: Any) -> AdapterOptions:
    """The adapter of this type with these fields of its PEFT config."""
    return parse_adapter({"type": kind, kind: fields})
