"""Chat templates that somebody else wrote are rendered within limits of time, memory and length."""

import resource
import signal
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import tokenization_utils_base
from transformers.utils.chat_template_utils import render_jinja_template

from sft_recipes.errors import ConfigError

SECONDS, MEMORY_BYTES = 10, 1 << 30  # of one rendering: the thread's processor time, and what the process may grow
LONG_TEXT, GROWTH = 1 << 16, 8  # characters, beyond which a text may be so many times as long as what it is given
WAY_OUT = "Take another one."


class OutOfTime(BaseException):
    """Raised by the timer; no Exception, which Jinja's optimizer would pass over."""


class TemplateLimits:
    """`template_limits(action, …)` is what the action gives, or a ConfigError where it takes too much time or memory.

    Both limits are the process's, so they hold for one rendering and not for a batch, beside which other threads take
    memory, and in the main thread alone, where Python runs the timer's handler. They cost some 10 µs.
    """

    def __init__(self) -> None:
        self.renders, self.start = False, None

    def __call__(self, action: Callable, *arguments: Any, **options: Any) -> Any:
        if self.renders or threading.get_ident() != threading.main_thread().ident:
            return action(*arguments, **options)
        for _ in range(2):  # again where the process, and not the template, has grown since its memory was read
            try:
                with self:
                    return action(*arguments, **options)
            except MemoryError:
                data_bytes.cache_clear()
            except OutOfTime:
                raise ConfigError(f"model.chat_template does not end within {SECONDS} seconds. {WAY_OUT}") from None
        raise ConfigError(f"model.chat_template writes more than memory holds. {WAY_OUT}")

    def __enter__(self) -> None:
        self.renders, self.start = True, None
        self.saved = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if size := data_bytes(int(200 * time.monotonic())):
            lowest = min(each for each in (size + MEMORY_BYTES, soft, hard) if each != resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_DATA, (lowest, hard))
        self.handler = signal.signal(signal.SIGVTALRM, self.look)
        self.timer = signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS / 10, SECONDS / 10)

    def look(self, *_: Any) -> None:
        """Handles the timer, which counts all threads' time, and here this one's since the rendering was first seen."""
        if self.renders and self.start is None:
            self.start = time.thread_time()
        elif self.renders and time.thread_time() - self.start > SECONDS:
            raise OutOfTime

    def __exit__(self, *_: Any) -> None:
        self.renders = False
        signal.setitimer(signal.ITIMER_VIRTUAL, *self.timer)
        if callable(self.handler):  # a profiler's; with none, as at Python's end, a late signal would kill the process
            signal.signal(signal.SIGVTALRM, self.handler)
        resource.setrlimit(resource.RLIMIT_DATA, self.saved)


@lru_cache(maxsize=1)
def data_bytes(moment: int) -> int:
    """The bytes of the process's own memory, read anew at every `moment`, since reading takes longer than a rendering's
    limits do; 0 where the system does not say, as macOS."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except OSError:
        return 0


template_limits = TemplateLimits()


def render_within_limits(conversations: list, tools: list | None = None, **options: Any) -> tuple[list, list]:
    """What transformers' function of this kind gives; raises ConfigError for a template without an end or measure."""
    texts, spans = template_limits(render_jinja_template, conversations, tools, **options)
    longest = max(map(len, texts), default=0)
    if longest > LONG_TEXT and longest > GROWTH * len(repr((conversations, tools, options))):
        raise ConfigError(f"model.chat_template writes {longest:,} characters for a short conversation. {WAY_OUT}")
    return texts, spans


# The one place that all renderings pass: those of `apply_chat_template`, lm-eval's and TRL's among them
tokenization_utils_base.render_jinja_template = render_within_limits
