"""The folder that a run may write into: a new one, or with overwrite=true that of an earlier run, cleared first."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from sft_recipes.config.hydra_plugin import OURS
from sft_recipes.errors import ConfigError, exit_on_user_error

RESULTS = ("metrics.json", "supervision.json", "model", "checkpoint-*")  # a folder with one of these holds a run
BESIDE = (  # what else a run writes
    ".hydra", "sft_recipes.log", "answers.jsonl", "samples.jsonl", "report.md", "report.html", "loss.png",
    "weight_change.png", "preview.html", "preview.jsonl", "error.txt", "lr_find.json", "lr_find.html", "lr_find.png",
    "runs", ".lock", ".checkpoint_in_the_making", "curated.jsonl", "removed.jsonl", "curation.json",
    "curated.parquet", "lengths.png", "generate.json", "rejected.jsonl",
)  # fmt: skip
HYDRAS = (".hydra", "sft_recipes.log")  # written before the run looks at its config


def check_run_folder(folder: Path, overwrite: bool = False) -> None:
    """Raises ConfigError where the folder holds a run; with `overwrite` removes what that run wrote, and only that."""
    if int(os.environ.get("RANK", 0)) or not holds_run(folder):  # of several processes the first one looks
        return
    if not overwrite:
        raise ConfigError(f"{folder} holds a run already. Write another folder, or overwrite=true to replace the run.")
    check_not_in_use(folder)
    for path in written(folder, RESULTS + BESIDE):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def holds_run(folder: Path) -> bool:
    """Whether a run has written into the folder, be it finished or not."""
    return any(written(folder, RESULTS))


def check_not_in_use(folder: Path) -> None:
    """Raises ConfigError where a run is still writing; the lock that it holds on a file ends with its process."""
    if (folder / ".lock").is_file():
        with (folder / ".lock").open() as file:
            try:
                # a lock and not a file with a process id: a killed run leaves the file, and its id may be another's
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"{folder} is in use by {file.read().strip()}. Write another folder.") from error


def written(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """Those of the named files and folders that are there."""
    return (path for name in names for path in list(folder.glob(name)))


def remove_if_nothing_was_run(folder: Path) -> None:
    """Removes the dated folder of a command that was refused, if it holds nothing but what Hydra wrote into it."""
    named = any(override.startswith("hydra.run.dir=") for override in HydraConfig.get().overrides.hydra)
    if named or {path.name for path in folder.iterdir()} - set(HYDRAS):
        return
    shutil.rmtree(folder)
    for parent in list(folder.parents)[:2]:  # outputs/NAME
        if parent != Path.cwd() and not any(parent.iterdir()):
            parent.rmdir()


class CheckRunFolder(Callback):
    """Looks before Hydra writes into the folder; `check_run_folder` looks again for runs from Python."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        folder = OmegaConf.select(config, "hydra.run.dir", throw_on_resolution_failure=False)
        self.check([Path(folder)] if folder else [], config)  # without one Hydra says why

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        folder = OmegaConf.select(config, "hydra.sweep.dir", throw_on_resolution_failure=False)
        resumable = str(config.hydra.sweeper.get("_target_")).startswith(OURS)
        if folder and (config.get("overwrite") or not resumable):  # our sweepers know their jobs' folders
            self.check([path.parents[1] for path in Path(folder).glob("**/.hydra/config.yaml")], config)

    @exit_on_user_error()  # of what a callback raises Hydra makes a warning
    def check(self, folders: list[Path], config: DictConfig) -> None:
        resumed = OmegaConf.select(config, "trainer.resume_from_checkpoint")
        for folder in [] if resumed else folders:
            check_run_folder(folder, bool(config.get("overwrite")))
