"""Jobs whose processes Ray Train starts, on this machine or a cluster: `python -m sft_recipes -m … +where=ray`."""

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn

from sft_recipes.config.hydra_errors import USER_ERRORS
from sft_recipes.config.validation import call_validated
from sft_recipes.errors import ConfigError, one_line
from sft_recipes.sweeps.job_folders import result_in_folder
from sft_recipes.sweeps.local_gpus import pack_job, run_packed_job


class RayTrain(BasicLauncher):
    """Every job is a `ray.train.torch.TorchTrainer`, whose workers get the job's composed config.

    `scaling` and `failure` are the fields of Ray's ScalingConfig and FailureConfig. Where a worker dies, as its node is
    taken back, Ray starts the job's workers anew, and they go on from its newest checkpoint. `n_jobs` jobs run at once,
    as soon as the cluster has room for them.
    """

    def __init__(self, scaling: Mapping[str, Any], failure: Mapping[str, Any], n_jobs: int = 1):
        super().__init__()
        self.scaling, self.failure, self.n_jobs = scaling, failure, n_jobs
        self.interrupted = False

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """The jobs' results in order; raises ConfigError without Ray, and for a field that is not Ray's."""
        try:
            import ray.train
        except ImportError as error:
            raise ConfigError("+where=ray needs Ray Train. Try pip install 'sft-recipes[ray]'.") from error
        scaling = call_validated(ray.train.ScalingConfig, self.scaling, "hydra.launcher.scaling")
        failure = call_validated(ray.train.FailureConfig, self.failure, "hydra.launcher.failure")
        pool, run = ThreadPoolExecutor(self.n_jobs), partial(self.run_workers, scaling, failure)
        try:
            return list(pool.map(run, count(initial_job_idx), job_overrides))
        except BaseException:  # Ctrl-C, too
            self.interrupted = True
            pool.shutdown(wait=False, cancel_futures=True)
            ray.shutdown()  # ends the workers, and the threads that wait for them
            raise
        finally:
            pool.shutdown()

    def run_workers(self, scaling: Any, failure: Any, number: int, overrides: Sequence[str]) -> JobReturn:
        """One job's result, by what its workers have left in its folder."""
        from ray.exceptions import RayError
        from ray.train import RunConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer

        job, died = pack_job(self, number, overrides) | {"cwd": os.getcwd()}, ""
        folder = job["folder"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").unlink(missing_ok=True)
        run = RunConfig(name="ray", storage_path=str(folder / ".hydra"), failure_config=failure)
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # or what dill prints to itself is logged
        try:
            TorchTrainer(run_in_worker, train_loop_config=job, scaling_config=scaling, run_config=run).fit()
        except (TrainingFailedError, RayError) as error:  # the second where Ray's own process was killed
            if self.interrupted:
                raise
            died = one_line(error)
        return result_in_folder(folder, job["composed"], overrides, died)


def run_in_worker(job: Mapping[str, Any]) -> None:
    """Runs the job in this process, one of Ray's, which has told torch of the others.

    A mistake of the user's stays in error.txt, and the workers that Ray then starts anew leave at once.
    """
    failure = Path(job["folder"], "error.txt")
    if failure.is_file():
        return
    os.chdir(job["cwd"])  # Ray has one of its own, and a config's paths are relative
    sys.path.append(job["cwd"])
    result = run_packed_job(job)
    if not isinstance(result._return_value, USER_ERRORS):  # what the job raised, where it failed
        failure.unlink(missing_ok=True)
    result.return_value  # noqa: B018 - raises it
