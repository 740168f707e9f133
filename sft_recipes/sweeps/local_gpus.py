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
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from omegaconf import OmegaConf

from sft_recipes.config.hydra_errors import USER_ERRORS
from sft_recipes.config.validation import Count, validate_kwargs
from sft_recipes.errors import RunInterrupted
from sft_recipes.sweeps.job_folders import result_in_folder

log = logging.getLogger(__name__)
# A job's exit code after Ctrl-C and SIGTERM, before and while it trains, and the sweep's
STOPPED = {-signal.SIGINT: 130, 130: 130, -signal.SIGTERM: 143, 143: 143}


class LocalGpus(BasicLauncher):
    """Every job is a process of its own, since CUDA_VISIBLE_DEVICES is read once in a process.

    `n_jobs` run at once: one for each GPU that is visible here; on a CPU two, which share its threads.
    """

    def __init__(self, n_jobs: Count | None = None):
        super().__init__()
        self.n_jobs, self.processes = n_jobs, set()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """The jobs' results in order; SIGTERM is passed on to them, so that they leave a checkpoint."""
        validate_kwargs(LocalGpus, {"n_jobs": self.n_jobs}, "hydra.launcher")
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
        job = pack_job(self, number, overrides)
        process = multiprocessing.get_context("spawn").Process(target=run_job_here, args=(environment, job))
        process.start()
        self.processes.add(process)
        process.join()
        self.processes.discard(process)
        if process.exitcode in STOPPED:
            raise RunInterrupted("A job was stopped.", STOPPED[process.exitcode])
        killed = ", killed" if process.exitcode == -signal.SIGKILL else ""
        died = f"its process ended with code {process.exitcode}{killed}." if process.exitcode not in (0, 2) else ""
        return result_in_folder(job["folder"], job["composed"], overrides, died)


def pack_job(launcher: BasicLauncher, number: int, overrides: Sequence[str]) -> dict[str, Any]:
    """What another process needs to run a job: its config, as Hydra's own launcher composes it, and Hydra's state."""
    log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
    composed = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, list(overrides))
    OmegaConf.update(composed, "hydra.job", {"id": number, "num": number}, force_add=True)
    folder = Path(composed.hydra.sweep.dir, str(composed.hydra.sweep.subdir)).absolute()
    task = launcher.task_function  # found by its name in the other process, in which __main__ has another one
    names = sys.modules[task.__module__].__spec__.name, task.__qualname__
    state = Singleton.get_state()["instances"]  # without the resolvers, which cannot be sent
    return {"task": names, "state": state, "context": launcher.hydra_context, "composed": composed, "folder": folder}


def run_packed_job(job: Mapping[str, Any]) -> JobReturn:
    """Runs a job in this process, which another one has started."""
    task = getattr(import_module(job["task"][0]), job["task"][1])  # which registers our resolvers
    setup_globals()
    Singleton.set_state(Singleton.get_state() | {"instances": job["state"]})
    return run_job(task, job["composed"], "hydra.sweep.dir", "hydra.sweep.subdir", job["context"])


def run_job_here(environment: Mapping[str, str], job: Mapping[str, Any]) -> None:
    """Runs one job in this process, a child's, with these variables, and ends it with the exit code of such a run."""
    os.environ |= environment  # before torch is imported
    try:
        result = run_packed_job(job)
    except KeyboardInterrupt as stop:
        sys.exit(getattr(stop, "code", 130))
    if result.status == JobStatus.FAILED:
        sys.exit(2 if isinstance(result._return_value, USER_ERRORS) else 1)


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
