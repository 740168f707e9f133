"""The command: `python -m sft_recipes +recipe=lima`."""

import gc
import logging
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from traceback import clear_frames

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from sft_recipes import sweep
from sft_recipes.binding import ConfigError, did_you_mean, one_line, unknown
from sft_recipes.config import OPEN_GROUPS, Config, check_user_folder, folder, from_hydra, register
from sft_recipes.formatters import DataError
from sft_recipes.hub import go_offline_if_need_be

log = logging.getLogger("sft_recipes")
USER_ERRORS = (ConfigError, DataError, HydraException, OmegaConfBaseException, MarkedYAMLError)
# What Hydra says, and the line for it
HYDRA_SAYS = {
    r"You must specify '(\w+)', e\.g, .*?Available options: (.*)": "{0} is not chosen. Write {0}=NAME. Choices: {1}.",
    r"Ambiguous value for argument '(.*?)' 1\.": "{0} is a sweep. Write -m in front, or [ ] around a list.",
    r"Multiple values for (\w+)\.": "{0} is chosen twice. Choose one, or sweep over both with -m.",
    r"An item is already at '([^']+)'": "{0} is in the config already. Write it without the +.",
    r"Could not delete from config\. (?:The value of )?'([^']+)'": "{0} is not in the config. Leave ~{0} out.",
    r"Additional config directory '(.*)' not found": "-cd {0} is not a folder.",
}
register()
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # our own line says it, once
logging.getLogger("huggingface_hub").propagate = False  # it prints with a handler of its own


@hydra.main(version_base="1.3", config_path=str(folder("conf")), config_name="config")
def run(composed: DictConfig) -> float:
    """One job: the mode's module does it, and its objective goes back to Hydra's sweeper."""
    register()  # a process that joblib starts has not run this file
    failure = Path(HydraConfig.get().runtime.output_dir) / "error.txt"
    failure.unlink(missing_ok=True)
    gc.collect()  # a trainer and its parts name each other, so the job before this one holds its model until then
    try:
        config = from_hydra(composed)
        go_offline_if_need_be(config)
        return import_module(f"sft_recipes.{config.mode}").main(config)
    except Exception as error:
        if isinstance(error, USER_ERRORS):
            log.error(message(error))
        else:
            log.exception("The run failed.")
        if HydraConfig.get().mode == RunMode.RUN:
            sys.exit(2 if isinstance(error, USER_ERRORS) else 1)  # a raise would make Hydra print more
        error.logged = True
        failure.write_text(reason(error) + "\n", encoding="utf-8")
        let_go(error)
        raise


def reason(error: Exception) -> str:
    """Why a job failed, in one line: a user's mistake as the command says it, else the exception with its name."""
    return message(error) if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {one_line(error)}"


def let_go(error: BaseException | None) -> None:
    """Empties the frames of an exception and of those behind it: a sweep keeps it, and with it the model on the GPU."""
    while error:
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def main() -> None:
    """Reads the command line; exits with 2 and one line for a user's mistake, 130 after Ctrl-C, 1 for our own."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints tracebacks of its own and exits with 1
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy CPU, waiting threads took the demo from 22 to 137 s
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every run otherwise
    sys.path.insert(0, os.getcwd())  # for a formatter of the user's, also under the console script
    try:
        parser = get_args_parser()
        parser.error = refuse  # argparse would print its usage, too
        arguments = parser.parse_intermixed_args()
        check_user_folder(arguments.config_dir, arguments.overrides)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not any("hydra.run.dir=" in o for o in arguments.overrides):
            raise ConfigError("torchrun starts several processes: name their folder with hydra.run.dir=outputs/NAME.")
        if not arguments.shell_completion:
            sys.argv[1:] = command_line(sys.argv[1:], arguments.overrides, groups_to_add(arguments.config_dir))
        try:
            run()
        finally:  # also after Ctrl-C and after a job that failed
            failed = sweep.finish()
        if failed:
            stop("", 1)
    except KeyboardInterrupt:
        stop("Interrupted.", 130)
    except Exception as error:
        if hasattr(error, "logged"):
            stop("", 2 if isinstance(error, USER_ERRORS) else 1)
        if not isinstance(error, (*USER_ERRORS, OSError, ValueError)):  # those are Hydra's, before any job
            raise
        stop(message(error), 2)


def refuse(complaint: str) -> None:
    """Raises what argparse complains of as a ConfigError."""
    if found := re.match(r"unrecognized arguments: (\S+)", complaint):
        raise ConfigError(f"{found[1]} is no option. Keys are written without dashes, as key=value.")
    raise ConfigError(f"{one_line(ValueError(complaint))}. The options are listed by --hydra-help.")


def stop(line: str, code: int) -> None:
    """Leaves with this line on stderr, if there is one, and this exit code."""
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


def groups_to_add(user_folder: str | None = None) -> list[str]:
    """The groups that a + adds: those of recipes/, and those that the user's `-cd` folder has beside ours."""
    folders = [folder("recipes"), *([Path(user_folder)] if user_folder else [])]
    found = {path.name for parent in folders if parent.is_dir() for path in parent.iterdir() if path.is_dir()}
    return sorted(found - set(OPEN_GROUPS))


def command_line(argv: list[str], overrides: list[str], groups: list[str]) -> list[str]:
    """The options, then the overrides: +recipe=tiny where nothing is chosen, formatter=module.function as a name.

    Raises ConfigError for a group of `groups` without its +, and for a + with a name that there is not.

    >>> command_line(["trainer.max_steps=5", "--cfg", "job"], ["trainer.max_steps=5"], ["recipe"])
    ['--cfg', 'job', 'trainer.max_steps=5', '+recipe=tiny']
    >>> command_line(["+recipe=lima", "formatter=mine.rows"], ["+recipe=lima", "formatter=mine.rows"], ["recipe"])
    ['+recipe=lima', 'formatter=auto', 'formatter.name=mine.rows']
    """
    pairs = [override.partition("=") for override in overrides]
    for key, equals, value in pairs:
        if key in groups:
            raise ConfigError(f"{key} is added to a run. Write +{key}=NAME.")
        if key.lstrip("+") in (*groups, *OPEN_GROUPS) and equals and re.fullmatch(r"null|true|false|[\d.]*", value):
            raise ConfigError(no_such_choice(key.lstrip("+"), value, []))
        root = re.split(r"[.@/:]", key.lstrip("+"))[0]
        if key.startswith("+") and root not in [*groups, *roots()]:
            raise ConfigError(unknown(f"+{root}", root, roots(groups), "the config"))
    choosing = {"model", *(f"+{group}" for group in groups)} - {"+debug", "+sweep"}
    default = [] if choosing.intersection(key for key, _, _ in pairs) else ["+recipe=tiny"]
    options = [argument for argument in argv if argument not in overrides]
    return options + [part for override in overrides for part in own_formatter(override)] + default


def roots(groups: Iterable[str] = ()) -> list[str]:
    """What a key can begin with: the fields of a config, and a + with one of these groups."""
    return [*(field.name for field in fields(Config)), "hydra", *(f"+{group}" for group in groups)]


def own_formatter(override: str) -> list[str]:
    """`formatter=module.function` as the two overrides that Hydra knows."""
    key, _, name = override.partition("=")
    return ["formatter=auto", f"formatter.name={name}"] if key == "formatter" and "." in name else [override]


def message(error: Exception) -> str:
    """The error in one line, with what to write; Hydra's and OmegaConf's own are put into our words."""
    text = one_line(error) or one_line(error.__cause__ or error)
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        return no_such_choice(*error.missing_cfg_file.rsplit("/", 1), error.options or [])
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}."
    if found := re.match(r"(?:In '\S+': )?Could not override '(([^'.]*)[^']*)'", text):
        key, root = found.groups()
        return (
            unknown(root, root, roots(groups_to_add()), "the config") if root not in roots() else f"There is no {key}."
        )
    for pattern, line in HYDRA_SAYS.items():
        if found := re.search(pattern, text):
            return line.format(*(", ".join(part.split()) for part in found.groups()))
    return text.partition(" full_key: ")[0]  # OmegaConf's, and no place that the user knows


def no_such_choice(group: str, name: str, options: Iterable[str]) -> str:
    """The line for a choice that no file stands for."""
    parent, _, child = group.partition("/")
    if child in OPEN_GROUPS:
        return f"{parent}/*.yaml overrides what is chosen. Write - override /{child}: {name} in its defaults."
    if name in ("optuna", "joblib"):
        return f"{group}={name} is not installed here. Try pip install 'sft-recipes[sweep]'."
    ours = [path.stem for parent in ("conf", "recipes") for path in (folder(parent) / group).glob("*.yaml")]
    return f"There is no {group}={name}.{did_you_mean(name, options or ours)}"


def unreadable(override: str) -> str:
    """The line for an override that Hydra cannot read."""
    key, equals, _ = override.partition("=")
    if equals:
        return f"{override} cannot be read as key=value. Put the value into quotes inside quotes: {key}='\"…\"'"
    recipe = Path(override).stem
    there = (folder("recipes") / "recipe" / f"{recipe}.yaml").is_file()
    return f"{override!r} has no value. Write {f'+recipe={recipe}' if there else f'{override}=VALUE'}."


if __name__ == "__main__":
    main()
