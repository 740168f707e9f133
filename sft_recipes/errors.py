"""ConfigError and DataError, a user's mistake in one line, RunInterrupted, a run's end from outside, and safe text."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from typing import Any

# C0 and C1 but for tab and line feed, Unicode's marks, embeddings, overrides and isolates of direction, surrogates
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
HIDDEN = "HIDDEN"  # stands in YAML, JSON, HTML, Markdown and a shell as it is
# What a token looks like: the hub's, OpenAI's, GitHub's, GitLab's, Slack's, AWS's, Google's, and JWTs
TOKEN = re.compile(
    r"(\b)(hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[opsu]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w-]{20,}|"
    r"xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{16}|AIza[\w-]{35}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
SECRETS = (  # what stays, and what is hidden: the login in a URL, a key in its query, a token
    re.compile(r"(:///?)([^/\s\"'<>]+)(?=@)"),
    re.compile(r"(?i)([?&;][\w-]{0,30}(?:token|signature|secret|password|key|sig|credential)=)([^&\s\"'<>#]+)"),
    re.compile(r"(\bBearer +)([\w.~+/-]{16,})"),
    TOKEN,
)


class ConfigError(ValueError):
    """A fault in the configuration that the user can fix, in one line: where, what was found, what to write."""


class DataError(ValueError):
    """A fault in the user's data, told in one line that names the field."""


class RunInterrupted(KeyboardInterrupt):
    """Training was stopped by a signal and has left a checkpoint: what to say, and the exit code that goes with it."""

    def __init__(self, line: str, code: int = 130):
        super().__init__(line)
        self.code = code


class SafeStream:
    """stdout or stderr without secrets, to which printing never fails: a result does not depend on who reads it.

    A letter that the terminal lacks becomes `?`; after a broken pipe or a full disk, what is printed goes nowhere.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self.attempt(lambda: self.stream.write(mask_secrets(text)))
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action: Callable[[], Any]) -> None:
        """Does it; what cannot be written goes to the null device from here on, also what waits in the buffer."""
        try:
            action()
        except (OSError, ValueError):  # ValueError is a closed file's
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def make_printing_safe() -> None:
    """Puts a SafeStream in the place of stdout and stderr, where these are open."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream))


def is_first_process() -> bool:
    """Whether this is the first of a run's processes, which alone writes and prints; without torchrun there is one."""
    return not int(os.environ.get("RANK", 0))


def await_first() -> None:
    """Gives the first process, which most mistakes stop as well, time to say it: torchrun then ends the others."""
    if not is_first_process():
        time.sleep(30)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the process with one line on stderr: with exit code 2 for a user's mistake, with 130 after Ctrl-C.

    Printing is safe from here on.
    """
    make_printing_safe()
    try:
        yield
    except (ConfigError, DataError) as error:
        await_first()
        print(one_line(error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


@contextmanager
def explained_files_of(folder: Any) -> Iterator[None]:
    """Whatever goes wrong with files that somebody else may have written becomes a ConfigError of one line."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except Exception as error:
        of_values = ArithmeticError | AttributeError | LookupError | TypeError | ValueError | RecursionError
        fault = "its files do not hold what a run writes" if isinstance(error, of_values) else "it cannot be used"
        raise ConfigError(f"{folder}: {fault}: {type(error).__name__}, {one_line(error)[:300]}.") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error line: the closest known names, or all of them when they are few and none is close.

    >>> did_you_mean("lim", ["lima", "alpaca"])
    ' Did you mean lima?'
    """
    known = sorted(known)
    letters = sorted(name.lower())
    close = (
        [one for one in known if sorted(one.lower()) == letters][:1]  # modle, which difflib finds closer to mode
        or get_close_matches(name, known, n=1, cutoff=0.8)
        or get_close_matches(name, known, n=3, cutoff=0.6)
        or [k for k in known if name and k.startswith(name)][:3]
    )
    if close:
        return f" Did you mean {' or '.join(close)}?"
    return f" Choices: {', '.join(known)}." if 0 < len(known) <= 60 else ""


def plural(number: int, one: str, many: str = "") -> str:
    """A number with its noun, in the plural for all numbers but 1.

    >>> plural(1, "row"), plural(2000, "row is", "rows are")
    ('1 row', '2,000 rows are')
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks, secrets and what a terminal would obey; a long one is cut."""
    return cut_middle(" ".join(printable(mask_secrets(str(error))).split()))


def cut_middle(text: str, most: int = 2000) -> str:
    """A text of at most `most` characters or so: its beginning and its end, which says what to write."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def mask_secrets(text: str) -> str:
    """The text without logins in URLs and without tokens; what names a variable (`${oc.env:NAME}`) stays.

    >>> mask_secrets("https://me:pass@host/a.jsonl?sig=x&b=1 hf_abcdefghijklmnopqrst")
    'https://HIDDEN@host/a.jsonl?sig=HIDDEN&b=1 HIDDEN'
    """
    for pattern in SECRETS:
        text = pattern.sub(lambda found: found[0] if "${" in found[2] else found[1] + HIDDEN, text)
    return text


def printable(text: str) -> str:
    """The text with � for control characters, changes of direction and lone surrogates; line breaks and tabs stay.

    >>> printable("red: \\x1b[31m, \\u202e, a tab:\\t.")
    'red: �[31m, �, a tab:\\t.'
    """
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def escape_markdown(text: str) -> str:
    """The text with every character escaped that is Markdown syntax, `|` for tables included.

    >>> escape_markdown("a|b *c* snake_case <script>")
    'a\\\\|b \\\\*c\\\\* snake_case \\\\<script>'
    """
    # an underscore inside a word is none in CommonMark (section 6.2), and snake_case stays readable
    return re.sub(r"[\\`*\[\]<&|~$]|(?<!\w)_|_(?!\w)|^[#>]", r"\\\g<0>", text)
