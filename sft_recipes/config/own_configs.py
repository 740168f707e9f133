"""Configs that Hydra cannot find by itself: a recipe file of one's own, anywhere, and the config of an earlier run."""

import argparse
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from sft_recipes.config.config_files import is_code
from sft_recipes.config.hydra_plugin import OPEN_GROUPS, config_folder
from sft_recipes.config.nested_values import get_path, load_yaml
from sft_recipes.errors import ConfigError, exit_on_user_error

log = logging.getLogger(__name__)
STARTER = Path(__file__).with_name("starter.yaml")
SAVED, RESUMED = "saved_run", "resumed_run"  # the primary configs that stand for a run's own


@exit_on_user_error()
def main(arguments: list[str] | None = None) -> None:
    """Writes a recipe file with comments, to be changed and run."""
    parser = argparse.ArgumentParser(prog="python -m sft_recipes init", description=main.__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path("my.yaml"), help="the file to write (my.yaml)")
    file = parser.parse_args(arguments).file
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{file} should end with .yaml. Write python -m sft_recipes init {file.stem}.yaml.")
    if file.exists():
        raise ConfigError(f"{file} exists already. Write python -m sft_recipes init NAME.yaml.")
    run = quote(str(file))
    try:
        file.write_text(STARTER.read_text(encoding="utf-8").replace("my.yaml", run), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}.") from error
    print(f"{file} is written. Change it, then run: python -m sft_recipes {run}")


def store_recipe_file(file: Path) -> str:
    """Gives Hydra the file as a recipe, as if it began with `# @package _global_`; returns the override that adds it.

    Raises ConfigError for a file that holds no mapping, or that has the name of one of our recipes.
    """
    values, name = load_yaml(file), re.sub(r"[^A-Za-z0-9_]", "_", file.stem)  # Hydra reads no other letters
    name = re.sub(r"^(?=\d|(?:null|true|false|nan|inf)$)", "_", name)  # which it would read as a value
    ours = config_folder("recipes") / "recipe" / f"{name}.yaml"
    if ours.is_file():
        raise ConfigError(f"recipe={name} is in two files, {ours} and {file}. Rename yours.")
    if not isinstance(values, dict):
        raise ConfigError(f"{file} should hold a mapping, as `python -m sft_recipes init` writes one.")
    # as a stored config, since the search path takes folders: a file beside my.yaml would become a choice as well
    ConfigStore.instance().store(group="recipe", name=name, node=values, package="_global_", provider=str(file))
    return f"+recipe={name}"


def recipe_file(override: str) -> str | None:
    """The file that `store_recipe_file` has stored under this override."""
    group, _, name = override.partition("=")
    stored = ConfigStore.instance().repo.get("recipe", {}) if group == "+recipe" else {}
    return stored[f"{name}.yaml"].provider if f"{name}.yaml" in stored else None


def store_saved_run(run: Path, chosen: Collection[str] = ()) -> str:
    """Gives Hydra the run's composed config as a primary one, and gives back its name.

    `run` is the run's folder, or the model's within it. The groups that are `chosen` anew (`data=file`) leave their
    place to the choice; of `data` that are the datasets, what holds for all of them stays. Raises ConfigError for a
    folder without a config.
    """
    folder = next((folder for folder in (run, run.parent) if (folder / ".hydra").is_dir()), run)
    saved = read_saved_config(folder, "Write +recipe=NAME, or model=NAME data=NAME.")
    for group in chosen:
        kept = saved.get(group, {}) if group == "data" else {}
        saved[group] = {key: value for key, value in kept.items() if not isinstance(value, Mapping)}
    if "data" in chosen and "formatter" not in chosen:
        saved["formatter"] = {"name": "auto"}  # the run's own was for its own rows
    return store_primary(SAVED, saved, run)


def store_resumed_run(run: Path) -> str:
    """Gives Hydra the run's composed config as a primary one that resumes it in its folder, and gives back its name.

    The folder's .hydra stays what the run was started with. Raises ConfigError for a folder without a config.
    """
    saved = read_saved_config(run, "Name the folder of a run.")
    saved["trainer"]["resume_from_checkpoint"] = True
    saved["trainer"].pop("stop_at", None)  # which ended it
    saved["hydra"] = {"run": {"dir": str(run.resolve())}, "output_subdir": ".hydra/resumed"}
    return store_primary(RESUMED, saved, run)


def store_primary(name: str, values: Mapping[str, Any], run: Path) -> str:
    """Gives Hydra the values as a primary config, over our defaults for keys that an older run lacks; its name."""
    node = with_defaults(values)
    # a group that is listed, if only as null, is one that `data=file` chooses without a +
    node.defaults = ["open_groups", "_self_", *({group: None} for group in OPEN_GROUPS)]
    ConfigStore.instance().store(name=name, node=node, provider=str(run))
    return name


def with_defaults(values: Mapping[str, Any]) -> DictConfig:
    """A composed config over the values of conf/config.yaml, for keys that an older version did not write."""
    return OmegaConf.merge(load_yaml(config_folder("conf") / "config.yaml"), values)


def read_saved_config(run: Path, way_out: str) -> dict[str, Any]:
    """The composed config of the run in this folder, without what its own command alone decides.

    Whether a model's own code may run, and that of a benchmark's file, is for whoever opens the folder. Raises
    ConfigError where there is none.
    """
    file = run / ".hydra" / "config.yaml"
    if not file.is_file():
        if not run.is_dir():
            raise ConfigError(f"{run} is no folder here. Name the folder of a run.")
        raise ConfigError(f"{run} has no .hydra/config.yaml with a config of its own. {way_out}")
    saved = load_yaml(file)
    if not isinstance(saved, dict) or not all(isinstance(saved.get(group, {}), dict) for group in OPEN_GROUPS):
        raise ConfigError(f"{file} does not hold the config of a run.")
    for key in ("overwrite", "hydra", "defaults"):  # no run writes the last two, which would be code of the folder's
        saved.pop(key, None)
    if is_code("evaluate.lm_eval", get_path(saved, "evaluate.lm_eval")):  # which is then missing until it is typed
        log.warning("%s has benchmarks from files, whose functions run where you name them yourself.", run)
        saved["evaluate"]["lm_eval"] = "???"
    saved["model"] = {key: value for key, value in (saved.get("model") or {}).items() if key != "trust_remote_code"}
    return saved
