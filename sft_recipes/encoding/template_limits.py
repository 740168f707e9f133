"""Chat templates that somebody else wrote are rendered within limits of time, memory and length."""

import resource
import signal
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import tokenization_utils_base
from transformers.utils.chat_template_utils import render_jinja_template

from sft_recipes.errors import ConfigError

SECONDS, MEMORY_BYTES = 10, 1 << 30  # of one rendering: the thread's processor time, and what the process may grow
LONG_TEXT, GROWTH = 1 << 16, 8  # characters, beyond which a text may be so many times as long as its conversation


class OutOfTime(BaseException):
    """Raised by the timer; no Exception, which Jinja's optimizer would pass over."""


class TemplateLimits:
    """Within it a template raises ConfigError where it takes too much time or memory.

    Both limits are the process's, so they hold for one rendering and not for a batch, beside which other threads take
    memory, and in the main thread alone, where Python runs the timer's handler. They cost some 4 µs.
    """

    def __init__(self) -> None:
        self.renders, self.start, self.handles = False, None, False

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        self.renders, self.start = True, None
        self.saved = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = data_bytes(int(20 * time.monotonic())) + MEMORY_BYTES
        lowest = min(each for each in (limit, soft, hard) if each != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_DATA, (lowest, hard))
        if not self.handles:
            signal.signal(signal.SIGVTALRM, self.look)
            self.handles = True
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS / 10, SECONDS / 10)

    def look(self, *_: Any) -> None:
        """Handles the timer, which counts all threads' time, and here this one's since the rendering was first seen."""
        if self.renders and self.start is None:
            self.start = time.thread_time()
        elif self.renders and time.thread_time() - self.start > SECONDS:
            raise OutOfTime

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        self.renders = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)  # without a handler, as at Python's end, it would kill the process
        resource.setrlimit(resource.RLIMIT_DATA, self.saved)
        if kind in (OutOfTime, MemoryError):
            fault = f"does not end within {SECONDS} seconds" if kind is OutOfTime else "writes more than memory holds"
            raise ConfigError(f"model.chat_template {fault}. Take another one.") from None


@lru_cache(maxsize=1)
def data_bytes(moment: int) -> int:
    """The bytes of the process's own memory, read anew at every `moment`, since reading takes longer than a rendering's
    limits do."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()


template_limits = TemplateLimits()


def render_within_limits(conversations: list, tools: list | None = None, **options: Any) -> tuple[list, list]:
    """What transformers' function of this kind gives; raises ConfigError for a template without an end or measure."""
    with template_limits:
        texts, spans = render_jinja_template(conversations, tools, **options)
    longest = max(map(len, texts), default=0)
    if longest > LONG_TEXT and longest > GROWTH * len(repr((conversations, tools))):
        raise ConfigError(f"model.chat_template writes {longest:,} characters for a short conversation. Take another.")
    return texts, spans


# The one place that all renderings pass: those of `apply_chat_template`, lm-eval's and TRL's among them
tokenization_utils_base.render_jinja_template = render_within_limits
