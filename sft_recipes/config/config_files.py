"""The files of a composed config: what a stranger's may do, and what chosen ones and overrides do to each other.

A recipe of somebody's sets values. Hydra's own parts can run code, and take --trust-recipe.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from sft_recipes.config.hydra_plugin import OPEN_GROUPS, config_folder
from sft_recipes.config.nested_values import as_mapping, iterate_leaves
from sft_recipes.config.secrets import check_no_secrets
from sft_recipes.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)
TRUST_FLAG = "--trust-recipe"
# Of Hydra: what is swept over and how many jobs run at once. Not its callbacks, log handlers, search path, folders and
# environment, nor a launcher's setup commands
HARMLESS = re.compile(
    r"hydra\.(mode|verbose|sweeper\.(?!.*[+/])[\w.]+|launcher\.(n_jobs|nodes|timeout_min|cpus_per_task|gpus_per_node|"
    r"tasks_per_node|mem_gb|partition|array_parallelism))"
)


class ConfigFile(NamedTuple):
    """A file of a composed config: `adapter/lora`, the place of its keys ("" is the root), and its own content."""

    path: str
    place: str
    values: dict[str, Any]  # as they stand: not resolved, ??? where one is missing
    origin: str  # file://FOLDER, or a scheme of Hydra's
    parent: str  # the file whose defaults list it

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Every value of the file with its path in the config."""
        return iterate_leaves(self.values, self.place)

    def is_users_own(self) -> bool:
        """Whether it is neither ours nor of Hydra or a plugin; a recipe file is stored as `recipe/NAME`."""
        if self.origin.startswith("file://"):
            return self.origin not in [f"file://{config_folder(name)}" for name in ("conf", "recipes")]
        return "structured" in self.origin and self.path.startswith("recipe/")


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
            yield ConfigFile(default.config_path, default.package or "", values, found.path, default.parent or "")


def check_recipes(loader: ConfigLoaderImpl, primary: str, overrides: Sequence[str], trusted: bool = False) -> bool:
    """Whether the user's files among those of a config hold code; raises ConfigError for it unless it is `trusted`.

    Also raises ConfigError for a secret in them. Code is Hydra's `_target_` and all keys of `hydra` that are not
    harmless, wherever a file's package puts them. It is looked for before Hydra composes the config, which would run
    it. Hydra takes the files of a sweep over files job by job, so each of them is looked at.
    """
    parsed = OverridesParser.create(loader).parse_overrides(list(overrides))  # which a glob(*) needs
    has_code = False
    alternatives = [fixed := [one.input_line for one in parsed if not one.is_sweep_override()]]
    for sweep in parsed:
        if "." not in sweep.key_or_group and sweep.is_discrete_sweep():
            alternatives += [[*fixed, f"{sweep.get_key_element()}={value}"] for value in sweep.sweep_string_iterator()]
    for alternative in alternatives:
        for file in config_files(loader, primary, alternative, skip_missing=len(alternatives) > 1):
            for path, value in file.leaves() if file.is_users_own() else ():
                check_no_secrets(value, path)
                has_code = has_code or is_code(path, value)
                if has_code and not trusted:
                    raise ConfigError(
                        f"{file.path}.yaml sets {path}, with which a recipe can run code or write files. "
                        f"Type it yourself, or add {TRUST_FLAG} if you have read the file and trust it."
                    )
    return has_code


def is_code(path: str, value: Any) -> bool:
    """Whether a value of a recipe is an instruction to Hydra, or a benchmark's file, whose functions lm-eval calls.

    >>> is_code("hydra.sweeper.n_trials", 8), is_code("hydra.callbacks.mine._target_", "os.remove")
    (False, True)
    >>> is_code("evaluate.lm_eval", ["mmlu"]), is_code("evaluate.lm_eval", ["mmlu", "theirs.yaml"])
    (False, True)
    """
    if path in ("evaluate", "evaluate.lm_eval"):
        return bool(re.search(r"\.ya?ml|\$\{", str(value)))
    of_hydra = path.partition(".")[0] == "hydra" and ("${" in str(value) or not HARMLESS.fullmatch(path))
    return of_hydra or "_target_" in f"{path} {value}"


def check_choices(composed: DictConfig, hydra: HydraConf, loader: ConfigLoaderImpl) -> None:
    """Warns of values of a typed choice that the recipe overrides, and says which source overrides alone have made.

    Raises ConfigError where two choices bring one source, and where a source that overrides have made has the name of
    one of ours: who types data.file.data_files=my.jsonl without data=file means to train on that, not on the recipe's
    data as well. So for one without rows, whose name is then a mistyped one.
    """
    parsed = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    values = {override.key_or_group: override.value() for override in parsed}
    data = as_mapping(OmegaConf.to_container(composed).get("data"))
    sources = {name: value for name, value in data.items() if isinstance(value, dict)}
    trained = [name for name, value in sources.items() if value.get("path") or value.get("data_files")]
    overrides = [*hydra.overrides.hydra, *hydra.overrides.task]
    files = list(config_files(loader, hydra.job.config_name, overrides))
    chosen = [file.path.removeprefix("data/") for file in files if file.path.startswith("data/")]
    for name in sources:
        setters = [file for file in files if any(path.startswith(f"data.{name}.") for path, _ in file.leaves())]
        # a file that builds on another one, defaults: [dolly, _self_], is one choice with it
        tops = [file.path for file in setters if not file.parent.startswith("data/")]
        both = [path.replace("/", "=") for path in tops if path.startswith("data/")]
        if len(both) > 1:
            raise ConfigError(f"{' and '.join(both)} both bring a source called {name}. Choose one of them.")
        if not setters and chosen and (config_folder("conf") / "data" / f"{name}.yaml").is_file():
            raise ConfigError(
                f"data.{name} would be added to data={','.join(chosen)}. Write data={name} to train on it alone, "
                f"or 'data=[{','.join([*chosen, name])}]' to train on both."
            )
        if not setters and trained and name not in trained:
            raise ConfigError(f"data.{name} is no source of this run.{did_you_mean(name, sources.keys() - {name})}")
        if not setters and chosen:
            log.info("data.%s is trained on beside data=%s.", name, ",".join(chosen))
        elif trained and name not in trained:  # a recipe's settings for a dataset of its own
            log.info("data.%s is not trained on: it was not chosen, and what is set for it is left out.", name)
    for file in files:
        group, _, name = file.path.partition("/")
        names = values.get(group)
        if group in OPEN_GROUPS and name in (names if isinstance(names, list) else [names]):
            warn_of_overridden(file, composed, [key for key in values if key not in OPEN_GROUPS])


def warn_of_overridden(file: ConfigFile, composed: DictConfig, typed: Sequence[str]) -> None:
    """Warns of every key of a chosen file that has another value in the config, unless that was typed, too."""
    for path, value in file.leaves():
        holds = OmegaConf.select(composed, path)
        # ${…} and ??? are there to be filled in by others
        written = value in (None, "???") or "${" in str(value) or any(f"{path}.".startswith(f"{key}.") for key in typed)
        if value != holds and not written:
            line = "%s: the recipe's own %s=%s holds, not %s. To change it, write %s=%s."
            log.warning(line, file.path.replace("/", "="), path, holds, value, path, value)
