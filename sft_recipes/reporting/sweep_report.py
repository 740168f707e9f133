"""A sweep's folder as one table and its figures: `python -m sft_recipes.report multirun/lima/<date>`."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from sft_recipes.config.command_line import rerun_command
from sft_recipes.config.metrics import METRICS, objective_direction
from sft_recipes.config.nested_values import get_path
from sft_recipes.errors import is_first_process, plural
from sft_recipes.reporting.document import Picture, save_pictures, write_pages
from sft_recipes.reporting.figures import has_curve
from sft_recipes.reporting.run_folder import read_json, read_yaml, replace_file
from sft_recipes.reporting.sweep_figures import plot_curves, plot_front, plot_grid
from sft_recipes.reporting.sweep_table import (
    UNFINISHED,
    Group,
    Job,
    fit_to_width,
    pareto_front,
    rank_groups,
    short_name,
    table_rows,
    tidy_value,
    within_noise,
)

COMMAND_FILE = "command.txt"  # what was typed to start the sweep
SWEEP_FILE = "sweep.json"  # lists the folders of the sweep's jobs, within its own
started_sweeps: list[Path] = []  # the folder of the sweep that this process has started


class RememberSweepFolder(Callback):
    """Tells `finish_sweep` which folder Hydra's sweep has, and keeps the command there; called before the first job."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not is_first_process():
            return
        started_sweeps.append(folder := Path(config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / COMMAND_FILE, rerun_command(config.hydra, sweep=True) + "\n")


def finish_sweep() -> int:
    """Reports the sweep that this process has started, if a job of it trained or failed; the number that failed."""
    folder = started_sweeps.pop() if started_sweeps else None
    found = read_jobs(folder) if folder and folder.is_dir() else []
    if any(job.metrics or job.reason != UNFINISHED for job in found):
        print(f"\n{write_sweep_report(folder)}")
    return sum(job.reason not in ("", UNFINISHED) for job in found)


def is_sweep(folder: Path) -> bool:
    """Whether the folder holds the folders of a sweep's jobs, and is no run itself."""
    return not (folder / "metrics.json").exists() and bool(read_jobs(folder))


def write_sweep_report(folder: Path) -> str:
    """Writes report.md, report.html and their figures from the jobs' files; gives back the table for the terminal.

    Raises ConfigError for a job's file that cannot be read.
    """
    jobs = read_jobs(folder)
    objective = sweep_objective(jobs)
    groups = rank_groups(jobs, objective)
    groups.sort(key=lambda group: -min(job.metrics.get("stopped_at", 1) for job in group.jobs))  # the furthest first
    finished = [group for group in groups if not any("stopped_at" in job.metrics for job in group.jobs)]
    front = pareto_front(finished, objective)
    pictures = {"curves": None, "grid": None, "pareto": None}
    if any(has_curve(job.metrics.get("history") or []) for job in jobs):
        pictures["curves"] = Picture(plot_curves(groups), "loss.png", "The loss of every job over the steps.")
    if figure := plot_grid(groups, objective, objective_direction(objective) == "minimize"):
        pictures["grid"] = Picture(figure, "grid.png", f"{objective} by {' and '.join(groups[0].settings)}.")
    if len(front) > 1:
        figure = plot_front(groups, front, objective)
        pictures["pareto"] = Picture(figure, "pareto.png", f"{objective} against forgetting, by job.")
    summary, command = summary_line(folder, jobs, objective), folder / COMMAND_FILE
    seeds = any(len(group.jobs) > 1 for group in groups)
    keys, failed = [*groups[0].settings, *["seed"] * seeds], []  # what the jobs do not share
    for job in jobs:
        if why := job.reason or job.stopped:
            shown = [f"{short_name(key)} {tidy_value(job.settings[key])}" for key in keys if key in job.settings]
            failed.append(f"job {job.name} ({', '.join(shown) or 'alone'}): {why}")
    values = {
        "summary": summary,
        "command": command.read_text(encoding="utf-8") if command.is_file() else "",
        "rows": [[cell.replace(" ± ", "\u00a0±\u00a0") for cell in row] for row in table_rows(groups, objective, str)],
        "seeds": seeds,
        "unfinished": failed,
        "chosen": choice_lines(finished or groups, front, objective),
    }
    save_pictures(folder, [picture for picture in pictures.values() if picture])
    title = f"Sweep: {folder.resolve().parent.name} · {folder.resolve().name}"
    write_pages(folder, "sweep.jinja", title, **values, **pictures)
    table = fit_to_width(table_rows(groups, objective, short_name), objective, shutil.get_terminal_size().columns)
    return "\n".join([summary, "", *table, "", *failed, *values["chosen"], f"All of it: {folder}/report.html"])


def read_jobs(folder: Path) -> list[Job]:
    """The sweep's jobs, each from its own files; without the sweep's list those in the folder's numbered folders."""
    paths = [folder / name for name in read_json(folder / SWEEP_FILE).get("jobs", [])]
    if not paths:
        numbered = (path.parents[1] for path in folder.glob("*/.hydra/overrides.yaml"))
        paths = sorted((path for path in numbered if path.name.isdigit()), key=lambda path: int(path.name))
    return [read_job(path, folder) for path in paths if (path / ".hydra" / "overrides.yaml").is_file()]


def read_job(path: Path, sweep: Path) -> Job:
    """One job of a sweep: error.txt says why it failed, and without metrics.json it was interrupted."""
    overrides = read_yaml(path / ".hydra" / "overrides.yaml") or []
    settings = {key: value for key, _, value in (str(override).partition("=") for override in overrides)}
    settings.pop("trainer.stop_at", None)  # how far, not what
    metrics, reason, failure = read_json(path / "metrics.json"), "", path / "error.txt"
    if failure.is_file():
        metrics, reason = {}, failure.read_text(encoding="utf-8", errors="replace").strip()
    elif not metrics:
        reason = UNFINISHED
    objective = get_path(read_yaml(path / ".hydra" / "config.yaml"), "objective")
    name = str(path.relative_to(sweep))
    stopped = read_json(sweep / SWEEP_FILE).get("stopped", {}).get(name, "") if "stopped_at" in metrics else ""
    return Job(name, settings, objective, metrics, reason, stopped)


def sweep_objective(jobs: Sequence[Job]) -> str:
    """The entry of metrics.json by which the jobs are sorted: the one they name, else as a run chooses it."""
    named = [job.objective for job in jobs if job.objective]
    return named[0] if named else "eval_loss" if any("eval_loss" in job.metrics for job in jobs) else "train_loss"


def objective_value(metrics: Mapping[str, Any], objective: str | None) -> float:
    """What a finished job's sweeper gets: the entry of metrics.json that is the objective; NaN where there is none."""
    names = [objective] if objective else ["eval_loss", "train_loss", *METRICS]
    return next((float(metrics[name]) for name in names if isinstance(metrics.get(name), int | float)), math.nan)


def summary_line(folder: Path, jobs: Sequence[Job], objective: str) -> str:
    """How many jobs finished, by what the table is sorted, and which runs in the folder are not the sweep's."""
    done = sum(not job.reason and "stopped_at" not in job.metrics for job in jobs)
    order = "the lowest" if objective_direction(objective) == "minimize" else "the highest"
    line = f"{done} of {plural(len(jobs), 'job')} finished. Sorted by {objective}, {order} first."
    here = {str(path.parents[1].relative_to(folder)) for path in folder.glob("**/.hydra/overrides.yaml")}
    others = sorted(here - {job.name for job in jobs})
    return line + (f" In the folder, but not of this sweep: {', '.join(others)}." if others else "")


def choice_lines(groups: Sequence[Group], front: Mapping[str, Any], objective: str) -> list[str]:
    """The best group's settings as they are typed, the gentlest that is as good, and the Pareto front."""
    best, key, chosen, lines = groups[0], "trainer.learning_rate", {"Best": groups[0]}, []
    if key in best.settings and len(best.objective) > 1:  # the seeds show the noise
        as_good = [group for group in groups if within_noise(group.objective, best.objective)]
        smallest = min(as_good, key=lambda group: float(group.settings[key]), default=best)
        chosen["Smallest learning rate within the seeds' noise"] = smallest
    for what, group in chosen.items():
        if group.objective and group.settings:
            typed = " ".join(f"{name}={value}" for name, value in group.settings.items())
            lines.append(f"{what}: {typed} (job {group.name})")
    if len(groups) > 1 and key in best.settings and len(best.objective) == 1:
        lines.append("One seed each: seed=0,1,2 would show if a smaller learning rate is as good.")
    if len(front) > 1:
        lines.append(f"Pareto front of {objective} and forgetting: job {'; '.join(front)}")
    return lines
