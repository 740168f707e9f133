"""A user's callback that kills its own run: `STOP_AT=torch.save:2:before` at the second call of torch.save, before it.

With `STOP_WITH=SIGTERM` it sends that signal instead of SIGKILL; `STOP_AT=torch.save:2:full` says that the disk is full
there, and `STOP_AT=torch.save:2:fill` fills it with a file FILLER.
"""

import contextlib
import errno
import os
import signal
from importlib import import_module
from pathlib import Path

from transformers import TrainerCallback


class KillAt(TrainerCallback):
    def __init__(self):
        if not (point := os.environ.get("STOP_AT")):
            return
        where, number, when = point.split(":")
        module, _, name = where.rpartition(".")
        owner = Path if module == "Path" else find_owner(module)
        self.real, self.left, self.when = getattr(owner, name), int(number), when
        setattr(owner, name, lambda *arguments, **options: self.call(*arguments, **options))

    def call(self, *arguments, **options):
        self.left -= 1
        if self.left == 0 and self.when == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.left == 0 and self.when == "fill":
            fill_disk(Path(os.environ["FILLER"]))
        if self.left == 0 and self.when == "before":
            os.kill(os.getpid(), signal.Signals[os.environ.get("STOP_WITH", "SIGKILL")])
        result = self.real(*arguments, **options)
        if self.left == 0 and self.when == "after":
            os.kill(os.getpid(), signal.Signals[os.environ.get("STOP_WITH", "SIGKILL")])
        return result


def find_owner(name: str):
    """A module, or a class in one."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        module, _, owner = name.rpartition(".")
        return getattr(import_module(module), owner)


def fill_disk(path: Path) -> None:
    """Writes to the file until no byte is left on its disk."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
