"""Checkpoints that are whole or not there: each with a manifest of its files and run, and with room on the disk."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import SaveStrategy, sort_checkpoints
from trl import SFTConfig

from sft_recipes.config.nested_values import get_number, iterate_leaves
from sft_recipes.config.schema import Config
from sft_recipes.data.digest import hash_file, stack_versions
from sft_recipes.errors import ConfigError, one_line, plural
from sft_recipes.reporting.run_folder import read_json, write_json
from sft_recipes.training.memory import format_bytes, optimizer_state_bytes

log = logging.getLogger(__name__)
MANIFEST, STAGING = "manifest.json", ".checkpoint_in_the_making"
# What a resumed run may change: it decides what is measured, logged and saved, and when training ends
FREE_GROUPS = {"name", "mode", "evaluate", "preview", "generate", "objective", "provenance", "callbacks", "overwrite",
               "lr_find"}  # fmt: skip
FREE_FIELDS = {
    "max_steps", "num_train_epochs", "report_to", "run_name", "resume_from_checkpoint", "check_memory", "disable_tqdm",
    "push_to_hub", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "per_device_eval_batch_size",
}  # fmt: skip
FREE_PREFIXES = ("save_", "logging_", "log_", "eval_", "hub_", "early_stopping_", "stop_at", "activation_checkpointing")
ROWS_GROUPS = {"data", "formatter", "data_checks"}  # all of it shows in the rows' digest


def describe_run(config: Config, rows: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """What has to be the same when a run is resumed: its config, the digest of its rows, the number of processes."""
    return {"config": config.composed, "rows": rows.get("sha256"), "processes": processes, "streamed": config.streamed}


def run_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the run of a checkpoint and one that would resume it, each as `key=now (was before)`.

    How the rows are read counts where they are other rows, or are streamed and not known in advance.
    """
    other_rows = saved["rows"] != now["rows"]
    free = FREE_GROUPS if other_rows or now["streamed"] else FREE_GROUPS | ROWS_GROUPS
    old, new = (dict(iterate_leaves(run["config"])) | {"data.cache": None} for run in (saved, now))  # which is free
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key) and not is_free(key, free)]
    found = [f"{key}={json.dumps(new.get(key))} (was {json.dumps(old.get(key))})" for key in keys]
    if other_rows and not any(key.partition(".")[0] in ROWS_GROUPS | {"seed"} for key in keys):
        found.append("other training rows")
    if saved["processes"] != now["processes"]:
        found.append(f"{plural(now['processes'], 'process', 'processes')} (was {saved['processes']})")
    return found


def is_free(key: str, free_groups: set[str]) -> bool:
    """Whether a resumed run may have another value under this dotted key.

    >>> is_free("trainer.save_steps", set()), is_free("trainer.learning_rate", set())
    (True, False)
    """
    group, _, field = key.partition(".")
    return group in free_groups or (group == "trainer" and (field in FREE_FIELDS or field.startswith(FREE_PREFIXES)))


def is_finished(folder: Path, config: Config) -> bool:
    """Whether the run to resume has all its results, but perhaps no report, and can or shall make no more steps."""
    metrics = read_json(folder / "metrics.json")
    if not metrics or "stopped_at" in metrics or not config.trainer.fields.get("resume_from_checkpoint"):
        return False
    checkpoints = newest_first(folder)  # supervision.json may be of a resume that was refused
    saved = read_json([*checkpoints, folder][0] / MANIFEST).get("run") or read_json(folder / "supervision.json")
    (steps_then, epochs_then), (steps, epochs) = (
        [get_number(values, f"trainer.{key}") or 0 for key in ("max_steps", "num_train_epochs")]
        for values in (saved.get("config", {}), config.composed)
    )
    made = get_number(metrics, "steps") or 0
    return not checkpoints or 0 < steps <= made or (steps == steps_then and epochs <= epochs_then)


def check_unfinished(folder: Path, config: Config) -> None:
    """Raises ConfigError where the run to resume is finished."""
    if is_finished(folder, config):
        raise ConfigError(
            f"{folder} is finished, its model is in {folder / 'model'}. To train that further write model.id={folder} "
            "in a run of its own; where it has a checkpoint, more trainer.num_train_epochs or trainer.max_steps go on."
        )


def find_resumable(folder: Path, wanted: str | bool | None, now: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from: the newest whole one of `folder` where `wanted` is true, else the one it names.

    Damaged ones are named in the log and passed over; None where there is no whole one, so that a job that is started
    again before its first checkpoint begins anew. Raises ConfigError where the checkpoint is of another run.
    """
    if not wanted:
        return None
    for checkpoint in newest_first(folder) if wanted is True else [Path(wanted)]:
        if not (fault := find_damage(checkpoint)):
            break
        if wanted is not True:
            raise ConfigError(f"trainer.resume_from_checkpoint={wanted} cannot be resumed: {fault}.")
        log.warning("%s is passed over: %s.", checkpoint, fault)
    else:
        log.warning("%s has no whole checkpoint to resume from: training begins anew.", folder)
        return None
    manifest = read_json(checkpoint / MANIFEST)
    if differences := run_differences(manifest["run"], now):
        own = folder / ".hydra" / "config.yaml"
        if own.is_file() and folder in checkpoint.parents:  # Hydra has written the refused one over its own
            OmegaConf.save(OmegaConf.create(manifest["run"]["config"]), own)
        raise ConfigError(
            f"{checkpoint} is of another run than this one, with {'; '.join(differences)}. Leave that as it "
            "was, or train anew in another folder."
        )
    was, has = manifest["versions"], stack_versions()
    others = [f"{name} {has.get(name)} (was {was[name]})" for name in was if has.get(name) != was[name]]
    if others:
        log.warning("The checkpoint was written by other versions, so the weights may differ in their last bits: %s.",
                    ", ".join(others))  # fmt: skip
    return checkpoint


def last_checkpoint_line(folder: Path) -> str:
    """A sentence on the newest checkpoint, for a run that has failed; empty where there is none."""
    return "".join(f" {newest} is of before it and is kept." for newest in newest_first(folder)[:1])


def newest_first(folder: Path) -> list[Path]:
    """The run's checkpoints, by their steps; checkpoint-24.bak, which transformers counts as one, is the user's."""
    paths = (Path(path) for path in reversed(sort_checkpoints(str(folder))))
    return [path for path in paths if path.name.removeprefix("checkpoint-").isdecimal()]


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing, of another size or of another content; else None."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        if not (manifest := read_json(checkpoint / MANIFEST)):
            return f"it has no {MANIFEST}, so it was not written whole"
        files, run = manifest["files"], manifest["run"]
        _ = manifest["versions"].items(), run["config"].items(), run["rows"], run["processes"]  # what a resume reads
        for name, known in files.items():
            file = checkpoint / name
            size = file.stat().st_size if file.is_file() else None
            if size != known["size"]:
                return f"{name} is missing" if size is None else f"{name} has {size} bytes, not {known['size']}"
            if hash_file(file) != known["sha256"]:
                return f"{name} is not what was written"
    except (ConfigError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"its {MANIFEST} or a file cannot be read ({type(error).__name__})"
    return None


def publish_checkpoint(staged: Path, folder: Path, run: Mapping[str, Any]) -> Path:
    """Moves a checkpoint that was written aside to its place in `folder`, with its manifest, once it is on the disk.

    Checkpoints of this and of later steps, which an earlier attempt has left, make room for it.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    listed = {str(path.relative_to(staged)): {"size": path.stat().st_size, "sha256": hash_file(path)} for path in files}
    write_json(staged / MANIFEST, {"files": listed, "run": run, "versions": stack_versions()})
    for path in (*files, staged / MANIFEST, *(path for path in staged.rglob("*") if path.is_dir()), staged):
        flush_to_disk(path)
    for path in newest_first(folder):
        if int(path.name.partition("-")[2]) >= int(staged.name.partition("-")[2]):
            shutil.rmtree(path)
    published = staged.rename(folder / staged.name)
    flush_to_disk(folder)
    return published


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def best_checkpoint(folder: Path, state: TrainerState) -> str | None:
    """The folder of the best step's checkpoint, where there is one: a run may have been moved since."""
    best = folder / f"checkpoint-{state.best_global_step}"
    return str(best) if state.best_global_step and best.is_dir() else None


def check_disk_space(folder: Path, model: torch.nn.Module, arguments: SFTConfig) -> None:
    """Raises ConfigError where checkpoints and the model would not fit on the disk, before training starts."""
    weights, checkpoint = checkpoint_bytes(model, arguments)
    # one more than are kept is there at once, since an old one goes when the new one is whole
    most = 0 if arguments.save_strategy == SaveStrategy.NO else (arguments.save_total_limit or 1) + 1
    number = max(most - len(newest_first(folder)), 0)
    need, free = weights + number * checkpoint, shutil.disk_usage(folder).free
    if need > free:
        raise ConfigError(
            f"{folder} has {format_bytes(free)} free, and this run will write {format_bytes(need)}: the model, and "
            f"{plural(number, 'checkpoint')} of {format_bytes(checkpoint)} at once. Make room, or write "
            "trainer.save_total_limit=1, trainer.save_strategy=no or hydra.run.dir=DIR on another disk."
        )


def check_room_for_checkpoint(folder: Path, model: torch.nn.Module, arguments: SFTConfig) -> None:
    """Raises OSError where the disk has no room for one more checkpoint, before any of it is written."""
    _, need = checkpoint_bytes(model, arguments)
    if shutil.disk_usage(folder).free < need:
        raise OSError(errno.ENOSPC, f"it takes about {format_bytes(need)}")


@contextmanager
def explained_write_errors(folder: Path, what: str) -> Iterator[None]:
    """What goes wrong while something is written to the run's folder as a ConfigError: a full disk, lost rights."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save tells that it failed at the file only in the text of a RuntimeError
        of_torch = ("PytorchStreamWriter", "No space left", "unexpected pos")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in of_torch):
            raise
        free, why = shutil.disk_usage(folder).free, getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{what} could not be written to {folder}, which has {format_bytes(free)} free: {one_line(why)}. "
            f"Earlier checkpoints are as they were. Make room, then go on with: python -m sft_recipes resume "
            f"{quote(str(folder))}"
        ) from error


def checkpoint_bytes(model: torch.nn.Module, arguments: SFTConfig) -> tuple[int, int]:
    """Bytes that saving the model takes, and a checkpoint: all weights, or an adapter's, with the optimizer's state."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if hasattr(model, "peft_config") else list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    state = sum(optimizer_state_bytes(arguments.optim.value, parameter) for parameter in trained)
    return weights, weights + (0 if arguments.save_only_model else state)
