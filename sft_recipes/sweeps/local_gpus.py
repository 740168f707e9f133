"""As many jobs at once as there are GPUs, a process and a GPU for each: `-m … hydra/launcher=local_gpus`."""

import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf

from sft_recipes.errors import RunInterrupted
from sft_recipes.reporting.run_folder import replace_file

log = logging.getLogger(__name__)
# A job's exit code after Ctrl-C and SIGTERM, before and while it trains, and the sweep's
STOPPED = {-signal.SIGINT: 130, 130: 130, -signal.SIGTERM: 143, 143: 143}


class LocalGpus(BasicLauncher):
    """Every job is a process of its own, since CUDA_VISIBLE_DEVICES is read once in a process.

    `n_jobs` run at once: one for each GPU that is visible here; on a CPU two, which share its threads.
    """

    def __init__(self, n_jobs: int | None = None):
        super().__init__()
        self.n_jobs, self.processes = n_jobs, set()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """The jobs' results in order; SIGTERM is passed on to them, so that they leave a checkpoint."""
        free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        slots = job_environments(self.n_jobs)
        for environment in slots:
            free.put(environment)

        def run(number: int, overrides: Sequence[str]) -> JobReturn:
            environment = free.get()
            try:
                return self.run_process(environment, number, overrides)
            except RunInterrupted:
                pool.shutdown(wait=False, cancel_futures=True)  # or this thread would start the next job
                raise
            finally:
                free.put(environment)

        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, lambda *_: [one.terminate() for one in self.processes]) if main else None
        pool = ThreadPoolExecutor(len(slots))
        try:
            return list(pool.map(run, range(initial_job_idx, initial_job_idx + len(job_overrides)), job_overrides))
        finally:
            pool.shutdown(cancel_futures=True)
            if main:
                signal.signal(signal.SIGTERM, before)

    def run_process(self, environment: Mapping[str, str], number: int, overrides: Sequence[str]) -> JobReturn:
        """One job's result; a process that was killed is a job that failed."""
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        task = function_name(self.task_function)
        state = Singleton.get_state()["instances"]  # without the resolvers, which cannot be sent
        rest = task, state, self.hydra_context, self.config, number, list(overrides)
        process = context.Process(target=run_job_here, args=(sender, environment, *rest))
        process.start()
        self.processes.add(process)
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:
            result = None
        process.join()
        self.processes.discard(process)
        if process.exitcode in STOPPED:
            raise RunInterrupted("A job was stopped.", STOPPED[process.exitcode])
        if result:
            return result
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        OmegaConf.update(composed, "hydra.job.num", number, force_add=True)
        killed = ", killed" if process.exitcode == -signal.SIGKILL else ""
        return failed_result(composed, overrides, f"its process ended with code {process.exitcode}{killed}.")


def failed_result(composed: DictConfig, overrides: Sequence[str], reason: str) -> JobReturn:
    """The result of a job whose processes have left none, with its error.txt."""
    folder = Path(composed.hydra.sweep.dir, str(composed.hydra.sweep.subdir))
    if folder.is_dir() and not (folder / "error.txt").is_file():
        replace_file(folder / "error.txt", reason + "\n")
    result = JobReturn(overrides=list(overrides), cfg=composed, status=JobStatus.FAILED)
    log.error("Job %s: %s", folder.name, reason)
    error = RuntimeError(reason)
    error.logged = True  # or the command would say it again
    result.return_value = error
    return result


def job_environments(n_jobs: int | None) -> list[dict[str, str]]:
    """The variables of each job that runs at once: its GPU, where there is one, and its share of the CPU's threads."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch

        gpus = [str(number) for number in range(torch.cuda.device_count())]
    else:
        gpus = [name.strip() for name in named.split(",") if name.strip()]
    count = n_jobs or len(gpus) or 2
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // count))
    devices = [{"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {} for place in range(count)]
    return [device | {"OMP_NUM_THREADS": threads} for device in devices]


def function_name(task: TaskFunction) -> tuple[str, str]:
    """The module and name of a function, by which another process finds it; __main__ has another name there."""
    return sys.modules[task.__module__].__spec__.name, task.__qualname__


def enter_job(task: tuple[str, str], state: Mapping[type, Any]) -> TaskFunction:
    """The function of this name, in a process to which Hydra's state has been sent."""
    function = getattr(import_module(task[0]), task[1])  # which registers our resolvers
    setup_globals()
    Singleton.set_state(Singleton.get_state() | {"instances": state})
    return function


def run_job_here(
    sender: Connection, environment: Mapping[str, str], task: tuple[str, str], state: Any, context: Any, config: Any,
    number: int, overrides: list[str],
) -> None:  # fmt: skip
    """Runs one job in this process, a child's, and sends its result."""
    os.environ |= environment  # before torch is imported
    launcher = BasicLauncher()
    launcher.setup(hydra_context=context, task_function=enter_job(task, state), config=config)
    try:
        sender.send(launcher.launch([overrides], number)[0])
    except KeyboardInterrupt as stop:
        sys.exit(getattr(stop, "code", 130))
