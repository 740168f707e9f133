"""The fields of one part of the config with their defaults: `python -m sft_recipes --help trainer`."""

import inspect
import re
import textwrap
from dataclasses import MISSING, fields
from pydoc import locate
from typing import Any

from omegaconf import OmegaConf

from sft_recipes.config.hydra_plugin import config_folder
from sft_recipes.config.renamed_options import UNSUPPORTED_OPTIONS
from sft_recipes.config.validation import show_value
from sft_recipes.errors import ConfigError, did_you_mean

OURS = "sft_recipes.config.options."
GENERATE = "sft_recipes.config.generate_options."
# The choice that sets defaults of its own, where it is not the group's file default.yaml
SET_BY = {"adapter.lora": "adapter/lora", "adapter.quantization": "adapter/qlora"}
# What can be asked for: where its keys stand, and the classes whose fields they are
TOPICS = {
    "model": ("model", [f"{OURS}ModelOptions"]),
    "data": ("data", [f"{OURS}DataOptions"]),
    "source": ("data.NAME", [f"{OURS}Source"]),
    "mix": ("mix", [f"{OURS}MixOptions"]),
    "data_checks": ("data_checks", [f"{OURS}CheckPolicy"]),
    "adapter": ("adapter", [f"{OURS}AdapterOptions"]),
    "lora": ("adapter.lora", ["peft.LoraConfig"]),
    "quantization": ("adapter.quantization", ["transformers.BitsAndBytesConfig"]),
    "trainer": ("trainer", [f"{OURS}TrainerOptions", "trl.SFTConfig"]),
    "evaluate": ("evaluate", [f"{OURS}EvaluateOptions"]),
    "generate": ("generate", [f"{GENERATE}GenerateOptions"]),
    "endpoint": ("generate.endpoint", [f"{GENERATE}EndpointOptions"]),
    "curation": ("curation", ["sft_recipes.config.curation_options.CurationOptions"]),
    "judge": ("evaluate.judge", [f"{OURS}JudgeOptions"]),
}


def describe_topic(name: str) -> str:
    """Every key of the topic with its default and what it does; raises ConfigError for another topic."""
    if name not in TOPICS:
        raise ConfigError(f"--help {name}: there is no such topic.{did_you_mean(name, TOPICS)}")
    where, classes = TOPICS[name]
    file = config_folder("conf") / f"{SET_BY.get(where, f'{where}/default')}.yaml"
    values = OmegaConf.load(file) if file.is_file() else OmegaConf.create()
    set_here = OmegaConf.to_container(OmegaConf.select(values, where) or values)
    owners = " and ".join(path.rpartition(".")[2] for path in classes)
    given = f", as {SET_BY[where].replace('/', '=')} sets them" if where in SET_BY else ""
    lines = [f"{where}.* with the defaults{given}: the fields of {owners}.", ""]
    for path in classes:
        for key, default, text in class_fields(locate(path)):
            lines.append(f"  {where}.{key} = {show_value(set_here.get(key, default))}")
            lines += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if name == "data":
        lines += ["", "  data.NAME.*, the fields of one source: --help source"]
    return "\n".join(lines)


def class_fields(target: type) -> list[tuple[str, Any, str]]:
    """Name, default and one sentence of every field that a config may set: its `help`, or the comment beside it."""
    parameters = inspect.signature(target).parameters
    # BitsAndBytesConfig's constructor takes other names than its fields have
    if parameters.keys() != {item.name for item in fields(target) if item.init}:  # it has a constructor of its own
        named = [one for one in parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
        return [(one.name, "required" if one.default is one.empty else one.default, "") for one in named]
    sources = "".join(inspect.getsource(each) for each in reversed(target.__mro__[:-1]))
    # Python keeps no comments, so they are read from the source: one place for a field, its default and what it does
    comments = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", sources, re.MULTILINE))
    unused = UNSUPPORTED_OPTIONS if target.__name__ == "SFTConfig" else ()
    hidden = {"fields", "settings", *unused}  # no keys of a config
    found = []
    for item in fields(target):
        if item.init and item.name not in hidden:
            text = " ".join(str(item.metadata.get("help") or comments.get(item.name, "")).split())
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            default = getattr(default, "value", default)  # of an Enum
            found.append((item.name, "required" if default is MISSING else default, re.split(r"(?<=\.) ", text)[0]))
    return found
