"""The command: `python -m sft_recipes +recipe=lima`."""

import logging
import os
import re
import sys
from dataclasses import fields
from importlib import import_module
from traceback import clear_frames

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sft_recipes.binding import ConfigError, did_you_mean, one_line, unknown
from sft_recipes.config import Config, folder, from_hydra, refuse_twins, register
from sft_recipes.formatters import DataError

log = logging.getLogger("sft_recipes")
USER_ERRORS = (ConfigError, DataError, HydraException, OmegaConfBaseException)
register()
# bitsandbytes advises a package that is not published; it matters to QLoRA on a CPU alone
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@hydra.main(version_base="1.3", config_path=str(folder("conf")), config_name="config")
def run(composed: DictConfig) -> float:
    """One job: the mode's module does it, and its objective goes back to Hydra's sweeper."""
    try:
        config = from_hydra(composed)
        return import_module(f"sft_recipes.{config.mode}").main(config, composed)
    except Exception as error:
        if isinstance(error, USER_ERRORS):
            log.error(message(error))
        else:
            log.exception("The run failed.")
        if HydraConfig.get().mode == RunMode.RUN:
            sys.exit(2 if isinstance(error, USER_ERRORS) else 1)  # a raise would make Hydra print more
        error.logged = True
        clear_frames(error.__traceback__)  # a sweep keeps the exception, and with it the model on the GPU
        raise


def main() -> None:
    """Reads the command line; exits with 2 and one line for a user's mistake, 130 after Ctrl-C, 1 for our own."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints tracebacks of its own and exits with 1
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every run otherwise
    sys.path.insert(0, os.getcwd())  # for a formatter of the user's, also under the console script
    try:
        arguments = get_args_parser().parse_args()
        refuse_twins(arguments.config_dir)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not any("hydra.run.dir=" in o for o in arguments.overrides):
            raise ConfigError("torchrun starts several processes: name their folder with hydra.run.dir=outputs/NAME.")
        sys.argv[1:] = command_line(sys.argv[1:], arguments.overrides)
        run()
    except KeyboardInterrupt:
        stop("Interrupted.", 130)
    except USER_ERRORS as error:
        stop("" if hasattr(error, "logged") else message(error), 2)
    except Exception as error:
        if not hasattr(error, "logged"):
            raise
        stop("", 1)


def stop(line: str, code: int) -> None:
    """Leaves with this line on stderr, if there is one, and this exit code."""
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


def command_line(argv: list[str], overrides: list[str]) -> list[str]:
    """The arguments with two conveniences: nothing chosen is +recipe=tiny, formatter=module.function is a name.

    >>> command_line(["trainer.max_steps=5"], ["trainer.max_steps=5"])
    ['trainer.max_steps=5', '+recipe=tiny']
    >>> command_line(["+recipe=lima", "formatter=mine.rows"], ["+recipe=lima", "formatter=mine.rows"])
    ['+recipe=lima', 'formatter=auto', 'formatter.name=mine.rows']
    """
    argv = [part for argument in argv for part in own_formatter(argument)]
    keys = [override.split("=", 1)[0] for override in overrides]
    for key in keys:
        if (folder("recipes") / key).is_dir():
            raise ConfigError(f"{key} is added to a run. Write +{key}=NAME.")
    additions = {key[1:] for key in keys if key.startswith("+") and "." not in key} - {"debug", "sweep"}
    if "model" not in keys and "recipe" not in keys and not additions:
        argv.append("+recipe=tiny")
    return argv


def own_formatter(argument: str) -> list[str]:
    """`formatter=module.function` as the two overrides that Hydra knows."""
    key, _, name = argument.partition("=")
    return ["formatter=auto", f"formatter.name={name}"] if key == "formatter" and "." in name else [argument]


def message(error: Exception) -> str:
    """The error in one line, with what to write; Hydra's and OmegaConf's own are put into our words."""
    text = one_line(error) or one_line(error.__cause__ or error)
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return f"There is no {group}={name}.{did_you_mean(name, error.options)}"
    if found := re.match(r"You must specify '(\w+)', e\.g, .*?Available options: (.*)", text):
        return f"{found[1]} is not chosen. Write {found[1]}=NAME. Choices: {', '.join(found[2].split())}."
    if found := re.match(r"(?:In '\S+': )?Could not override '([^']+)'", text):
        return could_not_override(found[1], text)
    if found := re.match(r"Could not append to config. An item is already at '([^']+)'", text):
        return f"{found[1]} is in the config already. Write it without the +."
    return text


def could_not_override(key: str, text: str) -> str:
    """The line for a key on the command line that the config does not have."""
    root, _, _ = key.partition(".")
    known = [*(field.name for field in fields(Config)), "hydra"]
    if root not in known:
        return unknown(key, root, known, "the config")
    return text


if __name__ == "__main__":
    main()
