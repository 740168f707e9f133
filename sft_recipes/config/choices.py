"""What the files that were chosen and the overrides that were typed do to each other, where nobody would expect it."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from sft_recipes.config.hydra_plugin import OPEN_GROUPS, config_folder
from sft_recipes.config.nested_values import iterate_leaves
from sft_recipes.errors import ConfigError

log = logging.getLogger(__name__)


class ConfigFile(NamedTuple):
    """A file of a composed config: `adapter/lora`, the place of its keys ("" is the root), and its own content."""

    path: str
    place: str
    values: dict[str, Any]  # as they stand: not resolved, ??? where one is missing
    origin: str  # file://FOLDER, or a scheme of Hydra's


def check_choices(composed: DictConfig, hydra: HydraConf) -> None:
    """Warns of values of a typed choice that the recipe overrides, and says which source overrides alone have made.

    Raises ConfigError where such a source has the name of one of ours: who types data.file.data_files=my.jsonl
    without data=file means to train on that, not on the recipe's data as well.
    """
    parsed = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    values = {override.key_or_group: override.value() for override in parsed}
    picked = {f"{group}/{name}" for group in OPEN_GROUPS for name in as_list(values.get(group))}
    overrides = [*hydra.overrides.hydra, *hydra.overrides.task]
    every = config_files(GlobalHydra.instance().config_loader(), hydra.job.config_name, overrides)
    files = [file for file in every if not file.path.startswith("hydra/")]
    for file in files:
        if file.path in picked:
            warn_of_overridden(file, composed, [key for key in values if key not in OPEN_GROUPS])
    chosen = [file.path.removeprefix("data/") for file in files if file.path.startswith("data/")]
    for name in added_sources(files, composed) if chosen else []:
        if (config_folder("conf") / "data" / f"{name}.yaml").is_file():
            raise ConfigError(
                f"data.{name} would be added to data={','.join(chosen)}. Write data={name} to train on it alone, "
                f"or 'data=[{','.join([*chosen, name])}]' to train on both."
            )
        log.info("data.%s is trained on beside data=%s.", name, ",".join(chosen))


def config_files(
    loader: ConfigLoaderImpl, primary: str, overrides: Sequence[str], skip_missing: bool = False
) -> Iterator[ConfigFile]:
    """The files that a config is composed of, in their order, Hydra's own among them.

    Hydra keeps the composed values and not which file each is from, so the files are looked up and read once more.
    With `skip_missing`, a choice that a sweep makes may still be missing.
    """
    parsed, files = loader._parse_overrides_and_create_caching_repo(primary, list(overrides))
    for default in create_defaults_list(files, primary, parsed, prepend_hydra=True, skip_missing=skip_missing).defaults:
        found = files.load_config(default.config_path) if default.config_path else None
        if found:
            values = OmegaConf.to_container(found.config)
            yield ConfigFile(default.config_path, default.package or "", values, found.path)


def warn_of_overridden(file: ConfigFile, composed: DictConfig, typed: Sequence[str]) -> None:
    """Warns of every key of a chosen file that has another value in the config, unless that was typed, too."""
    for path, value in iterate_leaves(file.values, file.place):
        holds = OmegaConf.select(composed, path)
        # ${…} and ??? are there to be filled in by others
        written = value in (None, "???") or "${" in str(value) or any(f"{path}.".startswith(f"{key}.") for key in typed)
        if value != holds and not written:
            line = "%s: the recipe's own %s=%s holds, not %s. To change it, write %s=%s."
            log.warning(line, file.path.replace("/", "="), path, holds, value, path, value)


def added_sources(files: Sequence[ConfigFile], composed: DictConfig) -> list[str]:
    """The datasets of `data` that no file of the config names, so that overrides alone have made them."""
    paths = (path.split(".") for file in files for path, _ in iterate_leaves(file.values, file.place))
    named = {path[1] for path in paths if path[0] == "data" and len(path) > 1}
    return [name for name, value in composed.data.items() if isinstance(value, DictConfig) and name not in named]


def as_list(value: Any) -> list[Any]:
    """The names of a choice: one, or several."""
    return value if isinstance(value, list) else [value]
