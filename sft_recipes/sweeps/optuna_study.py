"""A search by Optuna as Hydra's sweeper, on today's releases, whose study is continued from its storage."""

import logging
import os
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep, Transformer
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from sft_recipes.errors import ConfigError
from sft_recipes.reporting.run_folder import read_json
from sft_recipes.reporting.sweep_report import SWEEP_FILE
from sft_recipes.sweeps.job_folders import ResumingLauncher

if TYPE_CHECKING:
    from optuna.trial import Trial

log = logging.getLogger(__name__)


class OptunaSweeper(Sweeper):
    """Optuna chooses the values of `n_trials` jobs, `n_jobs` of them at a time, by the syntax of Hydra's own plugin.

    With a `storage` (`sqlite:///sweep.db`) the study outlives the process: `n_trials` counts those of every start, and
    trials that broke off are run first, with the values that they had. `sampler` is the name of one of
    optuna.samplers, and what it takes.
    """

    def __init__(
        self,
        sampler: Mapping[str, Any],
        direction: str,
        n_trials: int,
        n_jobs: int,
        max_failure_rate: float,
        storage: str | None = None,
        study_name: str | None = None,
        params: DictConfig | None = None,
    ):
        self.sampler, self.direction, self.n_trials, self.n_jobs = sampler, direction, n_trials, n_jobs
        self.max_failure_rate, self.storage, self.study_name = max_failure_rate, storage, study_name
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context = hydra_context
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.launcher = ResumingLauncher(launcher, hydra_context, config)

    def sweep(self, arguments: list[str]) -> None:
        optuna = import_optuna()
        typed = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parsed = OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(typed)
        overrides = {override.get_key_element(): override for override in parsed}  # what is typed comes last
        fixed = [
            f"{key}={one.get_value_element_as_str()}" for key, one in overrides.items() if not one.is_sweep_override()
        ]
        space = [override for override in overrides.values() if override.is_sweep_override()]
        name = self.study_name or (self.storage and "sft_recipes")
        study = optuna.create_study(
            storage=self.storage, study_name=name, direction=self.direction, load_if_exists=True
        )
        before = len(study.trials)
        options = dict(self.sampler)
        if options.get("seed") is not None:
            options["seed"] += before  # or a study that is continued would try the same values again
        study.sampler = getattr(optuna.samplers, options.pop("name"))(**options)
        open_trials = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        log.info("Optuna looks for the best of %d trials, to %s the objective; %d of them are done.",
                 self.n_trials, self.direction, before - len(open_trials))  # fmt: skip
        if before:
            self.launcher.jobs = read_json(self.launcher.folder / SWEEP_FILE).get("jobs", [])
        while open_trials or len(study.trials) < self.n_trials:
            batch, open_trials = open_trials[: self.n_jobs], open_trials[self.n_jobs :]
            for _ in range(min(self.n_jobs - len(batch), self.n_trials - len(study.trials))):
                trial = study.ask()
                for override in space:
                    suggest_value(trial, override)
                batch.append(trial)
            jobs = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in batch]
            results = self.launcher.launch(jobs, initial_job_idx=batch[0].number)
            values = [objective_of(result) for result in results]
            for trial, value in zip(batch, values, strict=True):
                study.tell(trial.number, value, state=None if value is not None else optuna.trial.TrialState.FAIL)
            if values.count(None) / len(values) > self.max_failure_rate:
                raise next(result._return_value for result, value in zip(results, values, strict=True) if value is None)


def suggest_value(trial: "Trial", override: Override) -> None:
    """Lets Optuna choose a value: of choice(…), of range(1, 4), both ends included, or of interval(1e-5, 1e-3)."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, ChoiceSweep) or getattr(value, "shuffle", False):
        trial.suggest_categorical(key, list(override.sweep_iterator(transformer=Transformer.encode)))
        return
    low, high = value.start, value.stop if isinstance(value, RangeSweep) else value.end
    step = {"step": value.step} if isinstance(value, RangeSweep) else {"log": "log" in value.tags}
    whole = all(isinstance(number, int) for number in (low, high, step.get("step", 1)))
    (trial.suggest_int if whole else trial.suggest_float)(key, low, high, **step)


def import_optuna() -> ModuleType:
    """Optuna, which is an extra; raises ConfigError where it is not installed, or would choose in several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("Under torchrun a sweep is a grid. Or start a search without it: hydra/launcher=local_gpus.")
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("This sweep needs Optuna. Try pip install 'sft-recipes[sweep]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # we log what it does
    return optuna


def objective_of(result: JobReturn) -> float | None:
    """A job's objective, None where it failed, which has been logged, or where it is not a number."""
    try:
        value = float(result.return_value)
        return None if value != value else value
    except Exception:
        return None
