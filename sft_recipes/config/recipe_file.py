"""A recipe file of one's own: `python -m sft_recipes init` writes my.yaml, `python -m sft_recipes my.yaml` runs it."""

import argparse
import re
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from sft_recipes.config.hydra_plugin import config_folder
from sft_recipes.errors import ConfigError, exit_on_user_error

STARTER = Path(__file__).with_name("starter.yaml")


@exit_on_user_error()
def main(arguments: list[str] | None = None) -> None:
    """Writes a recipe file with comments, to be changed and run."""
    parser = argparse.ArgumentParser(prog="python -m sft_recipes init", description=main.__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path("my.yaml"), help="the file to write (my.yaml)")
    file = parser.parse_args(arguments).file
    if file.exists():
        raise ConfigError(f"{file} exists already. Write python -m sft_recipes init NAME.yaml.")
    file.write_text(STARTER.read_text(encoding="utf-8").replace("my.yaml", str(file)), encoding="utf-8")
    print(f"{file} is written. Change it, then run: python -m sft_recipes {file}")


def store_recipe_file(file: Path) -> str:
    """Gives Hydra the file as a recipe, as if it began with `# @package _global_`; returns the override that adds it.

    Raises ConfigError for a file that holds no mapping, or that has the name of one of our recipes.
    """
    name, values = re.sub(r"\W", "_", file.stem), OmegaConf.load(file)
    ours = config_folder("recipes") / "recipe" / f"{name}.yaml"
    if ours.is_file():
        raise ConfigError(f"recipe={name} is in two files, {ours} and {file}. Rename yours.")
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{file} should hold a mapping, as `python -m sft_recipes init` writes one.")
    ConfigStore.instance().store(group="recipe", name=name, node=values, package="_global_", provider=str(file))
    return f"+recipe={name}"


def recipe_file(override: str) -> str | None:
    """The file that `store_recipe_file` has stored under this override."""
    group, _, name = override.partition("=")
    stored = ConfigStore.instance().repo.get("recipe", {}) if group == "+recipe" else {}
    return stored[f"{name}.yaml"].provider if f"{name}.yaml" in stored else None
