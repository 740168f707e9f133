"""ConfigError and DataError, a user's mistake in one line, and RunInterrupted, a run's end from outside."""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

# C0 and C1 but for tab and line feed, Unicode's marks, embeddings, overrides and isolates of direction, surrogates
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class ConfigError(ValueError):
    """A fault in the configuration that the user can fix, in one line: where, what was found, what to write."""


class DataError(ValueError):
    """A fault in the user's data, told in one line that names the field."""


class RunInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal and has left a checkpoint: what to say, and the exit code that goes with it."""

    def __init__(self, line: str, code: int = 130):
        super().__init__(line)
        self.code = code


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the process with exit code 2 and one line on stderr for a user's mistake."""
    try:
        yield
    except (ConfigError, DataError) as error:
        print(one_line(error), file=sys.stderr)
        sys.exit(2)


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
    return f" Choices: {', '.join(known)}." if 0 < len(known) <= 60 else ""


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks and what a terminal would obey."""
    return " ".join(printable(str(error)).split())


def printable(text: str) -> str:
    """The text with � for control characters, changes of direction and lone surrogates; line breaks and tabs stay.

    >>> printable("red: \\x1b[31m, \\u202e, a tab:\\t.")
    'red: �[31m, �, a tab:\\t.'
    """
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
