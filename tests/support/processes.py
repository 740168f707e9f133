"""Commands in processes of their own, which a fork server makes: of the 9 s of a short run 7 are Python's imports.

A child does what `python -m sft_recipes` would: it runs `__main__` from its file, in the folder and with the arguments,
environment, streams and signal handlers that a fresh interpreter would have. It is a fresh interpreter where its environment has
what may be read before that, as PYTHONHASHSEED is.
"""

import atexit
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing import forkserver, get_context, resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy

from support.paths import ROOT

AT_START = dict(os.environ)
RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
READ_LATE = RANKS | {"PYTHONPATH", "CUDA_VISIBLE_DEVICES", "SFT_RECIPES_CACHE", "STOP_AT", "STOP_WITH", "FILLER"}
SERVER = AT_START | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    "OMP_WAIT_POLICY": AT_START.get("OMP_WAIT_POLICY", "PASSIVE"),  # as main() has it before it imports torch
    "HF_HUB_DISABLE_TELEMETRY": AT_START.get("HF_HUB_DISABLE_TELEMETRY", "1"),
}
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["support.preloaded"])


class Command:
    """`python -m sft_recipes` with these arguments, or a script, started in the folder `where` and not waited for.

    Its environment is the one that the tests were started in, with what is given.
    """

    def __init__(self, where: Path, *arguments: str, script: Path | str = "", **environment: str):
        self.arguments, self.files = arguments, TemporaryDirectory()
        self.out, self.err = (Path(self.files.name, name) for name in ("stdout", "stderr"))
        wanted = AT_START | environment
        if environment.keys() - READ_LATE:
            command = [sys.executable, *([script] if script else ["-m", "sft_recipes"]), *arguments]
            with self.out.open("wb") as out, self.err.open("wb") as err:
                self.process = subprocess.Popen(command, cwd=where, env=wanted, stdout=out, stderr=err)
        else:
            start_server()
            self.out.touch()
            self.err.touch()
            given = (str(where), wanted, [os.devnull, str(self.out), str(self.err)], str(script), arguments)
            self.process = FORKS.Process(target=run_as_main, args=given)
            self.process.start()
        self.pid = self.process.pid

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        if self.exit_code() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def exit_code(self) -> int | None:
        """Negative for a signal, None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def wait_for(self, text: str) -> None:
        """Waits until the command has written this to stderr."""
        while text not in self.err.read_text(encoding="utf-8"):
            assert self.exit_code() is None, self.err.read_text(encoding="utf-8")
            time.sleep(0.01)

    def wait(self) -> subprocess.CompletedProcess:
        """Its exit code, and what it has written."""
        self.process.wait() if isinstance(self.process, subprocess.Popen) else self.process.join()
        written = [path.read_text(encoding="utf-8") for path in (self.out, self.err)]
        return subprocess.CompletedProcess(self.arguments, self.exit_code(), *written)


def start_server() -> None:
    """Starts this process's fork server, unless it runs."""
    now = dict(os.environ)
    os.environ.clear()
    os.environ.update(SERVER)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(now)


def run_as_main(
    where: str, environment: Mapping[str, str], streams: list[str], script: str, arguments: tuple[str, ...]
) -> None:
    """What a child of the fork server does: it becomes `python -m sft_recipes`, or that script."""
    from support import preloaded

    os.chdir(where)
    os.environ.clear()
    os.environ.update(preloaded.SET_BY_IMPORTS | environment)
    for number, path in enumerate(streams):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    named = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [*named, *preloaded.PATHS, where]
    sys.argv[:] = [script or sys.argv[0], *arguments]
    numpy.random.seed()  # Python's own generator takes a new seed in every child
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None  # it starts one of its own
    try:
        if script:
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module("sft_recipes", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which a child of multiprocessing leaves out


def run_ranks(
    where: Path, *arguments: str, script: Path | str = "", **environment: str
) -> list[subprocess.CompletedProcess]:
    """The command, or a script, in two processes that know of each other as torchrun would have it."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port that no other process of this machine has
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | environment
    ranks = [Command(where, *arguments, script=script, RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"]
    return [rank.wait() for rank in ranks]
