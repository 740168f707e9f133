"""Successive halving: every setting starts, at each rung the best go on from their checkpoints and the others stop."""

import math
import shutil
from collections.abc import Sequence
from typing import Annotated

from omegaconf import DictConfig

from sft_recipes.config.metrics import objective_direction
from sft_recipes.config.validation import check_interval, validate_kwargs
from sft_recipes.reporting.run_folder import read_json, write_json
from sft_recipes.reporting.sweep_report import SWEEP_FILE, read_jobs, sweep_objective
from sft_recipes.reporting.sweep_table import Group, fit_to_width, rank_groups, short_name, table_rows, within_noise
from sft_recipes.sweeps.job_folders import GridSweeper
from sft_recipes.sweeps.optuna_study import import_optuna

Percentile = Annotated[float, "(0, 100]"]


class HalvingSweeper(GridSweeper):
    """All combinations of a grid, of which few are trained to the end (Jamieson and Talwalkar 2016, arXiv 1502.07943).

    `rungs` are shares of a job's steps, on the learning rate's schedule of the whole run, and `percentile` those that
    go on. Started again, the sweep goes on at the rung that it had come to.
    """

    def __init__(self, rungs: list[float], percentile: Percentile, params: DictConfig | None = None):
        super().__init__(None, params)
        self.rungs, self.percentile = list(rungs), percentile

    def sweep(self, arguments: list[str]) -> None:
        import_optuna()  # whether it is there is known before the first job
        validate_kwargs(HalvingSweeper, {"rungs": self.rungs, "percentile": self.percentile}, "hydra.sweeper")
        for rung in self.rungs:
            check_interval("hydra.sweeper.rungs", rung, "(0, 1]")
        (grid,) = self.split_arguments(self.parse_overrides(arguments), None)
        folder = self.launcher.folder
        going = {self.launcher.find_folder(job, number)[0]: job for number, job in enumerate(grid)}
        stopped = {}
        for share in [*sorted(self.rungs), None]:
            limit = [f"trainer.stop_at={share}"] if share else []
            self.launcher.launch(
                [[*job, *limit] for job in going.values()], initial_job_idx=0
            )  # failed ones are reported
            jobs = [job for job in read_jobs(folder) if job.name in going]
            objective = sweep_objective(jobs)
            groups = [group for group in rank_groups(jobs, objective) if group.objective]
            if not share or not groups:
                break
            survivors = choose_survivors(groups, objective, self.percentile)
            print_rung(groups, survivors, objective, share)
            for group in groups:
                if group not in survivors:
                    stopped |= {job.name: stop_reason(group, groups[0], objective, share) for job in group.jobs}
            write_json(folder / SWEEP_FILE, read_json(folder / SWEEP_FILE) | {"stopped": stopped})
            names = {job.name for group in survivors for job in group.jobs if not job.reason}
            going = {name: job for name, job in going.items() if name in names}


def choose_survivors(groups: Sequence[Group], objective: str, percentile: float) -> list[Group]:
    """The ranked groups that Optuna's PercentilePruner leaves, and those that the seeds cannot tell from the best.

    Optuna's SuccessiveHalvingPruner decides by the trials that came before, so that the first one always goes on;
    here all of a rung are known.
    """
    optuna = import_optuna()
    pruner = optuna.pruners.PercentilePruner(percentile, n_startup_trials=0, n_warmup_steps=0)
    study = optuna.create_study(direction=objective_direction(objective), pruner=pruner)
    groups, left = [group for group in groups if math.isfinite(group.mean)], []
    for group in groups:
        study.add_trial(optuna.trial.create_trial(value=group.mean, intermediate_values={0: group.mean}))
    for group in groups:
        trial = study.ask()
        trial.report(group.mean, 0)
        if not trial.should_prune() or within_noise(group.objective, groups[0].objective):
            left.append(group)
    return left


def stop_reason(group: Group, best: Group, objective: str, share: float) -> str:
    """Why a setting was stopped."""
    noise = ", beyond the noise of the seeds" if min(len(group.objective), len(best.objective)) > 1 else ""
    values = f"{objective} {group.mean:.4f}, the best has {best.mean:.4f}"
    return f"stopped after {share:.0%} of its steps: {values}{noise}."


def print_rung(groups: Sequence[Group], survivors: Sequence[Group], objective: str, share: float) -> None:
    """Prints the table of a rung, what becomes of each setting in its first column."""
    rows = table_rows(groups, objective, short_name)
    verdicts = ["then", *("goes on" if group in survivors else "stops" for group in groups)]
    rows = [[verdict, *row] for verdict, row in zip(verdicts, rows, strict=True)]
    table = fit_to_width(rows, objective, shutil.get_terminal_size().columns)
    print(f"\nAfter {share:.0%} of the steps {len(survivors)} of {len(groups)} settings go on:\n")
    print("\n".join(table), end="\n\n")
