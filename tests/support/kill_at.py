"""A user's callback that kills its own run where STOP_AT says: `FUNCTION:CALL:WHEN`.

CALL is a number, or how an argument of the call ends: `torch.save:2:before` is before the second call of torch.save,
`torch.save:checkpoint-8/optimizer.pt:within` when that file has its first hundred bytes. With `STOP_WITH=SIGTERM` it sends
that signal, or several, instead of SIGKILL. WHEN may also be `full`, for a disk that is said to be, and `fill`, which fills
it with a file FILLER.
"""

import contextlib
import errno
import os
import resource
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

WITHIN = 100  # bytes


class KillAt(TrainerCallback):
    def __init__(self):
        if not (point := os.environ.get("STOP_AT")):
            return
        where, self.wanted, self.when = point.split(":")
        module, _, name = where.rpartition(".")
        owner = Path if module == "Path" else find_owner(module)
        self.real, self.calls, self.reached = getattr(owner, name), 0, False
        setattr(owner, name, lambda *arguments, **options: self.call(*arguments, **options))

    def call(self, *arguments: Any, **options: Any) -> Any:
        if self.reached or not self.is_wanted([*arguments, *options.values()]):
            return self.real(*arguments, **options)
        self.reached = True
        if self.when == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.when == "fill":
            fill_disk(Path(os.environ["FILLER"]))
        if self.when == "before":
            stop()
        if self.when == "within":
            die_within_file()
        result = self.real(*arguments, **options)
        if self.when == "after":
            stop()
        return result

    def is_wanted(self, given: list[Any]) -> bool:
        self.calls += 1
        if self.wanted.isdigit():
            return self.calls == int(self.wanted)
        return any(str(value).endswith(self.wanted) for value in given if isinstance(value, (str, Path)))


def find_owner(name: str):
    """A module, or a class in one."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        module, _, owner = name.rpartition(".")
        return getattr(import_module(module), owner)


def stop() -> None:
    for name in os.environ.get("STOP_WITH", "SIGKILL").split(","):
        os.kill(os.getpid(), signal.Signals[name])


def die_within_file() -> None:
    """Lets the system kill this process, at once and for good, when it writes behind the first bytes of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WITHIN, WITHIN))


def fill_disk(path: Path) -> None:
    """Writes to the file until no byte is left on its disk."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
