"""A run's own config as the start of a command: `mode=evaluate evaluate.run=RUN`, `resume RUN`."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from sft_recipes.config.hydra_plugin import OPEN_GROUPS, config_folder
from sft_recipes.errors import ConfigError

NAME, RESUMED = "saved_run", "resumed_run"  # by which Hydra finds it


def store_saved_run(run: Path, chosen: Collection[str] = ()) -> str:
    """Gives Hydra the run's composed config as a primary one, and gives back its name.

    `run` is the run's folder, or the model's within it. The groups that are `chosen` anew (`data=file`) leave their
    place to the choice; of `data` that are the datasets, what holds for all of them stays. Raises ConfigError for a
    folder without a config. Whether a model's own code may run is never taken from there.
    """
    saved = read_saved_config((run, run.parent), "Write +recipe=NAME, or model=NAME data=NAME.")
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


def store_resumed_run(run: Path) -> str:
    """Gives Hydra the run's composed config as a primary one that resumes it in its folder, and gives back its name.

    The folder's .hydra stays what the run was started with. Raises ConfigError for a folder without a config.
    """
    saved = read_saved_config([run], "Name the folder of a run.")
    saved["trainer"]["resume_from_checkpoint"] = True
    hydra = OmegaConf.to_container(OmegaConf.load(config_folder("conf") / "config.yaml"))["hydra"]
    hydra |= {"run": {"dir": str(run.resolve())}, "output_subdir": ".hydra/resumed"}
    node = {"defaults": ["open_groups", "_self_"], "hydra": hydra, **saved}
    ConfigStore.instance().store(name=RESUMED, node=node, provider=str(run))
    return RESUMED


def read_saved_config(folders: Sequence[Path], way_out: str) -> dict[str, Any]:
    """The composed config of the first of these folders that has one, without what its own command alone decides.

    Whether a model's own code may run is for whoever opens the folder. Raises ConfigError where there is none.
    """
    file = next((file for folder in folders if (file := folder / ".hydra" / "config.yaml").is_file()), None)
    if file is None:
        raise ConfigError(f"{folders[0]} has no .hydra/config.yaml with a config of its own. {way_out}")
    saved = OmegaConf.to_container(OmegaConf.load(file))
    saved.pop("overwrite", None)
    saved["model"] = {key: value for key, value in (saved.get("model") or {}).items() if key != "trust_remote_code"}
    return saved
