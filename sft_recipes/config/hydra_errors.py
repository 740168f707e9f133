"""Hydra's and OmegaConf's errors in our words."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from glob import escape, glob
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from sft_recipes.config.hydra_plugin import OPEN_GROUPS, addable_groups, config_folder
from sft_recipes.config.schema import root_keys
from sft_recipes.config.validation import unknown_field
from sft_recipes.errors import ConfigError, DataError, did_you_mean, one_line

USER_ERRORS = (ConfigError, DataError, HydraException, OmegaConfBaseException, MarkedYAMLError)
# What Hydra says, and the line for it. Its errors carry no fields to go by, so these are the words of 1.3.8; where a
# release has others, a test fails and a user sees Hydra's own
HYDRA_ERROR_MESSAGES = {
    r"You must specify '(\w+)', e\.g, .*?Available options: (.*)": "{0} is not chosen. Write {0}=NAME. Choices: {1}.",
    r"Ambiguous value for argument '(.*?)' 1\.": "{0} is a sweep. Write -m in front, or [ ] around a list.",
    r"Multiple values for (\w+)\.": "{0} is chosen twice. Choose one, or sweep over both with -m.",
    r"An item is already at '([^']+)'": "{0} is in the config already. Write it without the +.",
    r"Could not delete from config\. (?:The value of )?'([^']+)'": "{0} is not in the config. Leave ~{0} out.",
}
USUAL_HYDRA_KEYS = (
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.sweeper.n_trials",
    "hydra.job.name",
)
# What is written where a choice is a path, or a name of the hub's
AS_PATH = {"data": "data=file data.file.data_files={}", "model": "model=local model.id={}", "recipe": "{} alone"}


def user_message(error: Exception) -> str:
    """The error in one line, with what to write; Hydra's and OmegaConf's own are put into our words."""
    ours = isinstance(error, ConfigError | DataError)
    if isinstance(error.__cause__, OSError) and not ours:  # of the log, which logging hides
        error = error.__cause__
    text = one_line(error) or one_line(error.__cause__ or error)
    if isinstance(error, MissingConfigException) and (missing := error.missing_cfg_file):
        if "/" in missing:
            return unknown_choice(*missing.rsplit("/", 1), error.options or [])
        written = choice_override(missing) or f"{Path(missing).stem}.yaml"
        return f"There is no config {missing}. A recipe needs no -cn: python -m sft_recipes {written}"
    if isinstance(error, OverrideParseException):
        return unreadable_override(error.override)
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}."
    if found := re.match(r"(?:In '\S+': )?Could not override '(([^'.]*)[^']*)'", text):
        key, root = found.groups()
        if root not in root_keys():
            return unknown_field(root, root, root_keys(addable_groups()), "the config")
        if close := get_close_matches(key, USUAL_HYDRA_KEYS, n=1, cutoff=0.9):
            return f"There is no {key}. Did you mean {close[0]}?"
        hint = re.search(r"To append to your (config|default list) use \+.*", text)
        known = hint and (root == "hydra" or hint[1] == "default list")  # our own keys are all there are
        return f"There is no {key}." + (f" {hint[0]}" if known else "")
    for pattern, line in HYDRA_ERROR_MESSAGES.items():
        if found := re.search(pattern, text):
            return line.format(*(", ".join(part.split()) for part in found.groups()))
    return text.partition(" full_key: ")[0]  # OmegaConf's, and no place that the user knows


def unknown_choice(group: str, name: str, options: Iterable[str]) -> str:
    """The line for a choice that no file stands for."""
    parent, _, child = group.partition("/")
    if child in OPEN_GROUPS:
        return f"{parent}/*.yaml overrides what is chosen. Write - override /{child}: {name} in its defaults."
    if extra := {"joblib": "sweep", "submitit_slurm": "slurm", "submitit_local": "slurm"}.get(name):
        return f"{group}={name} is not installed here. Try pip install 'sft-recipes[{extra}]'."
    if group in AS_PATH and (Path(name).suffix or group == "model" and "/" in name):
        return f"There is no {group}={name}. Write {AS_PATH[group].format(name)}."
    ours = [path.stem for parent in ("conf", "recipes") for path in (config_folder(parent) / group).glob("*.yaml")]
    return f"There is no {group}={name}.{did_you_mean(name, options or ours)}"


def unreadable_override(override: str) -> str:
    """The line for an override that Hydra cannot read."""
    key, equals, value = override.partition("=")
    bare = re.sub(r"""([{,]\s*)(["'])(\w+)\2\s*:""", r"\1\3:", value)
    if value.startswith("{") and bare != value:
        return f"{override} cannot be read: keys of a mapping have no quotes. Write '{key}={bare}'"
    for opening, closing in ("[]", "()", "{}"):
        if value.count(opening) > value.count(closing):  # which a shell does to [a, b]
            start = f"{key}={value.partition(opening)[0]}{opening}"
            return f"{override} has no closing {closing}. Put all of it into quotes: '{start}…{closing}'"
    functions = OverridesParser.create().functions.functions
    if (called := re.match(r"(\w+)\(", value)) and called[1] not in functions:
        return f"{override} cannot be read: there is no {called[1]}(…).{did_you_mean(called[1], functions)}"
    if equals:
        return f"{override} cannot be read as key=value. Put the value into quotes inside quotes: {key}='\"…\"'"
    if written := choice_override(override):
        return f"{override!r} has no value. Write {written}."
    file = Path(override)
    close = get_close_matches(file.name, glob("*.y*ml", root_dir=file.parent), n=1)
    if close or get_close_matches(file.suffix, [".yaml"], cutoff=0.7):
        way_out = (
            f"Did you mean {file.with_name(close[0])}?"
            if close
            else f"`python -m sft_recipes init {file.stem}.yaml` writes one."
        )
        return f"There is no file {override}. {way_out}"
    return f"{override!r} has no value. Write {override.rstrip(':')}=VALUE."


def choice_override(name: str) -> str | None:
    """`+recipe=lima` for what names one of ours: `lima`, `recipe/lima.yaml`; `adapter=lora` for `lora`; else None."""
    stem = Path(name.lstrip("+")).stem
    for root, sign in [("recipes", "+"), *([] if Path(name).suffix else [("conf", "")])]:
        for file in glob(f"*/{escape(stem)}.yaml", root_dir=config_folder(root)):
            return f"{sign}{Path(file).parent}={stem}"
    return None
