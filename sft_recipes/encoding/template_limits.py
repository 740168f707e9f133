"""A chat template that somebody else wrote, tried in a process of its own, where its time and memory have an end."""

import os
import resource
import signal
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

from sft_recipes.errors import ConfigError

SECONDS, MEMORY_BYTES, CHARACTERS = 10, 1 << 30, 1 << 24  # of all trials together; the longest text of one
HELLO = [{"role": "user", "content": "Hello!"}]
TALK = [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": "Hello."}] + 2 * HELLO


@cache
def check_template_ends(template: str) -> None:
    """Raises ConfigError for a template that does not end, or fills the memory, on a few short conversations.

    Rendering cannot be stopped within a process, and a limit for each row would take longer than the rows. What the
    template writes or refuses is for others to look at.
    """
    fault = find_excess(lambda: [render(template, messages) for messages in (HELLO, TALK[:3], TALK, 20 * HELLO)])
    if fault:
        raise ConfigError(f"model.chat_template {fault} on a conversation of a few words. Take another template.")


def render(template: str, messages: list[dict[str, str]]) -> None:
    """Renders the template; raises MemoryError for a text that is too long, and passes over what it refuses."""
    try:
        texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
    except MemoryError:
        raise
    except Exception:  # a template may refuse a system message
        return
    if len(texts[0]) > CHARACTERS:
        raise MemoryError


def find_excess(action: Callable[[], object]) -> str:
    """What an action takes too much of, in words; it is done in a copy of this process, which leaves nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: the copy uses no other thread's locks
        child = os.fork()  # not multiprocessing, which refuses in its own workers, where a run may be loaded, too
    if not child:
        try:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    end = time.monotonic() + SECONDS
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"does not end within {SECONDS} seconds"
        time.sleep(0.002)
    return "writes more than memory holds" if found[1] else ""
