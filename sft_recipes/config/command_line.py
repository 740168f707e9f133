"""What a user typed, before Hydra sees it."""

import re
import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from sft_recipes.config.hydra_errors import unknown_choice
from sft_recipes.config.hydra_plugin import OPEN_GROUPS, config_folder
from sft_recipes.config.resumed_run import NAME as RESUMED_RUN
from sft_recipes.config.schema import root_keys
from sft_recipes.config.validation import unknown_field
from sft_recipes.errors import ConfigError, one_line


def check_user_folder(folder_name: str | None, overrides: list[str]) -> None:
    """Raises ConfigError for what Hydra would pass over in the user's `-cd` folder.

    That is a file with the name of one of ours (Hydra takes the first of the two), a chosen file that stands where it
    is not found, and a chosen recipe without the line that gives it its place in the config.
    """
    user = Path(folder_name or "")
    for mine in sorted(user.rglob("*.yaml")) if folder_name else []:
        name = mine.relative_to(user)
        for ours in (config_folder("recipes") / name, config_folder("conf") / name):
            if ours.is_file() and ours.resolve() != mine.resolve():
                choice = "=".join(name.with_suffix("").as_posix().rsplit("/", 1))
                raise ConfigError(f"{choice} is in two files, {ours} and {mine}. Rename yours.")
    chosen = [re.fullmatch(r"\+(\w+)=([\w/-]+)", override) for override in overrides if folder_name]
    for group, name in (found.groups() for found in chosen if found):
        mine = user / group / f"{name}.yaml"
        if mine.is_file() and "@package" not in mine.read_text(encoding="utf-8"):
            raise ConfigError(f"{mine} should begin with the line # @package _global_")
        theirs = config_folder("recipes") / group
        if theirs.is_dir() and not mine.is_file() and not (theirs / f"{name}.yaml").is_file():
            for other in sorted(user.rglob(f"{name}.y*ml")):
                raise ConfigError(f"{other} should be {mine}.")


def raise_usage_error(complaint: str) -> None:
    """Raises what argparse complains of as a ConfigError."""
    if found := re.match(r"unrecognized arguments: (\S+)", complaint):
        raise ConfigError(f"{found[1]} is no option. Keys are written without dashes, as key=value.")
    raise ConfigError(f"{one_line(ValueError(complaint))}. The options are listed by --hydra-help.")


def rewrite_arguments(argv: list[str], overrides: list[str], groups: list[str]) -> list[str]:
    """The options, then the overrides: +recipe=tiny where nothing is chosen, formatter=module.function as a name.

    Raises ConfigError for a group of `groups` without its +, and for a + with a name that there is not.

    >>> rewrite_arguments(["trainer.max_steps=5", "--cfg", "job"], ["trainer.max_steps=5"], ["recipe"])
    ['--cfg', 'job', 'trainer.max_steps=5', '+recipe=tiny']
    >>> rewrite_arguments(["+recipe=lima", "formatter=mine.rows"], ["+recipe=lima", "formatter=mine.rows"], ["recipe"])
    ['+recipe=lima', 'formatter=auto', 'formatter.name=mine.rows']
    """
    pairs = [override.partition("=") for override in overrides]
    for key, equals, value in pairs:
        if key in groups:
            raise ConfigError(f"{key} is added to a run. Write +{key}=NAME.")
        if key.lstrip("+") in (*groups, *OPEN_GROUPS) and equals and re.fullmatch(r"null|true|false|[\d.]*", value):
            raise ConfigError(unknown_choice(key.lstrip("+"), value, []))
        root = re.split(r"[.@/:]", key.lstrip("+"))[0]
        if key.startswith("+") and root not in [*groups, *root_keys()]:
            raise ConfigError(unknown_field(f"+{root}", root, root_keys(groups), "the config"))
    choosing = {"model", *(f"+{group}" for group in groups)} - {"+debug", "+sweep"}
    default = [] if choosing.intersection(key for key, _, _ in pairs) else ["+recipe=tiny"]
    options = [argument for argument in argv if argument not in overrides]
    return options + [part for override in overrides for part in split_formatter_override(override)] + default


def split_formatter_override(override: str) -> list[str]:
    """`formatter=module.function` as the two overrides that Hydra knows."""
    key, _, name = override.partition("=")
    return ["formatter=auto", f"formatter.name={name}"] if key == "formatter" and "." in name else [override]


def rerun_command() -> str:
    """What a user types to have this run again, with the overrides of this job alone."""
    hydra = HydraConfig.get()
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    options = [part for folder in folders for part in ("-cd", folder)]
    if hydra.job.config_name == RESUMED_RUN:
        options = ["resume", hydra.runtime.output_dir]
    return shlex.join(["python", "-m", "sft_recipes", *options, *hydra.overrides.task])
