"""A finished run's own config as the start of a command: `mode=evaluate evaluate.run=outputs/lima/<date>`."""

from collections.abc import Collection, Mapping
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from sft_recipes.config.hydra_plugin import OPEN_GROUPS, config_folder
from sft_recipes.errors import ConfigError

NAME = "saved_run"  # by which Hydra finds it


def store_saved_run(run: Path, chosen: Collection[str] = ()) -> str:
    """Gives Hydra the run's composed config as a primary one, and gives back its name.

    `run` is the run's folder, or the model's within it. The groups that are `chosen` anew (`data=file`) leave their
    place to the choice; of `data` that are the datasets, what holds for all of them stays. Raises ConfigError for a
    folder without a config. Whether a model's own code may run is never taken from there.
    """
    files = [folder / ".hydra" / "config.yaml" for folder in (run, run.parent)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ConfigError(
            f"{run} has no .hydra/config.yaml with a config of its own. Write +recipe=NAME, or model=NAME data=NAME."
        )
    saved = OmegaConf.to_container(OmegaConf.load(file))
    saved.pop("overwrite", None)  # it was that run's
    saved["model"] = {key: value for key, value in (saved.get("model") or {}).items() if key != "trust_remote_code"}
    for group in chosen:
        kept = saved.get(group, {}) if group == "data" else {}
        saved[group] = {key: value for key, value in kept.items() if not isinstance(value, Mapping)}
    if "data" in chosen and "formatter" not in chosen:
        saved["formatter"] = {"name": "auto"}  # the run's own was for its own rows
    ours = OmegaConf.to_container(OmegaConf.load(config_folder("conf") / "config.yaml"))  # keys that an older run lacks
    node = OmegaConf.merge(ours, saved)
    node.defaults = ["open_groups", "_self_", *({group: None} for group in OPEN_GROUPS)]
    ConfigStore.instance().store(name=NAME, node=node, provider=str(run))
    return NAME
