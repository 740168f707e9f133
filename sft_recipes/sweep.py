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

from sft_recipes import page
from sft_recipes.config import direction
from sft_recipes.sweep_plots import curves, heat_map
from sft_recipes.sweep_table import UNFINISHED, Group, Job, fitted, head_of, ranked, rows, short, tidy

started: list[Path] = []  # the folder of the sweep that this process has begun


class Remember(Callback):
    """Tells `finish` which folder Hydra's sweep has; it is called before the first job."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        started.append(Path(config.hydra.sweep.dir))


def finish() -> int:
    """Reports the sweep that this process has begun, if a job of it trained or failed; counts those that failed."""
    folder = started.pop() if started else None
    found = jobs(folder) if folder and folder.is_dir() else []
    if any(job.metrics or job.reason != UNFINISHED for job in found):
        print(f"\n{write(folder)}")
    return sum(job.reason not in ("", UNFINISHED) for job in found)


def is_sweep(folder: Path) -> bool:
    """Whether the folder holds the numbered folders of a sweep's jobs, and is no run itself."""
    return not (folder / "metrics.json").exists() and bool(jobs(folder))


def write(folder: Path) -> str:
    """Writes report.md, report.html and their pictures from the jobs' files; gives back the table for the terminal."""
    found = jobs(folder)
    goal = objective(found)
    groups = ranked(found, goal)
    cells = [[cell.replace(" ± ", "\u00a0±\u00a0") for cell in row] for row in rows(groups, goal, str)]
    sections = {"": [summary(found, goal), *command(folder), page.Table(cells)]}
    if any(len(group.jobs) > 1 for group in groups):
        sections[""].append(NOISE)
    sections[""].append("Every job's own report is `report.html` in the folder of its number.")
    failed = [f"job {job.number} ({described(job.settings, groups)}): {job.reason}" for job in found if job.reason]
    if failed:
        sections["Jobs that did not finish"] = [failed]
    if any(job.metrics.get("history") for job in found):
        sections["Loss"] = [page.Picture(curves(groups, tidy), "loss.png", "The loss of every job over the steps.")]
    if picture := heat_map(groups, goal, direction(goal) == "minimize", tidy):
        label = f"{goal} by {' and '.join(groups[0].settings)}."
        sections["Grid"] = [page.Picture(picture, "grid.png", label)]
    title = f"Sweep: {folder.resolve().parent.name} · {folder.resolve().name}"
    page.save_pictures(folder, sections)
    (folder / "report.md").write_text(page.to_markdown(title, sections), encoding="utf-8")
    (folder / "report.html").write_text(page.to_html(title, sections), encoding="utf-8")
    table = fitted(rows(groups, goal, short), head_of(goal), shutil.get_terminal_size().columns)
    return "\n".join([summary(found, goal), "", *table, "", *failed, *best(groups), f"All of it: {folder}/report.html"])


NOISE = (
    "Means over the seeds ± their standard deviation. `no difference`: the distance to the best is within the noise of "
    "the two sets of seeds (Welch's t-test, 95 %)."
)


def jobs(folder: Path) -> list[Job]:
    """The folder's jobs by number, each from its own files."""
    paths = [path.parents[1] for path in folder.glob("*/.hydra/overrides.yaml")]
    numbered = {int(path.name): path for path in paths if path.name.isdigit()}
    return [job(path) for _, path in sorted(numbered.items())]


def job(path: Path) -> Job:
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


def objective(found: Sequence[Job]) -> str:
    """The entry of metrics.json by which the jobs are sorted: the one they name, else as a run chooses it."""
    named = [job.objective for job in found if job.objective]
    return named[0] if named else "eval_loss" if any("eval_loss" in job.metrics for job in found) else "train_loss"


def summary(found: Sequence[Job], goal: str) -> str:
    """What the table holds, in one line."""
    done = sum(not job.reason for job in found)
    order = "the lowest" if direction(goal) == "minimize" else "the highest"
    return f"{done} of {len(found)} jobs finished. Sorted by {goal}, {order} first."


def best(groups: Sequence[Group]) -> list[str]:
    """The best group's settings as they are typed."""
    first = groups[0]
    typed = " ".join(f"{key}={value}" for key, value in first.settings.items())
    which = ", ".join(str(job.number) for job in first.jobs)
    return [f"Best: {typed} (job {which})"] if first.objective and typed else []


def described(settings: dict[str, str], groups: Sequence[Group]) -> str:
    """A job by what it does not share with the others."""
    keys = [*groups[0].settings, *(["seed"] if any(len(group.jobs) > 1 for group in groups) else [])]
    return ", ".join(f"{short(key)} {tidy(settings[key])}" for key in keys if key in settings) or "alone"


def command(folder: Path) -> list[str | page.Code]:
    """The command that began the sweep, where Hydra's sweeper has filed it."""
    file = folder / "multirun.yaml"
    if not file.is_file():
        return []
    typed = yaml.safe_load(file.read_text(encoding="utf-8"))["hydra"]["overrides"]["task"]
    return [page.Code(f"python -m sft_recipes -m {shlex.join(typed)}")]
