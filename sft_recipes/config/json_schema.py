"""A JSON schema of a config file, for editors: `python -m sft_recipes schema > recipe.schema.json`."""

import argparse
import json
from dataclasses import is_dataclass
from pydoc import locate
from types import NoneType
from typing import Annotated, Any, get_origin

from sft_recipes.config.help_topics import TOPICS, class_fields
from sft_recipes.config.schema import Config, root_keys
from sft_recipes.config.validation import literal_choices, plain_type, resolve_type_hints, union_parts

NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null", dict: "object"}
NAMES |= {list: "array", tuple: "array"}
BOUNDS = {"(": "exclusiveMinimum", "[": "minimum", ")": "exclusiveMaximum", "]": "maximum"}
FILLED_IN = {"type": "string", "pattern": r"^\$\{|^\?\?\?$"}  # by Hydra, whatever the type: ${name}, ??? where missing


def main(arguments: list[str] | None = None) -> None:
    """Prints a JSON schema of a config file: the first line `# yaml-language-server: $schema=FILE` has it checked."""
    argparse.ArgumentParser(prog="python -m sft_recipes schema", description=main.__doc__).parse_args(arguments)
    print(json.dumps(config_schema(), indent=1, default=str))


def config_schema() -> dict[str, Any]:
    """The schema of a recipe or a primary config; neither has to have any key."""
    topics = {name: class_schema(*map(locate, classes)) for name, (_, classes) in TOPICS.items()}
    found = {"hydra": {"type": "object"}, "defaults": {"type": "array"}} | class_schema(Config)["properties"]
    found |= {"trainer": topics["trainer"], "data": topics["data"] | {"additionalProperties": topics["source"]}}
    found["adapter"] = topics["adapter"] | {"additionalProperties": {"type": "object"}}  # of PEFT's other methods
    found["adapter"]["properties"] |= {name: topics[name] for name in ("lora", "quantization")}
    return class_schema() | {"properties": {key: found[key] for key in ("defaults", *root_keys())}}


def class_schema(*targets: type) -> dict[str, Any]:
    """A mapping whose keys are the fields of these classes."""
    properties = {}
    for target in targets:
        for name, default, text in class_fields(target):
            parts = map(part_schema, union_parts(resolve_type_hints(target).get(name, Any)))
            properties[name] = {"anyOf": [*parts, FILLED_IN], "description": text}
            properties[name] |= {} if default == "required" or is_dataclass(default) else {"default": default}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def part_schema(hint: Any) -> dict[str, Any]:
    """What YAML may write for a type; anything where it cannot express the type."""
    kind, words = plain_type(hint), literal_choices(hint)
    if is_dataclass(kind):
        return class_schema(kind)
    found = {"enum": words} if words else {"type": NAMES[kind]} if kind in NAMES else {}
    if get_origin(hint) is Annotated:
        low, high = hint.__metadata__[0][1:-1].split(", ")
        ends = {BOUNDS[hint.__metadata__[0][0]]: low, BOUNDS[hint.__metadata__[0][-1]]: high}
        found |= {bound: float(end) for bound, end in ends.items() if end != "inf"}
    return found
