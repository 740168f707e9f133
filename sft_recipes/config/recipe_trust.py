"""What a recipe of somebody's may do: set values. Hydra's own parts can run code, and take --trust-recipe."""

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser

from sft_recipes.config.choices import ConfigFile, config_files
from sft_recipes.config.hydra_plugin import config_folder
from sft_recipes.config.nested_values import iterate_leaves
from sft_recipes.config.secrets import check_no_secrets
from sft_recipes.errors import ConfigError

FLAG = "--trust-recipe"
# Of Hydra: what is swept over and how many jobs run at once. Not its callbacks, log handlers, search path, folders and
# environment, nor a launcher's setup commands
HARMLESS = re.compile(
    r"hydra\.(mode|verbose|sweeper\.(?!.*[+/])[\w.]+|launcher\.(n_jobs|nodes|timeout_min|cpus_per_task|gpus_per_node|"
    r"tasks_per_node|mem_gb|partition|array_parallelism))"
)


def take_trust_flag() -> bool:
    """Whether the command line trusts its recipe; Hydra does not get to see the flag."""
    trusted = FLAG in sys.argv[1:]
    sys.argv[1:] = [word for word in sys.argv[1:] if word != FLAG]
    return trusted


def check_recipes(loader: ConfigLoader, primary: str, overrides: Sequence[str], trusted: bool = False) -> None:
    """Raises ConfigError for a secret in the user's files among those of a config, and unless `trusted` for code.

    Code is Hydra's `_target_` and all keys of `hydra` that are not harmless, wherever a file's package puts them. It is
    looked for before Hydra composes the config, which would run it.
    """
    alternatives = list(expand_sweeps(overrides))
    for alternative in alternatives:
        for file in filter(is_users_own, config_files(loader, primary, alternative, len(alternatives) > 1)):
            check_no_secrets(file.values, file.place)
            for path, value in () if trusted else iterate_leaves(file.values, file.place):
                if is_code(path, value):
                    raise ConfigError(
                        f"{file.path}.yaml sets {path}, with which a recipe can run code or write files. "
                        f"Type it yourself, or add {FLAG} if you have read the file and trust it."
                    )


def expand_sweeps(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides without sweeps, then with each single file of a sweep over files: Hydra takes those job by job."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    fixed = [one.input_line for one in parsed if not one.is_sweep_override()]
    yield fixed
    for sweep in parsed:
        if "." not in sweep.key_or_group and sweep.is_discrete_sweep():
            yield from ([*fixed, f"{sweep.get_key_element()}={value}"] for value in sweep.sweep_string_iterator())


def is_users_own(file: ConfigFile) -> bool:
    """Whether a config file is neither ours nor of Hydra or a plugin; a recipe file is stored as `recipe/NAME`."""
    if file.origin.startswith("file://"):
        return file.origin not in [f"file://{config_folder(name)}" for name in ("conf", "recipes")]
    return "structured" in file.origin and file.path.startswith("recipe/")


def is_code(path: str, value: Any) -> bool:
    """Whether a value of a recipe is an instruction to Hydra.

    >>> is_code("hydra.sweeper.n_trials", 8), is_code("hydra.callbacks.mine._target_", "os.remove")
    (False, True)
    """
    of_hydra = path.partition(".")[0] == "hydra" and ("${" in str(value) or not HARMLESS.fullmatch(path))
    return of_hydra or "_target_" in f"{path} {value}"
