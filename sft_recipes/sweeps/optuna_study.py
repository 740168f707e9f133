"""A search by Optuna as Hydra's sweeper, on today's releases, whose study is continued from its storage."""

import logging
import os
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep, Transformer
from hydra.core.utils import JobReturn
from omegaconf import DictConfig

from sft_recipes.config.metrics import objective_direction
from sft_recipes.config.validation import Count, call_validated, validate_kwargs
from sft_recipes.errors import ConfigError, did_you_mean, one_line, plural
from sft_recipes.reporting.run_folder import read_json
from sft_recipes.reporting.sweep_report import SWEEP_FILE
from sft_recipes.sweeps.job_folders import GridSweeper

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

log = logging.getLogger(__name__)


class OptunaSweeper(GridSweeper):
    """Optuna chooses the values of `n_trials` jobs, `n_jobs` of them at a time, by the syntax of Hydra's own plugin.

    With a `storage` (`sqlite:///sweep.db`) the study outlives the process: `n_trials` counts those of every start, and
    trials that broke off are run first, with the values that they had; `study_name` keeps several apart in one storage.
    `sampler` is the name of one of optuna.samplers, and what it takes. Without a `direction` it is the objective's.
    """

    def __init__(
        self,
        sampler: Mapping[str, Any],
        n_trials: Count,
        n_jobs: Count,
        direction: Literal["minimize", "maximize"] | None = None,
        storage: str | None = None,
        study_name: str | None = None,
        params: DictConfig | None = None,
    ):
        super().__init__(None, params)
        self.sampler, self.n_trials, self.n_jobs, self.direction = sampler, n_trials, n_jobs, direction
        self.storage, self.study_name = storage, study_name

    def sweep(self, arguments: list[str]) -> None:
        optuna = import_optuna()
        given = {"sampler": dict(self.sampler), "n_trials": self.n_trials, "n_jobs": self.n_jobs}
        validate_kwargs(OptunaSweeper, given | {"direction": self.direction}, "hydra.sweeper")
        overrides = {override.get_key_element(): override for override in self.parse_overrides(arguments)}
        fixed = [
            f"{key}={one.get_value_element_as_str()}" for key, one in overrides.items() if not one.is_sweep_override()
        ]
        space = {key: value_range(optuna, one) for key, one in overrides.items() if one.is_sweep_override()}
        name = self.study_name or (self.storage and "sft_recipes")
        direction = self.direction or objective_direction(self.config.objective)
        try:
            study = optuna.create_study(storage=self.storage, study_name=name, direction=direction, load_if_exists=True)
        except Exception as error:  # of optuna, SQLAlchemy or the database's driver
            raise ConfigError(f"hydra.sweeper.storage={self.storage}: {one_line(error)}") from error
        check_same_kinds(optuna, study, space)
        before = len(study.trials)
        options = dict(self.sampler)
        if options.get("seed") is not None:
            options["seed"] += before  # or a study that is continued would try the same values again
        study.sampler = build_sampler(optuna, options)
        open_trials = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        log.info("Optuna looks for the best of %s, to %s the objective; %d done so far.",
                 plural(self.n_trials, "trial"), direction, before - len(open_trials))  # fmt: skip
        if before:
            self.launcher.jobs = read_json(self.launcher.folder / SWEEP_FILE).get("jobs", [])
        while open_trials or len(study.trials) < self.n_trials:
            batch, open_trials = open_trials[: self.n_jobs], open_trials[self.n_jobs :]
            for _ in range(min(self.n_jobs - len(batch), self.n_trials - len(study.trials))):
                batch.append(study.ask(space))
            jobs = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in batch]
            results = self.launcher.launch(jobs, initial_job_idx=batch[0].number)
            for trial, result in zip(batch, results, strict=True):
                value = objective_of(result)  # a job that failed is reported, and the others are run
                study.tell(trial.number, value, state=None if value is not None else optuna.trial.TrialState.FAIL)


def build_sampler(optuna: ModuleType, options: Mapping[str, Any]) -> Any:
    """The sampler of this `name` with the other options; raises ConfigError for what Optuna does not have."""
    names = [name for name in dir(optuna.samplers) if name.endswith("Sampler")]
    name, rest = str(options["name"]), {key: value for key, value in options.items() if key != "name"}
    if name not in names:
        raise ConfigError(f"hydra.sweeper.sampler.name={name} is no sampler of Optuna's.{did_you_mean(name, names)}")
    return call_validated(getattr(optuna.samplers, name), rest, "hydra.sweeper.sampler")


def check_same_kinds(optuna: ModuleType, study: "Study", space: Mapping[str, "BaseDistribution"]) -> None:
    """Raises ConfigError where the study has tried values of a key that it cannot compare with those asked for now."""
    tried = {key: kind for trial in study.trials for key, kind in trial.distributions.items() if key in space}
    for key, kind in tried.items():
        try:
            optuna.distributions.check_distribution_compatibility(kind, space[key])
        except ValueError as error:
            raise ConfigError(
                f"{key}={space[key]}: this study has tried {kind}. Another interval of the same kind goes on with it; "
                "else begin one with hydra.sweeper.study_name=NAME hydra.sweep.dir=DIR."
            ) from error


def value_range(optuna: ModuleType, override: Override) -> "BaseDistribution":
    """What Optuna chooses from: choice(…), range(1, 4), both ends included, or interval(1e-5, 1e-3)."""
    value, kinds = override.value(), optuna.distributions
    if isinstance(value, ChoiceSweep) or getattr(value, "shuffle", False):
        return kinds.CategoricalDistribution(list(override.sweep_iterator(transformer=Transformer.encode)))
    low, high = value.start, value.stop if isinstance(value, RangeSweep) else value.end
    step = {"step": value.step} if isinstance(value, RangeSweep) else {"log": "log" in value.tags}
    whole = all(isinstance(number, int) for number in (low, high, step.get("step", 1)))
    return (kinds.IntDistribution if whole else kinds.FloatDistribution)(low, high, **step)


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
