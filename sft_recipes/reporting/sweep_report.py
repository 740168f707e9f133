"""A sweep's folder as one table and its plots: `python -m sft_recipes.report multirun/lima/<date>`."""

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from sft_recipes.config.hydra_plugin import objective_direction
from sft_recipes.reporting.document import Code, Picture, Table, save_pictures, to_html, to_markdown
from sft_recipes.reporting.sweep_figures import plot_curves, plot_grid
from sft_recipes.reporting.sweep_table import (
    UNFINISHED,
    Group,
    Job,
    column_head,
    fit_to_width,
    rank_groups,
    short_name,
    table_rows,
    tidy_value,
)

started_sweeps: list[Path] = []  # the folder of the sweep that this process has begun


class RememberSweepFolder(Callback):
    """Tells `finish_sweep` which folder Hydra's sweep has; it is called before the first job."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        started_sweeps.append(Path(config.hydra.sweep.dir))


def finish_sweep() -> int:
    """Reports the sweep that this process has begun, if a job of it trained or failed; counts those that failed."""
    folder = started_sweeps.pop() if started_sweeps else None
    found = read_jobs(folder) if folder and folder.is_dir() else []
    if any(job.metrics or job.reason != UNFINISHED for job in found):
        print(f"\n{write_sweep_report(folder)}")
    return sum(job.reason not in ("", UNFINISHED) for job in found)


def is_sweep(folder: Path) -> bool:
    """Whether the folder holds the numbered folders of a sweep's jobs, and is no run itself."""
    return not (folder / "metrics.json").exists() and bool(read_jobs(folder))


def write_sweep_report(folder: Path) -> str:
    """Writes report.md, report.html and their pictures from the jobs' files; gives back the table for the terminal."""
    found = read_jobs(folder)
    goal = sweep_objective(found)
    groups = rank_groups(found, goal)
    cells = [[cell.replace(" ± ", "\u00a0±\u00a0") for cell in row] for row in table_rows(groups, goal, str)]
    sections = {"": [summary_line(found, goal), *sweep_command(folder), Table(cells)]}
    if any(len(group.jobs) > 1 for group in groups):
        sections[""].append(NOISE_NOTE)
    sections[""].append("Every job's own report is `report.html` in the folder of its number.")
    failed = [f"job {job.number} ({describe_job(job.settings, groups)}): {job.reason}" for job in found if job.reason]
    if failed:
        sections["Jobs that did not finish"] = [failed]
    if any(job.metrics.get("history") for job in found):
        sections["Loss"] = [
            Picture(plot_curves(groups, tidy_value), "loss.png", "The loss of every job over the steps.")
        ]
    if picture := plot_grid(groups, goal, objective_direction(goal) == "minimize", tidy_value):
        label = f"{goal} by {' and '.join(groups[0].settings)}."
        sections["Grid"] = [Picture(picture, "grid.png", label)]
    title = f"Sweep: {folder.resolve().parent.name} · {folder.resolve().name}"
    save_pictures(folder, sections)
    (folder / "report.md").write_text(to_markdown(title, sections), encoding="utf-8")
    (folder / "report.html").write_text(to_html(title, sections), encoding="utf-8")
    table = fit_to_width(table_rows(groups, goal, short_name), column_head(goal), shutil.get_terminal_size().columns)
    return "\n".join(
        [summary_line(found, goal), "", *table, "", *failed, *best_setting(groups), f"All of it: {folder}/report.html"]
    )


NOISE_NOTE = (
    "Means over the seeds ± their standard deviation. `no difference`: the distance to the best is within the noise of "
    "the two sets of seeds (Welch's t-test, 95 %)."
)


def read_jobs(folder: Path) -> list[Job]:
    """The folder's jobs by number, each from its own files."""
    paths = [path.parents[1] for path in folder.glob("*/.hydra/overrides.yaml")]
    numbered = {int(path.name): path for path in paths if path.name.isdigit()}
    return [read_job(path) for _, path in sorted(numbered.items())]


def read_job(path: Path) -> Job:
    """One job: error.txt says why it failed, and without metrics.json it was interrupted."""
    overrides = yaml.safe_load((path / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")) or []
    settings = {key: value for key, _, value in (str(override).partition("=") for override in overrides)}
    config = yaml.safe_load((path / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
    metrics, reason = {}, UNFINISHED
    if (path / "error.txt").is_file():
        reason = (path / "error.txt").read_text(encoding="utf-8").strip()
    elif (path / "metrics.json").is_file():
        metrics, reason = json.loads((path / "metrics.json").read_text(encoding="utf-8")), ""
    return Job(int(path.name), settings, config.get("objective"), metrics, reason)


def sweep_objective(found: Sequence[Job]) -> str:
    """The entry of metrics.json by which the jobs are sorted: the one they name, else as a run chooses it."""
    named = [job.objective for job in found if job.objective]
    return named[0] if named else "eval_loss" if any("eval_loss" in job.metrics for job in found) else "train_loss"


def summary_line(found: Sequence[Job], goal: str) -> str:
    """What the table holds, in one line."""
    done = sum(not job.reason for job in found)
    order = "the lowest" if objective_direction(goal) == "minimize" else "the highest"
    return f"{done} of {len(found)} jobs finished. Sorted by {goal}, {order} first."


def best_setting(groups: Sequence[Group]) -> list[str]:
    """The best group's settings as they are typed."""
    first = groups[0]
    typed = " ".join(f"{key}={value}" for key, value in first.settings.items())
    which = ", ".join(str(job.number) for job in first.jobs)
    return [f"Best: {typed} (job {which})"] if first.objective and typed else []


def describe_job(settings: dict[str, str], groups: Sequence[Group]) -> str:
    """A job by what it does not share with the others."""
    keys = [*groups[0].settings, *(["seed"] if any(len(group.jobs) > 1 for group in groups) else [])]
    return ", ".join(f"{short_name(key)} {tidy_value(settings[key])}" for key in keys if key in settings) or "alone"


def sweep_command(folder: Path) -> list[str | Code]:
    """The command that began the sweep, where Hydra's sweeper has filed it."""
    file = folder / "multirun.yaml"
    if not file.is_file():
        return []
    typed = yaml.safe_load(file.read_text(encoding="utf-8"))["hydra"]["overrides"]["task"]
    return [Code(f"python -m sft_recipes -m {shlex.join(typed)}")]
