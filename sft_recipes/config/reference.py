"""The fields of a config: `python -m sft_recipes --help trainer`, and all in a JSON schema for editors.

`python -m sft_recipes schema > recipe.schema.json`
"""

import argparse
import inspect
import json
import re
import textwrap
from dataclasses import MISSING, fields, is_dataclass
from pydoc import locate
from types import NoneType
from typing import Any

from sft_recipes.config.endpoint_options import EndpointOptions, JudgeOptions
from sft_recipes.config.hydra_plugin import config_folder, terminal_width
from sft_recipes.config.nested_values import get_path, load_yaml
from sft_recipes.config.options import Source, TrainerOptions
from sft_recipes.config.renamed_options import UNSUPPORTED_OPTIONS
from sft_recipes.config.schema import Config, root_keys
from sft_recipes.config.validation import hint_parts, resolve_type_hints, show_value, words_of
from sft_recipes.errors import ConfigError, did_you_mean

# The choice that sets defaults of its own, where it is not the group's file default.yaml
SET_BY = {"adapter.lora": "adapter/lora", "adapter.quantization": "adapter/qlora"}
# What can be asked for: where its keys stand, and the classes whose fields they are; a library's by name, which takes
# seconds to import
TOPICS = {group.name: (group.name, [group.type]) for group in fields(Config) if is_dataclass(group.type)}
TOPICS |= {
    "source": ("data.NAME", [Source]),
    "lora": ("adapter.lora", ["peft.LoraConfig"]),
    "quantization": ("adapter.quantization", ["transformers.BitsAndBytesConfig"]),
    "trainer": ("trainer", [TrainerOptions, "trl.SFTConfig"]),
    "endpoint": ("generate.endpoint", [EndpointOptions]),
    "judge": ("evaluate.judge", [JudgeOptions]),
}
SCHEMA_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null", dict: "object"}
SCHEMA_TYPES |= {list: "array", tuple: "array"}
BOUNDS = {"(": "exclusiveMinimum", "[": "minimum", ")": "exclusiveMaximum", "]": "maximum"}
FILLED_IN = {"type": "string", "pattern": r"^\$\{|^\?\?\?$"}  # by Hydra, whatever the type: ${name}, ??? where missing


def describe_topic(name: str) -> str:
    """Every key of the topic with its default and what it does; raises ConfigError for another topic."""
    if name not in TOPICS:
        raise ConfigError(f"--help {name}: there is no such topic.{did_you_mean(name, TOPICS)}")
    where, classes = TOPICS[name][0], topic_classes(name)
    file = config_folder("conf") / f"{SET_BY.get(where, f'{where}/default')}.yaml"
    values = load_yaml(file) if file.is_file() else {}
    set_here = get_path(values, where) or values
    owners = " and ".join(one.__name__ for one in classes)
    given = f", as {SET_BY[where].replace('/', '=')} sets them" if where in SET_BY else ""
    width = terminal_width()
    lines = [f"{where}.* with the defaults{given}: the fields of {owners}.", ""]
    for key, field in class_schema(*classes)["properties"].items():
        value = set_here.get(key, field.get("default", "required"))
        shown = value if str(value).startswith("${") else show_value(value)  # another key's value: its whole name
        lines.append(f"  {where}.{key} = {shown}")
        lines += textwrap.wrap(field["description"], width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if name == "data":
        lines += ["", "  data.NAME.*, the fields of one source: --help source"]
    return "\n".join(lines)


def topic_classes(name: str) -> list[type]:
    """The classes whose fields a topic lists."""
    return [locate(one) if isinstance(one, str) else one for one in TOPICS[name][1]]


def class_fields(target: type) -> list[tuple[str, Any, str]]:
    """Name, default and one sentence of every field that a config may set: its `help`, or the comment beside it.

    The default is MISSING where the field is required.
    """
    parameters = inspect.signature(target).parameters
    # BitsAndBytesConfig's constructor takes other names than its fields have
    if parameters.keys() != {item.name for item in fields(target) if item.init}:  # it has a constructor of its own
        named = [one for one in parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
        return [(one.name, MISSING if one.default is one.empty else one.default, "") for one in named]
    sources = "".join(inspect.getsource(each) for each in reversed(target.__mro__[:-1]))
    # Python keeps no comments, so they are read from the source: one place for a field, its default and what it does
    comments = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", sources, re.MULTILINE))
    hidden = {"fields", "settings", *(UNSUPPORTED_OPTIONS if target.__name__ == "SFTConfig" else ())}  # no keys here
    found = []
    for item in fields(target):
        if item.init and item.name not in hidden:
            text = " ".join(str(item.metadata.get("help") or comments.get(item.name, "")).split())
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            default = getattr(default, "value", default)  # of an Enum
            found.append((item.name, default, re.split(r"(?<=\.) ", text)[0]))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Prints a JSON schema of a config file: the first line `# yaml-language-server: $schema=FILE` has it checked."""
    argparse.ArgumentParser(prog="python -m sft_recipes schema", description=main.__doc__).parse_args(arguments)
    print(
        json.dumps(config_schema(), indent=1, default=lambda value: vars(value) if is_dataclass(value) else str(value))
    )


def config_schema() -> dict[str, Any]:
    """The schema of a recipe or a primary config; neither has to have any key."""
    topics = {name: class_schema(*topic_classes(name)) for name in TOPICS}
    found = {"hydra": {"type": "object"}, "defaults": {"type": "array"}} | class_schema(Config)["properties"]
    found |= {"trainer": topics["trainer"], "data": topics["data"] | {"additionalProperties": topics["source"]}}
    found["adapter"] = topics["adapter"] | {"additionalProperties": {"type": "object"}}  # of PEFT's other methods
    found["adapter"]["properties"] |= {name: topics[name] for name in ("lora", "quantization")}
    return class_schema() | {"properties": {key: found[key] for key in ("defaults", *root_keys())}}


def class_schema(*targets: type) -> dict[str, Any]:
    """A mapping whose keys are the fields of these classes; of fields of one name, ours comes first and takes more."""
    properties = {}
    for target in targets:
        hints = resolve_type_hints(target)
        for name, default, text in class_fields(target):
            field = {"anyOf": [*hint_schemas(hints.get(name, Any)), FILLED_IN], "description": text}
            properties.setdefault(name, field if default is MISSING else field | {"default": default})
    return {"type": "object", "properties": properties, "additionalProperties": False}


def hint_schemas(hint: Any) -> list[dict[str, Any]]:
    """What YAML may write for a type hint; anything where it cannot express the type."""
    found = []
    for part in hint_parts(hint):
        if is_dataclass(part.kind):
            found.append(class_schema(part.kind))
        elif words := words_of([part]):
            found.append({"enum": words})
        else:
            ends = dict(zip(part.interval[:1] + part.interval[-1:], part.interval[1:-1].split(", "), strict=False))
            bounds = {BOUNDS[end]: float(number) for end, number in ends.items() if number != "inf"}
            found.append(bounds | ({"type": SCHEMA_TYPES[part.kind]} if part.kind in SCHEMA_TYPES else {}))
    return found
