"""A run's own config as the one that a command begins with: `python -m sft_recipes resume outputs/lima/<date>`."""

from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from sft_recipes.config.hydra_plugin import config_folder
from sft_recipes.errors import ConfigError

NAME = "resumed_run"  # by which Hydra finds it


def store_resumed_run(run: Path) -> str:
    """Gives Hydra the run's composed config as a primary one that resumes it in its folder, and gives back its name.

    The folder's .hydra stays what the run was started with. Raises ConfigError for a folder without a config.
    """
    file = run / ".hydra" / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} is not the folder of a run: it has no .hydra/config.yaml.")
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(file))
    values["trainer"]["resume_from_checkpoint"] = True
    hydra = OmegaConf.to_container(OmegaConf.load(config_folder("conf") / "config.yaml"))["hydra"]
    hydra |= {"run": {"dir": str(run.resolve())}, "output_subdir": ".hydra/resumed"}
    node = {"defaults": ["open_groups", "_self_"], "hydra": hydra, **values}
    ConfigStore.instance().store(name=NAME, node=node, provider="sft_recipes")
    return NAME
