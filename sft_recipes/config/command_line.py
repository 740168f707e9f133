"""The command line: what was typed, before Hydra sees it, and what to type again or next."""

import re
import shlex
from argparse import Namespace
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.conf import HydraConf
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from sft_recipes.config.config_files import TRUST_FLAG, check_choices, check_recipes
from sft_recipes.config.hydra_errors import unknown_choice
from sft_recipes.config.hydra_plugin import OPEN_GROUPS, PRIMARY_CONFIGS, addable_groups, config_folder
from sft_recipes.config.nested_values import load_yaml
from sft_recipes.config.own_configs import RESUMED, recipe_file, store_recipe_file, store_saved_run
from sft_recipes.config.schema import Config, check_root_keys, root_keys
from sft_recipes.config.secrets import check_typed_secrets
from sft_recipes.config.validation import unknown_field
from sft_recipes.errors import ConfigError, did_you_mean, mask_secrets, one_line

# What is done with a finished run or beside one; what runs a config is a mode
VERBS = {"init": "config.own_configs", "schema": "config.reference"}
VERBS |= {name: name for name in ("chat", "merge", "report", "recipes")}
MODES = get_args(Config.__annotations__["mode"])


def prepare_command(typed: Sequence[str], options: Namespace, trusted: bool = False) -> list[str]:
    """The arguments for Hydra, the primary config among them; `options` is what its parser read of those `typed`.

    The bare command runs the demo, `mode=evaluate evaluate.run=RUN` starts from RUN's own config, and whoever names a
    primary config (-cn, -cp) gets that and nothing of ours. Raises ConfigError for what Hydra would say less well, and
    for a recipe that could run code unless it is `trusted`.
    """
    check_typed_secrets(options.overrides)
    if options.config_dir:
        check_user_folder(Path(options.config_dir), options.overrides)
    ConfigStore.instance().repo.pop("recipe", None)  # an earlier command's file, where a process runs several
    overrides = [part for override in options.overrides for part in split_formatter_override(override)]
    rest, primary = [word for word in typed if word not in options.overrides], options.config_name or "config"
    loader = build_loader(options)
    if options.config_name is None and options.config_path is None:
        groups = addable_groups(options.config_dir)
        files = {word for word in overrides if word.endswith((".yaml", ".yml")) and Path(word).is_file()}
        overrides = [store_recipe_file(Path(word)) if word in files else word for word in overrides]
        check_overrides(overrides, groups, loader)
        primary = choose_primary(overrides, groups)
    elif options.config_path and Path(options.config_path).is_dir():
        rest += ["--config-path", str(Path(options.config_path).absolute())]  # or Hydra looks for it beside our code
    places = [options.config_dir, options.config_path, options.config_name, ConfigStore.instance().repo.get("recipe")]
    if any(places) or any("hydra.searchpath" in override for override in overrides):  # else all files are ours
        check_recipes(loader, primary, overrides, trusted)
    if options.cfg and not options.multirun:  # a run does it on its own, and Hydra refuses the two together
        composed = loader.load_configuration(primary, overrides, RunMode.RUN)
        check_root_keys(key for key in composed if key != "hydra")
        check_choices(composed, composed.hydra, loader)
        if options.package not in (None, "_global_") and OmegaConf.select(composed, options.package) is None:
            raise ConfigError(f"-p {options.package} is not in the config.{did_you_mean(options.package, composed)}")
    return [*rest, "--config-name", primary, *overrides]


def build_loader(options: Namespace) -> ConfigLoaderImpl:
    """What finds the files of a config, as Hydra will make it."""
    places = create_config_search_path(f"file://{Path(options.config_path or config_folder('conf')).absolute()}")
    if options.config_dir:
        folder = f"file://{Path(options.config_dir).absolute()}"
        places.prepend("command-line", folder, anchor=SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(places)


def choose_primary(overrides: Sequence[str], groups: Sequence[str]) -> str:
    """The primary config of a command that names none."""
    keys = [override.partition("=")[0] for override in overrides]
    if {f"+{group}" for group in groups}.difference(["+debug", "+sweep", "+where"]).intersection(keys):
        return "config"
    parser = OverridesParser.create()
    given = [override for override in overrides if override.startswith(("mode=", "evaluate.run="))]
    parsed = parser.parse_overrides(given)
    values = {one.key_or_group: one.value() for one in parsed if not one.is_sweep_override()}
    if values.get("mode") == "evaluate" and "model" not in keys and any(one.is_sweep_override() for one in parsed):
        raise ConfigError("evaluate.run is one run, whose own config is used. Write a command for each, without -m.")
    if values.get("mode") == "generate":
        return "generate"  # which needs no data
    if values.get("mode") == "evaluate" and values.get("evaluate.run"):
        run = Path(str(values["evaluate.run"]))
        if "model" not in keys or any((folder / ".hydra").is_dir() for folder in (run, run.parent)):
            return store_saved_run(run, set(keys).intersection(OPEN_GROUPS))
    return "config" if "model" in keys else "demo"


def check_user_folder(folder: Path, overrides: Sequence[str]) -> None:
    """Raises ConfigError for what Hydra would pass over in the user's `-cd` folder.

    That is a file with the name of one of ours (Hydra takes the first of the two), a chosen recipe without the line
    that gives it its place in the config, and one in another folder than recipe/, or with the extension .yml.
    """
    if not folder.is_dir():
        raise ConfigError(f"-cd {folder.absolute()} is not a folder.")
    for mine in sorted(folder.rglob("*.yaml")):
        load_yaml(mine)
        name = mine.relative_to(folder)
        choice = "=".join(name.with_suffix("").as_posix().rsplit("/", 1))
        for ours in (config_folder("recipes") / name, config_folder("conf") / name):
            if ours.is_file() and not ours.samefile(mine):
                raise ConfigError(f"{choice} is in two files, {ours} and {mine}. Rename yours.")
        if f"+{choice}" in overrides and "@package" not in mine.read_text(encoding="utf-8"):
            raise ConfigError(f"{mine} should begin with the line # @package _global_")
    for name in re.findall(r"^\+recipe=(\w[\w/-]*)$", "\n".join(overrides), re.MULTILINE):
        places = [place / "recipe" / f"{name}.yaml" for place in (folder, config_folder("recipes"))]
        if not any(map(Path.is_file, places)) and (other := next(folder.rglob(f"{name}.y*ml"), None)):
            raise ConfigError(f"{other} should be {places[0]}.")


def raise_usage_error(complaint: str) -> None:
    """Raises what argparse complains of as a ConfigError."""
    if found := re.match(r"unrecognized arguments: (\S+)", complaint):
        raise ConfigError(f"{found[1]} is no option. Keys are written without dashes, as key=value.")
    raise ConfigError(f"{one_line(ValueError(complaint))}. The options are listed by --hydra-help.")


def check_overrides(overrides: Sequence[str], groups: Sequence[str], loader: ConfigLoaderImpl) -> None:
    """Raises ConfigError for a group of `groups` without its +, and for what Hydra would name after other mistakes.

    That is a bare verb or mode, a key that no config has, and a choice that no file stands for, of a sweep any.
    """
    for key, equals, _ in (override.partition("=") for override in overrides):
        if key in groups:
            raise ConfigError(f"{key} is added to a run. Write +{key}=NAME.")
        if not equals and key.isalpha() and (key in MODES or key not in root_keys()):  # ~key leaves a key out
            for meant in get_close_matches(key, (*MODES, *VERBS, "resume"), n=1, cutoff=0.7):
                written = f"mode={meant}" if meant in MODES else f"python -m sft_recipes {meant}"
                raise ConfigError(f"{key!r} has no value. Write {written}.")
    _, files = loader._parse_overrides_and_create_caching_repo("config", list(overrides))  # with hydra.searchpath
    parser = OverridesParser.create(loader)
    for override in parser.parse_overrides(list(overrides)):
        group, root = override.key_or_group, re.match(r"\w*", override.key_or_group)[0]
        if root not in (*root_keys(), *groups) and not override.is_delete() and not files.group_exists(root):
            raise ConfigError(unknown_field(root, root, root_keys(groups), "the config"))
        if group not in (*groups, *OPEN_GROUPS) or override.is_delete() or "${" in override.input_line:
            continue
        swept = override.is_discrete_sweep()
        for text in override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]:
            value = parser.parse_override(f"{group}={text}").value()
            if isinstance(value, dict):  # which is merged into what is chosen
                continue
            for name in value if isinstance(value, list) else [value if isinstance(value, str) else text]:
                if not files.config_exists(f"{group}/{name}"):
                    raise ConfigError(unknown_choice(group, str(name), files.get_group_options(group)))


def split_formatter_override(override: str) -> list[str]:
    """`formatter=module.function` as the two overrides that Hydra knows.

    >>> split_formatter_override("formatter=mine.rows")
    ['formatter=auto', 'formatter.name=mine.rows']
    """
    key, _, name = override.partition("=")
    return ["formatter=auto", f"formatter.name={name}"] if key == "formatter" and "." in name else [override]


def rerun_command(hydra: HydraConf, sweep: bool = False) -> str:
    """What a user types to have a run or a whole sweep again: the folders, the primary config and the overrides.

    A job of a sweep is repeated alone, without what was said about the sweep.
    """
    typed, of_hydra = (OmegaConf.to_container(hydra.overrides[kind], resolve=False) for kind in ("task", "hydra"))
    primary, options, kept = hydra.job.config_name, ["-m"] * sweep, []
    if primary == RESUMED:
        options = ["resume", hydra.runtime.output_dir]
    else:
        places = {source.provider: source.path for source in hydra.runtime.config_sources}
        options += ["-cd", places["command-line"]] if "command-line" in places else []
        options += ["-cp", places["main"]] if Path(places["main"]) != config_folder("conf") else []
        options += ["-cn", primary] if primary not in PRIMARY_CONFIGS else []
        if check_recipes(GlobalHydra.instance().config_loader(), primary, [*of_hydra, *typed], trusted=True):
            options.append(TRUST_FLAG)
        job_of_sweep = hydra.mode == RunMode.MULTIRUN and not sweep
        left_out = r"hydra[./](mode|sweep|sweeper|launcher)\b" if job_of_sweep else r"hydra\.mode="
        kept = [override for override in of_hydra if not re.match(left_out, override)]
    typed = [recipe_file(override) or override for override in typed]
    return mask_secrets(shlex.join(["python", "-m", "sft_recipes", *options, *typed, *kept]))


def next_commands(folder: Path, mode: str) -> str:
    """Where a finished run's report and model are, and what to type next."""
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    run, lines = shlex.quote(str(shown)), [("Report", f"{shown}/report.html")]
    if mode == "train":
        lines += [("Model", f"{shown}/model"), ("Chat", f"python -m sft_recipes chat {run}")]
        lines += [("Evaluate", f"python -m sft_recipes mode=evaluate evaluate.run={run}")]
        if (folder / "model" / "adapter_config.json").is_file():
            lines += [("Merge", f"python -m sft_recipes merge {run} --out {shlex.quote(shown.name)}-merged")]
    return "\n".join(f"{label + ':':<9} {text}" for label, text in lines)
