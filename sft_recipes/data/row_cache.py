"""Encoded rows on the disk, mapped into memory: found again by the next run, job, and process of this one."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME

from sft_recipes.config.schema import Config
from sft_recipes.data.digest import hash_file, stack_versions
from sft_recipes.data.sources import asked_source, source_version
from sft_recipes.data.token_rows import TrainingData, write_tables
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, DataError

log = logging.getLogger(__name__)
CACHE_BYTES = 50 * 2**30  # of all entries; beyond them those go that were not used for the longest time
ROOMS = ("config", "curation", "data", "encoding")  # whose code decides what rows become
# What encoded rows do not depend on; of the model they know the tokenizer, which is looked at itself. Policies and
# shares are applied to encoded rows.
IRRELEVANT_TO_ROWS = frozenset((
    "name", "model", "adapter", "trainer", "evaluate", "preview", "mode", "objective", "provenance", "callbacks",
    "overwrite", "mix", "generate", "lr_find", "composed", "command", "data_checks",
))  # fmt: skip


def cache_root() -> Path | None:
    """$SFT_RECIPES_CACHE, else a folder beside the Hub's cache; None where the variable is empty."""
    root = os.environ.get("SFT_RECIPES_CACHE", str(Path(HF_HOME, "sft_recipes")))
    return Path(root) if root else None


def cached(identity: str, make: Callable[[], TrainingData], warn: int = logging.WARNING) -> TrainingData:
    """What `make()` gives, made once for one identity by all processes of all runs, mapped from its folder.

    Where it cannot be kept, by a full disk for one, that is logged as `warn`, and the run goes on with what was made.
    """
    folder = cache_root() / f"rows-{identity}"
    try:
        folder.parent.mkdir(0o700, parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock", mode=0o600)
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            log.info("Another process encodes the same rows, this one waits for them.")
            held = lock.acquire()
    except (OSError, NotImplementedError) as error:
        log.log(warn, "Encoded rows cannot be kept in %s, so every run encodes its own: %s.", folder.parent, error)
        return make()
    with held:
        if found := find_entry(folder):
            return found
        made = make()
        try:
            write_entry(folder, made)
            return read_entry(folder)
        except (OSError, TypeError, ValueError) as error:  # Arrow's rows can hold what JSON does not, such as dates
            log.log(warn, "Encoded rows could not be kept in %s, so the next run encodes anew: %s.", folder, error)
            return made


def find_entry(folder: Path) -> TrainingData | None:
    """The rows of a whole entry, None where there is none; a damaged one is named."""
    try:
        listed = json.loads((folder / "files.json").read_bytes())
        for name, known in listed.items() if is_first_of_node() else ():  # which has looked at them for all
            if hash_file(folder / name) != known:
                raise ValueError(f"{name} is not what was written")
        found = read_entry(folder)
        os.utime(folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged, so its rows are encoded again: %s.", folder, error)
        shutil.rmtree(folder, ignore_errors=True)  # or where nothing can be kept the other processes would take it
        return None
    log.info("These rows were encoded by an earlier run and come from %s (data.cache=false encodes anew).", folder)
    return found


def read_entry(folder: Path) -> TrainingData:
    """The rows of an entry, mapped."""
    tables = {path.stem: Dataset.from_file(str(path)) for path in folder.glob("*.arrow")}
    return TrainingData(**tables, **json.loads((folder / "data.json").read_bytes()))


def write_entry(folder: Path, data: TrainingData) -> None:
    """Writes an entry aside and renames it once it is whole; old ones make room for it."""
    rest = {item.name: value for item in fields(data) if not isinstance(value := getattr(data, item.name), Dataset)}
    text = json.dumps(rest)
    staged = Path(tempfile.mkdtemp(prefix=".rows-", dir=folder.parent))  # which nobody else may read
    try:
        for item in fields(data):
            if isinstance(rows := getattr(data, item.name), Dataset):
                write_tables(staged / f"{item.name}.arrow", [rows.with_format("arrow")[:]])
        (staged / "data.json").write_text(text, encoding="utf-8")
        listed = {path.name: hash_file(path) for path in sorted(staged.iterdir())}
        (staged / "files.json").write_text(json.dumps(listed), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    remove_old_entries(folder)


def remove_old_entries(newest: Path) -> None:
    """Removes what was not used for the longest time until CACHE_BYTES are left, and what killed runs left half."""
    used, sizes = {}, {}
    for folder in newest.parent.glob("*rows-*"):
        with suppress(OSError):  # another process removes it
            sizes[folder] = sum(path.stat().st_size for path in folder.iterdir())
            used[folder] = folder.stat().st_mtime
    size = 0
    for folder in sorted(used, key=used.get, reverse=True):
        size += sizes[folder]
        half = folder.name.startswith(".") and used[folder] < time.time() - 86400
        if folder != newest and (half or size > CACHE_BYTES):
            shutil.rmtree(folder, ignore_errors=True)
            Path(f"{folder}.lock").unlink(missing_ok=True)


def is_first_of_node() -> bool:
    """Whether this process encodes for the others of its node."""
    return not (torch.distributed.is_initialized() and int(os.environ.get("LOCAL_RANK", 0)))


def first_of_node(make: Callable[[], TrainingData]) -> TrainingData:
    """What `make()` gives: called by the first process of a node, and by the others once that one has kept its rows.

    What it raises in a first one is raised in all, so that the run's first process, which speaks for them, says it.
    """
    if not torch.distributed.is_initialized():
        return make()
    made = error = None
    try:
        made = make() if is_first_of_node() else None
    except (ConfigError, DataError) as raised:  # with any other the launcher ends all
        error = raised
    errors = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    for told in filter(None, errors):
        raise told
    return made or make()


def cache_key(config: Config, encoder: Encoder) -> str | None:
    """A hash of all that encoding depends on: settings, template, tokenizer, the rows' versions, and our code.

    None where a user's own function makes or chooses rows: what it depends on is not known.
    """
    settings = {key: value for key, value in asdict(config).items() if key not in IRRELEVANT_TO_ROWS}
    del settings["data"]["cache"], settings["data"]["max_length_policy"]
    for source in settings["sources"].values():
        source.pop("share")
    tokenizer = encoder.tokenizer
    spoken = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, str(tokenizer.special_tokens_map)]
    spoken += [encoder.chat_template, encoder.train_empty_thoughts]
    read = {f"data.{name}": source for name, source in config.sources.items()}
    read |= {where: asked_source(where, asked) for asked in config.curation.decontaminate
             if (where := f"curation.decontaminate={asked}")}  # fmt: skip
    chosen = [source.formatter or config.formatter for source in read.values()]
    names = [each if isinstance(each, str) else each.get("name", "") for each in chosen]
    names += [*config.curation.own_filters, config.curation.select.by if config.curation.select else ""]
    if own := [name for name in names if "." in name]:
        log.info("%s is your own, so the rows are not kept for the next run: what it depends on is not known.", own[0])
        return None
    rows = {where: source_version(where, source) for where, source in read.items()}
    filters = {package: version(package) for package in ("py3langid", "rensa") if find_spec(package)}  # of the extra
    return hash_values([settings, *spoken, rows, CODE, stack_versions(), filters])


def hash_values(values: Any) -> str:
    """One hash of plain values, in their order: that of sources and filters is the rows', too."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:32]


# As it is imported: what it is by the time rows are encoded may not be what runs
CODE = hash_values([
    path.read_text("utf-8", errors="replace")
    for room in ROOMS
    for path in sorted(Path(__file__).parents[1].joinpath(room).rglob("*.py"))
])  # fmt: skip


def path_times(named: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of these files, and of every file in these folders."""
    paths = set(named)
    paths |= {below for path in paths if path.is_dir() for below in path.rglob("*")}
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file())
