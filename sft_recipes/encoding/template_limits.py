"""A chat template that somebody else wrote, tried in a process of its own, where its time and memory have an end."""

import resource
import warnings
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
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
    child = get_context("fork").Process(target=do_within_memory, args=(action,), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: the copy uses no other thread's locks
        child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        return f"does not end within {SECONDS} seconds"
    return "writes more than memory holds" if child.exitcode else ""


def do_within_memory(action: Callable[[], object]) -> None:
    """Does it with so much memory beside what this process has, or ends the process."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        action()
    except BaseException:
        raise SystemExit(1) from None
