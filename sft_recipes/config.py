"""Hydra's side of the house: where the YAML lives, and one composed config as checked, plain Python."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from sft_recipes.binding import ConfigError, call, unknown

OPEN_GROUPS = ("model", "data", "formatter", "adapter", "trainer", "evaluate")


@dataclass(frozen=True)
class Config:
    """One composed run as plain dicts, numbers and strings."""

    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    formatter: dict[str, Any]
    adapter: dict[str, Any]
    trainer: dict[str, Any]
    evaluate: dict[str, Any]
    mode: str = "train"
    seed: int = 42
    objective: str | None = None
    smoke: bool = False


MODES = ("train", "preview")


def from_hydra(composed: DictConfig) -> Config:
    """The composed config, resolved; raises ConfigError for an unknown root key, a wrong type or an unknown mode."""
    for key in sorted(OmegaConf.missing_keys(composed)):
        raise ConfigError(f"{key} is missing. Write {key}=…")
    values = OmegaConf.to_container(composed, resolve=True)
    known = {field.name for field in fields(Config)}
    for key in values:
        if key not in known:
            raise ConfigError(unknown(key, key, known, "a recipe"))
    config = call(Config, values, "config")
    if config.mode not in MODES:
        raise ConfigError(f"mode should be {' or '.join(MODES)}, not {config.mode!r}.")
    return config


def folder(name: str) -> Path:
    """`conf` or `recipes`: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    return next((path for path in (package / name, package.parent / name) if path.is_dir()), package / name)


def refuse_twins(user_folder: str | None) -> None:
    """Raises ConfigError when a file of the user's `-cd` folder has the name of one of ours.

    Hydra alone takes the first of the two without a word.
    """
    for mine in sorted(Path(user_folder).rglob("*.yaml")) if user_folder else []:
        name = mine.relative_to(user_folder)
        for ours in (folder("recipes") / name, folder("conf") / name):
            if ours.is_file() and ours.resolve() != mine.resolve():
                choice = "=".join(name.with_suffix("").as_posix().rsplit("/", 1))
                raise ConfigError(f"{choice} is in two files, {ours} and {mine}. Rename yours.")


class RecipesSearchPath(SearchPathPlugin):
    """Adds recipes/ to what Hydra searches."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("sft_recipes", f"file://{folder('recipes')}")


def register() -> None:
    """Tells Hydra of our resolvers, the second config root, and the groups that take keys they do not list."""
    open_groups = {group: DictConfig({}, flags={"struct": False}) for group in OPEN_GROUPS}
    ConfigStore.instance().store(name="open_groups", node=DictConfig(open_groups), provider="sft_recipes")
    Plugins.instance().register(RecipesSearchPath)
    OmegaConf.register_new_resolver("package", lambda path: str(Path(__file__).parent / path), replace=True)
