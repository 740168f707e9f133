"""Config values become checked arguments: `call_validated(SFTConfig, {"learning_rate": 2e-5}, "trainer")`."""

import inspect
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from enum import Enum
from importlib import import_module
from reprlib import repr as short
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from sft_recipes.config.renamed_options import RENAMED_OPTIONS
from sft_recipes.errors import ConfigError, did_you_mean, one_line

# Numbers out of whose interval only a mistake puts them
Count = Annotated[int, "[1, inf)"]
WholeNumber = Annotated[int, "[0, inf)"]
NotNegative = Annotated[float, "[0, inf)"]
Positive = Annotated[float, "(0, inf)"]
Share = Annotated[float, "(0, 1]"]
# Fields of transformers and TRL whose hints are any text, and which take true, or are words alone
OWN_HINTS = dict.fromkeys(("fsdp", "resume_from_checkpoint"), bool | str | None)
OWN_HINTS["include_num_input_tokens_seen"] = bool | Literal["all", "non_padding", "no"]
OWN_HINTS["pad_to_multiple_of"] = int | Literal["auto"] | None


def call_validated(target: Callable[..., Any], values: Mapping[str, Any], where: str) -> Any:
    """What `target(**values)` returns, once every name is in its signature and every value fits its type hint.

    `where` is the place of `values` in the config (`trainer`, `adapter.lora`) and opens every error message.
    Raises ConfigError for an unknown or missing name, for a value of another type, and for what `target` itself
    refuses with a ValueError, TypeError, ImportError or OSError.

    >>> call_validated(round, {"number": 2.6}, "trainer")
    3
    """
    validate_kwargs(target, values, where)
    built, hints = dict(values), resolve_type_hints(target)
    for name, value in values.items():
        for part in hint_parts(hints.get(name)) if isinstance(value, Mapping) else ():
            if is_dataclass(part.kind):
                built[name] = call_validated(part.kind, value, f"{where}.{name}".lstrip("."))
    try:
        return target(**built)
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        text = one_line(error)  # which may begin with the name of one of the values: held_out=1.0 is …
        raise ConfigError(f"{where}{'.' if re.split('[ =]', text)[0] in values else ': '}{text}") from error


def validate_kwargs(target: Callable[..., Any], values: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for the first name or value that `target` would not take.

    Positional-only parameters are the caller's own and no fields. An empty `where` is the root of the config.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    fields = {name: field for name, field in inspect.signature(target).parameters.items() if field.kind in named}
    hints = resolve_type_hints(target)
    for name, value in values.items():
        path = f"{where}.{name}".lstrip(".")
        if name not in fields:
            raise ConfigError(unknown_field(path, name, fields, field_owner(target, where)))
        hint = hints.get(name, Any)
        if misfit := find_misfit(path, value, hint):
            raise ConfigError(misfit)
        if isinstance(value, str) and value not in (known := words_of(hint_parts(hint)) or [value]):
            beside = [TYPE_NAMES[part.kind] for part in hint_parts(hint) if part.kind in (bool, int)]
            raise ConfigError(f"{path} cannot be {value!r}.{did_you_mean(value, [*known, *beside])}")
        for part in hint_parts(hint):
            check_interval(path, value, part.interval)
    for name, field in fields.items():
        if field.default is field.empty and name not in values:
            path = f"{where}.{name}".lstrip(".")
            raise ConfigError(f"{path} is missing. Write {path}=…")


def check_interval(path: str, value: Any, interval: str) -> None:
    """Raises ConfigError for a number outside an interval.

    >>> check_interval("data.mine.share", 1.5, "(0, 1]")
    Traceback (most recent call last):
    sft_recipes.errors.ConfigError: data.mine.share should be above 0 and at most 1, not 1.5.
    """
    if not interval or not isinstance(value, int | float) or isinstance(value, bool):
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if not (above and below):  # also NaN, which compares false
        words = f"{'above' if interval[0] == '(' else 'at least'} {low:g}"
        if not math.isinf(high):
            words += f" and {'below' if interval[-1] == ')' else 'at most'} {high:.10g}"
        raise ConfigError(f"{path} should be {words}, not {value}.")


class HintPart(NamedTuple):
    """One of the types of which a hint allows any."""

    kind: Any  # the class without its parameters; Literal, or Enum for a class of it
    words: tuple[Any, ...] = ()  # the values of a Literal or an Enum
    interval: str = ""  # of a number: [1, inf)
    inner: Any = Any  # the type of a list's items, or of a mapping's values


def hint_parts(hint: Any) -> list[HintPart]:
    """The types of which a hint allows any: those of a union, else the one that it is.

    >>> [(part.kind, part.words, part.interval) for part in hint_parts(Annotated[int, "[1, inf)"] | Literal["a"])]
    [(<class 'int'>, (), '[1, inf)'), (typing.Literal, ('a',), '')]
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return [part for each in get_args(hint) for part in hint_parts(each)]
    if origin is Annotated:
        return [HintPart(get_args(hint)[0], interval=hint.__metadata__[0])]
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return [HintPart(Enum, tuple(member.value for member in hint))]
    inner = get_args(hint)[-1] if origin in (list, dict) else Any
    return [HintPart(origin or hint, get_args(hint) if origin is Literal else (), inner=inner)]


def words_of(parts: Iterable[HintPart]) -> list[str]:
    """The words that an Enum or a Literal among the types names; none where any text will do.

    >>> words_of(hint_parts(Literal["drop", "keep"] | None)), words_of(hint_parts(str))
    (['drop', 'keep'], [])
    """
    words = [word for part in parts for word in part.words if isinstance(word, str)]
    # an Enum's hold beside str, too; a pattern is one such as PEFT's pissa_niter_[number of iters]
    any_text = any("[" in word for word in words) or {str, Literal} <= {part.kind for part in parts}
    return [] if any_text else words


def resolve_type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's parameters or of a class's fields; none where they name what is not imported."""
    is_plain_class = inspect.isclass(target) and not is_dataclass(target)
    try:
        # the types, and not the signature's annotations: those of PEFT are text (from __future__ import annotations)
        hints = get_type_hints(target.__init__ if is_plain_class else target, include_extras=True)
    except NameError:  # imported for type checkers only
        return {}
    for name, field in getattr(target, "__dataclass_fields__", {}).items():
        if choices := field.metadata.get("choices"):  # transformers' words for a field of any text
            hints[name] = Literal[(*choices, field.default)]
    return hints | {name: hint for name, hint in OWN_HINTS.items() if name in hints}


def field_owner(target: Callable[..., Any], where: str) -> str:
    """Whose fields they are in a user's words: SFTConfig's, a formatter's; our other functions are their place's."""
    ours = target.__module__.startswith("sft_recipes.") and not target.__module__.endswith(".formatters")
    return (where or "the config") if ours else target.__name__


def unknown_field(path: str, name: str, known: Iterable[str], owner: str) -> str:
    """The line for a name that is not in `known`: what to write instead, else the closest one, else all known ones.

    >>> unknown_field("trainer.lr", "lr", ["learning_rate"], "SFTConfig")
    'trainer.lr is not a field of SFTConfig. Write trainer.learning_rate.'
    >>> unknown_field("trainer.learning_ratee", "learning_ratee", ["learning_rate"], "SFTConfig")
    'trainer.learning_ratee is not a field of SFTConfig. Did you mean learning_rate?'
    """
    start = f"{path} is not a field of {owner}."
    if name in RENAMED_OPTIONS:
        return f"{start} Write {RENAMED_OPTIONS[name]}."
    return f"{start}{did_you_mean(name, known)}"


# What YAML writes for a type, in Python and in words
YAML_TYPES = {bool: bool, int: int, float: int | float, str: str, types.NoneType: types.NoneType, list: list | tuple}
YAML_TYPES |= {tuple: list | tuple, set: list | tuple, dict: Mapping}
TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
TYPE_NAMES |= {list: "a list", tuple: "a list", dict: "a mapping", Literal: "text"}


def matches_type(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of the hinted type; hints that YAML cannot express (classes, callables) fit all.

    >>> matches_type("no", bool), matches_type(1, float), matches_type(True, int), matches_type(None, int | None)
    (False, True, False, True)
    """
    return find_misfit("", value, hint) is None


def find_misfit(path: str, value: Any, hint: Any) -> str | None:
    """The line for a value that is not of the hinted type, or for such an item of a list or mapping; None if it fits.

    >>> find_misfit("report_to", ["wandb"], list[str] | str), find_misfit("report_to", ["wandb", 1], list[str] | str)
    (None, 'report_to[1] should be text, not 1.')
    """
    misfit = None  # of an item
    for kind, words, _, inner in hint_parts(hint):
        if kind in (Enum, Literal):
            fits = isinstance(value, str) or value in words
        elif isinstance(value, bool) and kind in (int, float):  # true is a 1 in Python
            fits = False
        elif fits := isinstance(value, Mapping | kind if is_dataclass(kind) else YAML_TYPES.get(kind, object)):
            places = enumerate(value) if kind is list else value.items() if kind is dict else ()
            form = "{}[{}]" if kind is list else "{}.{}"
            misfits = (find_misfit(form.format(path, place), item, inner) for place, item in places)
            misfit = next(filter(None, misfits), None)
            fits = misfit is None
        if fits:
            return None
    return misfit or f"{path} should be {describe_type(hint)}, not {show_value(value)}."


def describe_type(hint: Any) -> str:
    """A type hint as a reader of YAML would say it.

    >>> describe_type(bool), describe_type(float | None), describe_type(int | Literal["auto"])
    ('true or false', 'a number or null', 'a whole number or "auto"')
    """
    kinds, listed = [part.kind for part in hint_parts(hint)], words_of(hint_parts(hint))
    words = ", ".join(json.dumps(word) for word in listed) if 0 < len(listed) < 10 else "text"
    names = TYPE_NAMES | {Literal: words, Enum: words}
    kinds = [dict if is_dataclass(kind) else kind for kind in kinds if not listed or kind in (bool, int, Literal, Enum)]
    return " or ".join(dict.fromkeys(names.get(kind, str(kind)) for kind in kinds))


def show_value(value: Any) -> str:
    """A value that was found, as YAML writes it, and cut where it is long.

    >>> show_value(None), show_value(False), show_value("no")
    ('null', 'false', "'no'")
    """
    if is_dataclass(value):
        return "{" + ", ".join(f"{key}: {show_value(item)}" for key, item in vars(value).items()) + "}"
    return json.dumps(value) if value is None or isinstance(value, bool) else short(value)


def import_function(where: str, label: str) -> Callable:
    """A user's `module.function`; raises ConfigError where it cannot be imported."""
    module, _, function = label.rpartition(".")
    if not module:
        raise ConfigError(f"{where}={label} is unknown. One of your own is written module.name.")
    if module.partition(".")[0] in sys.stdlib_module_names:  # a recipe of a stranger's could name subprocess.getoutput
        raise ConfigError(f"{where}={label} is of Python itself, and no function of your own.")
    try:
        own = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}={label} could not be imported: {one_line(error)}.") from error
    if not callable(own):
        raise ConfigError(f"{where}={label} is not a function.")
    return own
