"""Which folder each job of a sweep has: what has finished is not run again, what broke off goes on where it was."""

import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft_recipes.config.run_folder import holds_run, quote_value, remove_with_parents
from sft_recipes.config.schema import from_hydra
from sft_recipes.config.validation import validate_kwargs
from sft_recipes.errors import ConfigError, plural
from sft_recipes.reporting.run_folder import read_json, replace_file, write_json
from sft_recipes.reporting.sweep_report import COMMAND_FILE, SWEEP_FILE, objective_value

log = logging.getLogger(__name__)
# What two starts of one job may differ in: how far it goes, and what is done with what was there
NOT_OF_THE_JOB = ("overwrite", "trainer.resume_from_checkpoint", "trainer.stop_at")


class ResumingLauncher:
    """Gives the jobs that have not finished to `launcher`, each in its own folder, and the others' results back.

    A job is known by its composed config, so that the same command, or one with more values, goes on with a sweep.
    """

    def __init__(self, launcher: Launcher, context: HydraContext, config: DictConfig):
        self.launcher, self.context, self.config = launcher, context, config
        self.folder = Path(config.hydra.sweep.dir)
        self.known = {  # the folders that have been used, by their jobs
            job_identity(OmegaConf.load(file)): str(file.parents[1].relative_to(self.folder))
            for file in sorted(self.folder.glob("**/.hydra/config.yaml"))
        }
        self.jobs: list[str] = []  # the folders of this sweep's jobs

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """The jobs' results in order; raises ConfigError where two of them would share a folder."""
        results: dict[int, JobReturn] = {}
        open_jobs: dict[int, list[str]] = {}
        places = [self.find_folder(each, initial_job_idx + number) for number, each in enumerate(job_overrides)]
        try:
            if not initial_job_idx and len(job_overrides) > 1:  # Optuna's come one by one
                check_shared_mistake(composed for _, composed in places)
        except ConfigError:
            if {path.name for path in self.folder.iterdir()} <= {"multirun.yaml", COMMAND_FILE}:
                remove_with_parents(self.folder.absolute())
            raise
        for place, (overrides, (name, composed)) in enumerate(zip(job_overrides, places, strict=True)):
            result = finished_result(self.folder / name, composed, overrides)
            if result:
                results[place] = result
            else:
                open_jobs[place] = [*overrides, f"hydra.sweep.subdir={quote_value(name)}"]
            self.jobs = list(dict.fromkeys([*self.jobs, name]))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SWEEP_FILE, read_json(self.folder / SWEEP_FILE) | {"jobs": self.jobs})
        if results:
            log.info("%d of %s finished earlier, not run again.", len(results), plural(len(job_overrides), "job"))
        if open_jobs:
            if type(self.launcher).__name__ == "SlurmLauncher" and not shutil.which("srun"):
                raise ConfigError("Slurm's srun is not here. Start this on a machine of the cluster.")
            launched = self.launcher.launch(list(open_jobs.values()), initial_job_idx=initial_job_idx)
            results |= dict(zip(open_jobs, launched, strict=True))
        return [results[place] for place in sorted(results)]

    def find_folder(self, overrides: Sequence[str], number: int) -> tuple[str, DictConfig]:
        """The folder of the job with these overrides, within the sweep's, and its config; a new one gets `number`."""
        composed = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        identity, taken, before = job_identity(composed), set(self.known.values()), None
        while identity not in self.known:
            OmegaConf.update(composed, "hydra.job.num", number, force_add=True)
            name = str(OmegaConf.select(composed, "hydra.sweep.subdir"))
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ConfigError(f"hydra.sweep.subdir={name} should be a folder within hydra.sweep.dir.")
            if name not in taken and not holds_run(self.folder / name):
                self.known[identity] = name
            elif name == before:
                raise ConfigError(
                    f"hydra.sweep.subdir gives two jobs one folder, {name}. Add _${{hydra.job.num}} to it."
                )
            before, number = name, number + 1
        return self.known[identity], composed


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper, whose sweeps can be resumed: `-m … hydra.sweep.dir=THE_SWEEP`."""

    def setup(self, *, hydra_context: HydraContext, config: DictConfig, **rest: Any) -> None:
        super().setup(hydra_context=hydra_context, config=config, **rest)
        self.launcher = ResumingLauncher(self.launcher, hydra_context, config)

    def parse_overrides(self, arguments: Sequence[str]) -> list[Override]:
        """The sweep's own overrides and those that are typed, which come last."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        return parser.parse_overrides([*self._parse_config(), *arguments])


def check_shared_mistake(jobs: Iterable[DictConfig]) -> None:
    """Raises the ConfigError of a sweep whose every job would be refused for its config, as with a mistyped key."""
    from trl import SFTConfig  # takes seconds, and Hydra imports this file for every command

    from sft_recipes.modeling.adapters import build_peft_config

    refused, before = None, logging.root.manager.disable
    logging.disable(logging.WARNING)  # each job says its own
    try:
        for composed in jobs:
            try:
                config = from_hydra(OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"]))
                validate_kwargs(SFTConfig, config.trainer.fields, "trainer")
                build_peft_config(config.adapter)
                return
            except ConfigError as error:
                refused = refused or error
            except OmegaConfBaseException:  # what only the job itself can resolve
                return
    finally:
        logging.disable(before)
    if refused:
        raise refused


def job_identity(composed: DictConfig) -> str:
    """A job's config as text, without what two starts of it may differ in, nor Hydra's own."""
    values = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(composed)))  # as read from the job's folder
    values.pop("hydra", None)
    for group, _, key in (path.rpartition(".") for path in NOT_OF_THE_JOB):
        (values.get(group) or {} if group else values).pop(key, None)
    return OmegaConf.to_yaml(values, sort_keys=True)


def finished_result(folder: Path, composed: DictConfig, overrides: Iterable[str]) -> JobReturn | None:
    """What a job returned that has finished, or come as far as `trainer.stop_at`; None for one that is to be run."""
    metrics = {} if (folder / "error.txt").is_file() else read_json(folder / "metrics.json")
    wanted = OmegaConf.select(composed, "trainer.stop_at") or 1
    if not metrics or metrics.get("stopped_at", 1) < wanted:
        return None
    return result_in_folder(folder, composed, overrides)


def result_in_folder(folder: Path, composed: DictConfig, overrides: Iterable[str], died: str = "") -> JobReturn:
    """What a job returned, by what it left in its folder: its objective in metrics.json, or its mistake in error.txt.

    `died` is how its process ended where that was no end of its own, and stands in error.txt if nothing does.
    """
    failure, result = folder / "error.txt", JobReturn(overrides=list(overrides), cfg=composed)
    if died and not failure.is_file():
        log.error("Job %s: %s", folder.name, died)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(failure, died + "\n")
    if failure.is_file():
        error = (RuntimeError if died else ConfigError)(failure.read_text(encoding="utf-8").strip())
        error.logged = True  # or the command would say it again
        result.status, result.return_value = JobStatus.FAILED, error
    else:
        metrics = read_json(folder / "metrics.json")
        result.status, result.return_value = JobStatus.COMPLETED, objective_value(metrics, composed.get("objective"))
    return result
