"""Chat templates that somebody else wrote are rendered within limits of time, memory and length, in every thread."""

import ctypes
import os
import resource
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from time import sleep
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import tokenization_utils_base
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from sft_recipes.errors import ConfigError

SECONDS, MEMORY_BYTES = 10, 1 << 30  # of one rendering: the thread's processor time, and what the process may grow
NUMBER_BITS = 1 << 16  # of what a template computes
LONG_TEXT, GROWTH = 1 << 16, 8  # characters, beyond which a text may be so many times as long as what it is given
WAY_OUT = "Take another one."


class OutOfTime(BaseException):
    """Ends a rendering; no Exception, which Jinja's optimizer would pass over."""


class OutOfMemory(OutOfTime):
    """Ends a rendering that has grown too much, where the system has refused no memory."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without products and powers of hours or gigabytes, which are one step that none can stop."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        match left, right:
            case int(), int():
                bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
                if bits > NUMBER_BITS:
                    raise OutOfTime
            case (int(times), part) | (part, int(times)) if hasattr(part, "__len__"):
                if 8 * len(part) * times > MEMORY_BYTES:  # an item of a list takes 8 bytes, a character at most 4
                    raise MemoryError
        return super().call_binop(context, operator, left, right)


class TemplateLimits:
    """`template_limits(action, …)` is what the action gives, or a ConfigError where it takes too much time or memory.

    A thread looks at all that is under way, and raises in the thread whose action is over a limit, between two of its
    steps. In the main thread the system itself refuses memory, also within a step: its limit is the process's, so it
    would hit what trains there while another thread renders. All of it costs some 10 µs.
    """

    def __init__(self) -> None:
        self.lock, self.under_way, self.watchdog = threading.Lock(), {}, None

    def __call__(self, action: Callable, *arguments: Any, **options: Any) -> Any:
        if (thread := threading.get_ident()) in self.under_way:
            return action(*arguments, **options)
        if not (self.watchdog and self.watchdog.is_alive()):  # it ends where it finds no memory to look
            self.watchdog = threading.Thread(target=self.watch, daemon=True)
            self.watchdog.start()
        is_main = thread == threading.main_thread().ident
        for _ in range(2):  # again where the process, and not the template, has grown since its memory was read
            size = data_bytes(int(200 * time.monotonic()))
            before = resource.getrlimit(resource.RLIMIT_DATA) if size and is_main else ()
            try:
                self.under_way[thread] = processor_seconds(thread), size
                try:
                    if before:
                        known = [each for each in (size + MEMORY_BYTES, *before) if each != resource.RLIM_INFINITY]
                        resource.setrlimit(resource.RLIMIT_DATA, (min(known), before[1]))
                    return action(*arguments, **options)
                finally:
                    if before:
                        resource.setrlimit(resource.RLIMIT_DATA, before)
                    with self.lock:  # an exception that was raised here and has not arrived would come later
                        if not self.under_way.pop(thread, None):
                            raise_in(thread, None)
            except (MemoryError, OutOfMemory):
                data_bytes.cache_clear()
            except OutOfTime:
                raise ConfigError(f"model.chat_template does not end within {SECONDS} seconds. {WAY_OUT}") from None
        raise ConfigError(f"model.chat_template writes more than memory holds. {WAY_OUT}")

    def watch(self) -> None:
        """Raises in every thread that is over a limit."""
        while True:
            sleep(SECONDS / 100)  # as it was imported: a program may have replaced time.sleep
            with self.lock:
                for thread, (start, size) in list(self.under_way.items()):
                    spent = processor_seconds(thread) - start
                    has_grown = spent > SECONDS / 50 and data_bytes(time.monotonic()) > size + MEMORY_BYTES
                    if spent > SECONDS or has_grown:
                        del self.under_way[thread]
                        raise_in(thread, OutOfMemory if has_grown else OutOfTime)


def raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raises an exception in a thread, before its next step in Python; None takes back one that has not arrived."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error and ctypes.py_object(error))


def processor_seconds(thread: int) -> float:
    """What a thread has taken of the processor; seconds of any kind where, as on macOS, no other thread is told."""
    clock_of = getattr(time, "pthread_getcpuclockid", lambda _: time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock_of(thread))


@lru_cache(maxsize=1)
def data_bytes(moment: float) -> int:
    """The bytes of the process's own memory, read anew at every `moment`, since reading takes longer than a rendering's
    limits do; 0 where the system does not say, as macOS."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except OSError:
        return 0


template_limits = TemplateLimits()
os.register_at_fork(after_in_child=template_limits.__init__)  # which has no other thread, and a lock that may be held


def render_within_limits(conversations: list, tools: list | None = None, **options: Any) -> tuple[list, list]:
    """What transformers' function of this kind gives; raises ConfigError for a template without an end or measure."""
    texts, spans = template_limits(render_jinja_template, conversations, tools, **options)
    longest = max(map(len, texts), default=0)
    if longest > LONG_TEXT and longest > GROWTH * len(repr((conversations, tools, options))):
        raise ConfigError(f"model.chat_template writes {longest:,} characters for a short conversation. {WAY_OUT}")
    return texts, spans


# The one place that all renderings pass: those of `apply_chat_template`, lm-eval's and TRL's among them
tokenization_utils_base.render_jinja_template = render_within_limits
chat_template_utils.ImmutableSandboxedEnvironment = LimitedEnvironment
