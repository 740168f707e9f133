"""Config values become checked arguments: `call(SFTConfig, {"learning_rate": 2e-5}, "trainer")`."""

import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from difflib import get_close_matches
from enum import Enum
from reprlib import repr as short
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sft_recipes.retired import RETIRED


class ConfigError(ValueError):
    """A fault in the configuration that the user can mend, in one line: where, what was found, what to write."""


def call(target: Callable[..., Any], values: Mapping[str, Any], where: str) -> Any:
    """What `target(**values)` returns, once every name is in its signature and every value fits its type hint.

    `where` is the place of `values` in the config (`trainer`, `adapter.lora`) and opens every error message.
    Raises ConfigError for an unknown or missing name, for a value of another type, and for what `target` itself
    refuses with a ValueError, TypeError or ImportError.

    >>> call(round, {"number": 2.6}, "trainer")
    3
    """
    check(target, values, where)
    try:
        return target(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error


def check(target: Callable[..., Any], values: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for the first name or value that `target` would not take.

    Positional-only parameters are the caller's own and no fields. An empty `where` is the root of the config.
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    fields = {name: field for name, field in inspect.signature(target).parameters.items() if field.kind in named}
    hints = type_hints(target)
    for name, value in values.items():
        path = f"{where}.{name}".lstrip(".")
        if name not in fields:
            raise ConfigError(unknown(path, name, fields, owner(target, where)))
        hint = hints.get(name, Any)
        if not fits(value, hint):
            raise ConfigError(f"{path} should be {wording(hint)}, not {shown(value)}.")
        if isinstance(value, str) and value not in (known := choices(hint) or [value]):
            raise ConfigError(f"{path} cannot be {value!r}.{did_you_mean(value, known)}")
    for name, field in fields.items():
        if field.default is field.empty and name not in values:
            path = f"{where}.{name}".lstrip(".")
            raise ConfigError(f"{path} is missing. Write {path}=…")


def choices(hint: Any) -> list[str]:
    """The words that an Enum or Literal in the hint names; none where any text will do.

    >>> choices(Literal["drop", "keep"] | None), choices(str)
    (['drop', 'keep'], [])
    """
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint]
    enums = [member.value for part in parts if inspect.isclass(part) and issubclass(part, Enum) for member in part]
    literals = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    patterns = any("[" in str(word) for word in literals)  # such as PEFT's pissa_niter_[number of iters]
    return enums or ([] if patterns or str in parts else [word for word in literals if isinstance(word, str)])


def type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's parameters or of a class's fields; none where they name what is not imported."""
    is_plain_class = inspect.isclass(target) and not is_dataclass(target)
    try:
        return get_type_hints(target.__init__ if is_plain_class else target)
    except NameError:  # imported for type checkers only
        return {}


def owner(target: Callable[..., Any], where: str) -> str:
    """Whose fields they are in a user's words: SFTConfig's, a formatter's; our other functions are their place's."""
    ours = target.__module__.startswith("sft_recipes.") and not target.__module__.endswith(".formatters")
    return (where or "the config") if ours else target.__name__


def unknown(path: str, name: str, known: Iterable[str], owner: str) -> str:
    """The line for a name that is not in `known`: what to write instead, else the closest one, else all known ones.

    >>> unknown("trainer.lr", "lr", ["learning_rate"], "SFTConfig")
    'trainer.lr is not a field of SFTConfig. Write trainer.learning_rate.'
    >>> unknown("trainer.learning_ratee", "learning_ratee", ["learning_rate"], "SFTConfig")
    'trainer.learning_ratee is not a field of SFTConfig. Did you mean learning_rate?'
    """
    start = f"{path} is not a field of {owner}."
    if name in RETIRED:
        return f"{start} Write {RETIRED[name]}."
    return f"{start}{did_you_mean(name, known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error line: the closest known names, or all of them when they are few and none is close.

    >>> did_you_mean("lim", ["lima", "alpaca"])
    ' Did you mean lima?'
    """
    known = sorted(known)
    close = (
        get_close_matches(name, known, n=1, cutoff=0.8)
        or get_close_matches(name, known, n=3, cutoff=0.6)
        or [k for k in known if name and k.startswith(name)][:3]
    )
    if close:
        return f" Did you mean {' or '.join(close)}?"
    return f" Choices: {', '.join(known)}." if 0 < len(known) <= 40 else ""


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of the hinted type; hints that YAML cannot express (classes, callables) fit all.

    >>> fits("no", bool), fits(1, float), fits(True, int), fits(None, int | None), fits("auto", int | str)
    (False, True, False, True, True)
    """
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str or get_origin(hint) is Literal or (inspect.isclass(hint) and issubclass(hint, Enum)):
        return isinstance(value, str) or value in get_args(hint)
    if hint in (None, types.NoneType):
        return value is None
    origin = get_origin(hint) or hint
    if origin in (list, tuple, set):
        return isinstance(value, list | tuple)
    if origin is dict:
        return isinstance(value, Mapping)
    return True


def wording(hint: Any) -> str:
    """A type hint as a reader of YAML would say it.

    >>> wording(bool), wording(float | None)
    ('true or false', 'a number or null')
    """
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    names |= {list: "a list", tuple: "a list", dict: "a mapping", Literal: "text"}
    if listed := choices(hint):
        return ", ".join(json.dumps(word) for word in listed) if len(listed) < 10 else "text"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(wording(part) for part in get_args(hint)))
    origin = get_origin(hint) or hint
    return names.get(origin, str(hint))


def shown(value: Any) -> str:
    """A value that was found, as YAML writes it, and cut where it is long.

    >>> shown(None), shown(False), shown("no")
    ('null', 'false', "'no'")
    """
    return json.dumps(value) if value is None or isinstance(value, bool) else short(value)


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split())
