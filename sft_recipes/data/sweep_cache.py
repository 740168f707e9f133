"""What one job of a sweep has encoded, kept for the next one of the same process."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from glob import glob
from pathlib import Path
from typing import Any

from sft_recipes.config.options import Source
from sft_recipes.config.schema import Config
from sft_recipes.encoding.encoder import Encoder, iterate_strings

log = logging.getLogger(__name__)
CACHE_BYTES = 2**30  # bytes of rows that are kept, besides the last job's
# What the rows do not depend on; of the model they know the tokenizer, which is looked at itself. Shares are applied to
# prepared rows.
IRRELEVANT_TO_ROWS = frozenset((
    "name", "model", "adapter", "trainer", "evaluate", "preview", "mode", "objective", "provenance", "callbacks",
    "overwrite", "mix",
))  # fmt: skip
cache: dict[str, Any] = {}  # by identity; what was used last stands at the end


def cached(identity: str, make: Callable[[], Any]) -> Any:
    """What `make()` gives, made once for one identity; `train` and `held_out` of it are Datasets."""
    if identity in cache:
        log.info("These rows were encoded by an earlier job of the sweep and are used again.")
    cache[identity] = cache.pop(identity, None) or make()
    while (
        len(cache) > 1
        and sum(data.train.data.nbytes + data.held_out.data.nbytes for data in cache.values()) > CACHE_BYTES
    ):
        del cache[next(iter(cache))]
    return cache[identity]


def cache_key(config: Config, encoder: Encoder, max_length: int | None) -> str:
    """A hash of all that encoding depends on: settings, the tokenizer with its templates, the times of local files."""
    settings = {key: value for key, value in config.composed.items() if key not in IRRELEVANT_TO_ROWS}
    settings["data"] = {
        name: {key: each for key, each in value.items() if key != "share"} if isinstance(value, dict) else value
        for name, value in settings["data"].items()
    }
    tokenizer = encoder.tokenizer
    spoken = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, str(tokenizer.special_tokens_map)]
    files = {name: [source.split, file_times(source)] for name, source in config.sources.items()}
    parts = [settings, encoder.chat_template, *spoken, max_length, files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_times(source: Source) -> list[tuple[str, int, int]]:
    """Path, size and time of change of every local file that the source names: alone, in a folder, by a pattern."""
    folders = ["", *filter(None, [source.path, source.data_dir])]
    names = [str(Path(folder, name)) for folder in folders for name in ["", *iterate_strings(source.data_files)]]
    return path_times(Path(path) for name in names if name != "." for path in glob(name, recursive=True))


def path_times(named: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of these files, and of every file in these folders."""
    paths = set(named)
    paths |= {below for path in paths if path.is_dir() for below in path.rglob("*")}
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file())
