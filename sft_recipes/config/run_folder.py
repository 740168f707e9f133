"""The folder that a run may write into: a new one, or with overwrite=true that of an earlier run, cleared first."""

import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from sft_recipes.config.hydra_plugin import OURS
from sft_recipes.config.secrets import check_no_secrets, mask_files
from sft_recipes.errors import ConfigError, exit_on_user_error, is_first_process

RESULTS = ("metrics.json", "supervision.json", "model", "checkpoint-*")  # a folder with one of these holds a run
BESIDE = (  # what else a run writes
    ".hydra", "sft_recipes.log", "answers.jsonl", "samples.jsonl", "report.md", "report.html", "loss.png",
    "weight_change.png", "preview.html", "preview.jsonl", "error.txt", "lr_find.json", "lr_find.html", "lr_find.png",
    "runs", ".lock", ".checkpoint_in_the_making", "curated.jsonl", "removed.jsonl", "curation.json",
    "curated.parquet", "lengths.png", "generate.json", "rejected.jsonl", "base-*.json",
)  # fmt: skip


def check_run_name(name: str) -> None:
    """Raises ConfigError for a name that would lead out of outputs/ and multirun/."""
    if not re.fullmatch(r"(?!\.{1,2}$)[^/\\\0-\x1f]{1,200}", name):
        raise ConfigError(f"name={name!r:.80} should be the name of one folder under outputs/, without a slash.")


@contextmanager
def explained_folder_errors(folder: Path) -> Iterator[None]:
    """A folder that cannot be made or written becomes a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}. Name another folder.") from error


def create_dated_folder(folder: Path) -> Path:
    """Makes a folder for one run alone; another that began in the same second leaves it DATE_TIME_2, and so on."""
    made, number = folder, 2
    with explained_folder_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                made.mkdir()
                return made
            except FileExistsError:
                made, number = folder.with_name(f"{folder.name}_{number}"), number + 1


def check_run_folder(folder: Path, overwrite: bool = False) -> None:
    """Raises ConfigError where the folder holds a run; with `overwrite` removes what that run wrote, and only that."""
    if not is_first_process() or not holds_run(folder):
        return
    if not overwrite:
        raise ConfigError(f"{folder} holds a run already. Write another folder, or overwrite=true to replace the run.")
    with own_folder(folder):
        for path in written(folder, RESULTS + BESIDE):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def holds_run(folder: Path) -> bool:
    """Whether a run has written into the folder, be it finished or not."""
    return any(written(folder, RESULTS))


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Holds the run's folder against a second run; the system lets go of it when the process ends, however it ends.

    A lock and not a file with a process id: a killed run leaves the file, and its id may be another's.
    Raises ConfigError, with the process and machine of the first run.
    """
    if not is_first_process():
        yield
        return
    lock = folder / ".lock"
    if lock.is_symlink():  # of a folder from elsewhere: what it points to would be written over
        lock.unlink()
    with lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"{folder} is in use by {file.read().strip() or 'another run'}. Wait for it, or name another folder "
                "with hydra.run.dir=DIR."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        for path in written(folder, tuple(f".{name}.[0-9]*" for name in RESULTS + BESIDE)):
            path.unlink()  # what a run was writing (reporting.run_folder.replace_file) when it was killed
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def written(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Those of the named files and folders that are there; checkpoint-24.bak is the user's."""
    found = [path for name in names for path in folder.glob(name)]
    return [path for path in found if re.fullmatch(r"(?!checkpoint-).*|checkpoint-\d+", path.name)]


def remove_if_nothing_was_run(folder: Path) -> None:
    """Removes the dated folder of a command that was refused, if it holds nothing but what Hydra wrote into it."""
    hydra = HydraConfig.get()
    named = any(override.startswith("hydra.run.dir=") for override in hydra.overrides.hydra)
    named |= hydra.output_subdir != ".hydra"  # the run that was to be resumed
    if named or {path.name for path in folder.iterdir()} - {".hydra", f"{hydra.job.name}.log"}:
        return
    remove_with_parents(folder)


def remove_with_parents(folder: Path) -> None:
    """Removes a dated folder, and what is empty without it: outputs/NAME."""
    shutil.rmtree(folder)
    for parent in list(folder.parents)[:2]:
        if parent != Path.cwd() and not any(parent.iterdir()):
            parent.rmdir()


def quote_value(text: str) -> str:
    """A text as the value of an override, which Hydra reads as it is.

    >>> print(quote_value('lr 1e-4, "wärm"'))
    "lr 1e-4, \\"wärm\\""
    """
    return QuotedString(text, Quote.double).with_quotes()


class CheckRunFolder(Callback):
    """Looks before Hydra writes into the folder; `check_run_folder` looks again for runs from Python."""

    @exit_on_user_error()  # of what a callback raises Hydra makes a warning
    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        check_before_writing(config)
        folder = self.named_or_dated(config, "hydra.run.dir")
        trains = OmegaConf.select(config, "mode") in (None, "train")  # what else is done would be written over the run
        if folder and not (trains and OmegaConf.select(config, "trainer.resume_from_checkpoint")):
            check_run_folder(folder, bool(config.get("overwrite")))

    @exit_on_user_error()
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        check_before_writing(config)
        folder = self.named_or_dated(config, "hydra.sweep.dir")
        resumed = OmegaConf.select(config, "trainer.resume_from_checkpoint")
        resumable = str(config.hydra.sweeper.get("_target_")).startswith(OURS)
        if folder and not resumed and (config.get("overwrite") or not resumable):  # ours know their jobs' folders
            for path in list(folder.glob("**/.hydra/config.yaml")):
                check_run_folder(path.parents[1], bool(config.get("overwrite")))

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        places = config.hydra.runtime.output_dir, config.hydra.output_subdir or "."
        if not is_first_process():
            return
        mask_files([*Path(*places).glob("*.yaml"), *Path(config.hydra.sweep.dir).glob("*.yaml")])

    def named_or_dated(self, config: DictConfig, key: str) -> Path | None:
        """The folder under this key, made anew where its name is a date; without one Hydra says why."""
        folder = OmegaConf.select(config, key, throw_on_resolution_failure=False)
        raw = OmegaConf.to_container(config.hydra, resolve=False)
        if folder == "":  # which would be the current folder
            raise ConfigError(f"{key} is empty. Write {key}=DIR.")
        if not folder:
            return None
        if "${now:" not in str(raw[key.split(".")[1]]["dir"]):
            with explained_folder_errors(named := Path(folder)):
                named.mkdir(parents=True, exist_ok=True)
            return named
        made = create_dated_folder(Path(folder))
        if str(made) != folder:
            with read_write(config):
                OmegaConf.update(config, key, str(made))
                if key == "hydra.sweep.dir":  # a sweep's jobs are composed from its overrides
                    config.hydra.overrides.hydra.append(f"{key}={quote_value(str(made))}")
        return made


def check_before_writing(config: DictConfig) -> None:
    """Raises ConfigError for secrets and for a name that is a path, before Hydra saves them."""
    check_no_secrets(OmegaConf.to_container(config))
    check_run_name(str(OmegaConf.select(config, "name", throw_on_resolution_failure=False) or "sft"))
