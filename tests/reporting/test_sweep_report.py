"""A sweep leaves a table and plots made from its jobs' files, whatever becomes of a job."""

import gc
import json
import random
import re
import shlex
import subprocess
import sys
import weakref

import pytest
import yaml

from sft_recipes import train
from sft_recipes.config.hydra_errors import unknown_choice
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.reporting.sweep_figures import plot_curves, plot_front
from sft_recipes.reporting.sweep_report import is_sweep, read_jobs, write_sweep_report
from sft_recipes.reporting.sweep_table import rank_groups, within_noise
from sft_recipes.training.trainer import build_trainer
from support.commands import SHORT_ROWS_RUN
from support.paths import ROOT

GRID = {
    ("0.0001", "1"): 3.5, ("0.0001", "3"): 3.1, ("0.001", "1"): 1.25, ("0.001", "3"): 0.5,
    ("0.01", "1"): 0.75, ("0.01", "3"): 0.25,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """`folder(jobs)`: a sweep's folder; a job is its overrides with its metrics, a reason why it failed, or None."""

    def make(jobs, objective=None):
        path = tmp_path / "multirun" / "tiny" / "some_date"
        for number, (overrides, found) in enumerate(jobs):
            hydra = path / str(number) / ".hydra"
            hydra.mkdir(parents=True)
            (hydra / "config.yaml").write_text(yaml.safe_dump({"objective": objective}))
            (hydra / "overrides.yaml").write_text(yaml.safe_dump(["+recipe=tiny", *overrides]))
            if isinstance(found, str):
                (path / str(number) / "error.txt").write_text(found + "\n")
            elif found:
                (path / str(number) / "metrics.json").write_text(json.dumps(found))
        (path / "command.txt").write_text("python -m sft_recipes -m +recipe=tiny seed=1,2\n")
        return path

    return make


def metrics(loss: float, **more) -> dict:
    """What a job of a sweep leaves, as far as its table goes."""
    history = [{"step": step, "loss": 4.0 - step / 10, "learning_rate": 1e-3} for step in (10, 20)]
    return {
        "train_loss": loss + 1, "eval_loss": loss, "exact_match": 0.5, "p_stop": 0.875, "train_seconds": 12.0,
        "forgetting": {"change": 0.034, "verdict": "passed"}, "history": history,
    } | more  # fmt: skip


def grid(**failed) -> list:
    return [([f"trainer.learning_rate={rate}", f"trainer.num_train_epochs={epochs}"], failed.get(f"job{place}", metrics(loss)))
            for place, ((rate, epochs), loss) in enumerate(GRID.items())]  # fmt: skip


def test_the_table_is_sorted_by_the_objective_and_fits_80_columns(folder):
    printed = write_sweep_report(folder(grid())).splitlines()
    assert printed[:-1] == [
        "6 of 6 jobs finished. Sorted by eval_loss, the lowest first.",
        "",
        "| job | lr   | epochs | held out | exact | p(stop) | forgot | loss   | time |",
        "| --- | ---- | ------ | -------- | ----- | ------- | ------ | ------ | ---- |",
        "| 5   | 1e-2 | 3      | 0.2500   | 50.0% | 0.875   | +3.4%  | 1.2500 | 12 s |",
        "| 3   | 1e-3 | 3      | 0.5000   | 50.0% | 0.875   | +3.4%  | 1.5000 | 12 s |",
        "| 4   | 1e-2 | 1      | 0.7500   | 50.0% | 0.875   | +3.4%  | 1.7500 | 12 s |",
        "| 2   | 1e-3 | 1      | 1.2500   | 50.0% | 0.875   | +3.4%  | 2.2500 | 12 s |",
        "| 1   | 1e-4 | 3      | 3.1000   | 50.0% | 0.875   | +3.4%  | 4.1000 | 12 s |",
        "| 0   | 1e-4 | 1      | 3.5000   | 50.0% | 0.875   | +3.4%  | 4.5000 | 12 s |",
        "",
        "Best: trainer.learning_rate=0.01 trainer.num_train_epochs=3 (job 5)",
        "One seed each: seed=0,1,2 would show if a smaller learning rate is as good.",
    ]
    assert printed[-1].endswith("some_date/report.html") and max(map(len, printed[:-1])) <= 80


def test_shares_are_sorted_the_highest_first(folder):
    jobs = [([f"trainer.weight_decay={x}"], metrics(1.0, exact_match=x)) for x in (0.25, 0.75, 0.5)]
    printed = write_sweep_report(folder(jobs, "exact_match"))
    assert "Sorted by exact_match, the highest first." in printed
    assert re.findall(r"^\| (\d)", printed, re.M) == ["1", "2", "0"]


def test_an_objective_that_is_in_no_column_gets_one(folder):
    jobs = [([f"trainer.weight_decay={x}"], metrics(1.0, rouge_l=x)) for x in (0.25, 0.75)]
    printed = write_sweep_report(folder(jobs, "rouge_l")).splitlines()
    assert printed[2].startswith("| job | weight_decay | rouge_l | exact |")
    assert printed[4].startswith("| 1   | 0.75         | 75.0%   | 50.0% |")


def test_failed_and_interrupted_jobs_are_named_with_their_reason(folder):
    path = folder(grid(job1="trainer.packing should be true or false, not 'no'.", job5=None))
    printed = write_sweep_report(path).splitlines()
    assert printed[0] == "4 of 6 jobs finished. Sorted by eval_loss, the lowest first."
    cells = [[cell.strip() for cell in line.split("|")[1:5]] for line in printed if line.startswith("|")]
    assert cells[-2:] == [["1", "1e-4", "3", "failed"], ["5", "1e-2", "3", "unfinished"]]
    reasons = [
        "job 1 (lr 1e-4, epochs 3): trainer.packing should be true or false, not 'no'.",
        "job 5 (lr 1e-2, epochs 3): it did not finish.",
    ]
    assert [line for line in printed if line.startswith("job ")] == reasons
    assert "- " + "\n- ".join(reasons) in (path / "report.md").read_text()


def test_seeds_give_mean_and_deviation_and_what_they_cannot_tell_apart_is_no_difference(folder):
    losses = {"1": (1.0, 2.0, 3.0), "2": (2.0, 3.0, 4.0), "3": (7.0, 8.0, 9.0)}
    jobs = [([f"trainer.num_train_epochs={n}", f"seed={seed}"], metrics(loss))
            for n, some in losses.items() for seed, loss in enumerate(some)]  # fmt: skip
    path = folder(jobs)
    printed = write_sweep_report(path)
    page = (path / "report.md").read_text().replace("\u00a0", " ")
    # mean and sample deviation by hand; Welch's threshold of two such sets is 2.776 · √(1/3 + 1/3) = 2.27
    for cells in (
        "| 0, 1, 2 | 1                        | 2.0000 ± 1.0000 |",
        "| 3, 4, 5 | 2                        | 3.0000 ± 1.0000 |",
        "| 6, 7, 8 | 3                        | 8.0000 ± 1.0000 |",
    ):
        assert cells in page
    assert [line.split("|")[-2].strip() for line in page.splitlines() if re.match(r"\| \d,", line)] == [
        "best", "no difference", "+6.0000"
    ]  # fmt: skip
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert max(map(len, table)) <= 80 and "no difference" in table[3]
    assert "Too wide for the terminal, in the report: time, loss, forgot, p(stop)" in printed


def test_the_smallest_learning_rate_that_the_seeds_cannot_tell_from_the_best_is_named(folder):
    losses = {"0.01": (1.0, 2.0, 3.0), "0.001": (2.0, 3.0, 4.0), "0.0001": (7.0, 8.0, 9.0)}
    jobs = [([f"trainer.learning_rate={rate}", f"seed={seed}"], metrics(loss))
            for rate, some in losses.items() for seed, loss in enumerate(some)]  # fmt: skip
    lines = write_sweep_report(folder(jobs)).splitlines()
    assert "Best: trainer.learning_rate=0.01 (job 0, 1, 2)" in lines
    assert "Smallest learning rate within the seeds' noise: trainer.learning_rate=0.001 (job 3, 4, 5)" in lines


def test_the_pareto_front_is_of_the_jobs_that_no_other_beats_in_target_and_forgetting(folder):
    found = {"0.0001": (2.0, 0.01), "0.001": (1.0, 0.05), "0.01": (1.5, 0.2), "0.1": (1.0, 0.3)}
    jobs = [([f"trainer.learning_rate={rate}"], metrics(loss, forgetting={"change": change, "verdict": "passed"}))
            for rate, (loss, change) in found.items()]  # fmt: skip
    path = folder(jobs)
    assert "Pareto front of eval_loss and forgetting: job 0; 1" in write_sweep_report(path).splitlines()
    assert (path / "pareto.png").is_file() and "eval_loss against forgetting" in (path / "report.html").read_text()


@pytest.mark.parametrize("rise", [0.0004, 0.004, 0.4])
def test_the_labels_of_a_rise_however_small_do_not_lie_over_each_other(rise):
    figure = plot_front([], {"3": (-rise / 80, 5.5), "2": (rise, 4.6)}, "eval_loss")
    figure.canvas.draw()
    shown = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    places = sorted((label.get_window_extent().x0, label.get_window_extent().x1) for label in shown)
    assert all(left[1] < right[0] for left, right in zip(places, places[1:], strict=False)) and len(places) > 2


def test_noise_is_what_welchs_test_says():
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    for _ in range(300):
        a, b = ([draw.gauss(shift, spread) for _ in range(draw.randint(2, 5))]
                for shift, spread in ((0, 1), (draw.uniform(0, 6), draw.uniform(0.1, 2))))  # fmt: skip
        p = stats.ttest_ind(a, b, equal_var=False).pvalue
        assert within_noise(a, b) >= (p > 0.05)  # never a difference that the test does not find
        assert within_noise(a, b) <= (p > 0.005)  # and a clear one always; degrees of freedom are rounded down


def test_equal_results_are_no_difference_and_unequal_ones_without_noise_are():
    assert within_noise([1.0, 1.0], [1.0, 1.0]) and not within_noise([1.0, 1.0], [0.5, 0.5])


def test_the_page_has_one_plot_of_the_losses_and_a_heat_map_of_a_grid(folder):
    path = folder(grid(job2="Out of memory."))
    write_sweep_report(path)
    page = (path / "report.html").read_text()
    assert page.count("<svg ") == 2 and not re.search(r'(?:src|href)="(?!#)', page)
    heat = page[page.rindex("<svg ") :]
    assert {"3.5", "3.1", "failed", "0.5", "0.75", "0.25"} <= set(re.findall(r">([^<>]+)</text>", heat))
    assert {path.name for path in path.glob("*.png")} == {"loss.png", "grid.png"}


def test_jobs_shorter_than_logging_steps_have_no_chart(folder):
    history = [{"step": 1, "eval_loss": 1.0}, {"step": 1, "train_runtime": 1.0}]
    path = folder([([f"trainer.weight_decay={x}"], metrics(x, history=history)) for x in (0.25, 0.75)])
    write_sweep_report(path)
    assert "<svg" not in (path / "report.html").read_text() and not (path / "loss.png").exists()


def test_the_legend_of_the_losses_covers_no_curve(folder):
    groups = rank_groups(read_jobs(folder(grid())), "eval_loss")
    figure = plot_curves(groups)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().y0 >= max(axes.get_window_extent().y1 for axes in figure.axes)
    assert [text.get_text() for text in legend.get_texts()][0] == "1e-2, 3"


def test_without_a_grid_there_is_no_heat_map(folder):
    path = folder([([f"trainer.weight_decay={x}"], metrics(x)) for x in (0.25, 0.75)])
    write_sweep_report(path)
    assert (path / "report.html").read_text().count("<svg ") == 1 and not (path / "grid.png").exists()


def test_a_sweep_of_which_every_job_failed_has_a_report(folder):
    path = folder([([f"seed={seed}"], "Out of memory.") for seed in (1, 2)])
    assert write_sweep_report(path).splitlines()[0] == "0 of 2 jobs finished. Sorted by train_loss, the lowest first."
    assert "<svg " not in (path / "report.html").read_text()


def test_the_report_is_rebuilt_from_the_folder_alone_without_torch(folder):
    path = folder(grid())
    printed = write_sweep_report(path)
    first = (path / "report.html").read_text()
    moved = path.rename(path.with_name("moved"))
    code = "import sys; from sft_recipes.report import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(moved)], capture_output=True, text=True, check=True)
    assert done.stdout == printed.replace("some_date", "moved") + "\nFalse\n"
    assert (moved / "report.html").read_text() == first.replace("some_date", "moved")


def test_a_run_and_an_empty_folder_are_no_sweep(folder, tmp_path):
    path = folder(grid())
    assert is_sweep(path) and not is_sweep(path / "0") and not is_sweep(tmp_path)


def test_a_sweep_runs_on_after_a_failed_job_encodes_once_and_leaves_its_report(command, tmp_path, monkeypatch):
    asked, models, alive = [], [], []

    before, build = Encoder.encode_batches, build_trainer

    def watched(*rest, **options):
        alive.append(sum(model() is not None for model in models))
        trainer = build(*rest, **options)
        models.append(weakref.ref(trainer.model))
        return trainer

    monkeypatch.setattr(train, "build_trainer", watched)
    monkeypatch.setattr(Encoder, "encode_batches", lambda self, *rest: asked.append(1) or before(self, *rest))
    monkeypatch.setenv("SFT_RECIPES_CACHE", str(tmp_path / "cache"))
    typed = [
        "-m",
        *SHORT_ROWS_RUN,
        "trainer.max_steps=2",
        "data.file.data_files=rows.jsonl,no.jsonl",
        "trainer.learning_rate=1e-3,1e-2",
    ]
    code, printed, said = command(*typed, "hydra.sweep.dir=sweep")
    assert code == 2
    names = {"0", "1", "2", "3", "command.txt", "multirun.yaml", "sweep.json", "report.md", "report.html", "grid.png"}
    assert names <= {path.name for path in (tmp_path / "sweep").iterdir()}
    assert not (tmp_path / "sweep/loss.png").exists()  # two steps are fewer than trainer.logging_steps
    for job in "23":
        assert (
            tmp_path / f"sweep/{job}/error.txt"
        ).read_text() == "data.file.data_files=no.jsonl: there is no such file.\n"
        assert f"job {job} (" in printed and "no.jsonl" in printed
    assert "\n2 of 4 jobs finished. Sorted by train_loss, the lowest first.\n" in printed
    assert len(asked) == 2  # the rows and the empty held-out set of the first job
    assert said.count("These rows were encoded by an earlier run") == 1
    digests = [json.loads((tmp_path / f"sweep/{job}/supervision.json").read_text())["digest"] for job in "01"]
    assert alive == [0, 0]  # the first job's model is gone when the second one's is made
    assert digests[0] == digests[1] and digests[0]["rows"] == 4


def test_the_report_has_the_sweep_s_command_as_it_was_typed(command, tmp_path):
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "slow.yaml").write_text("# @package _global_\ntrainer: {learning_rate: 1e-6}\n")
    (tmp_path / "my.yaml").write_text("defaults: [{override /model: tiny}, {override /data: tiny}]\n")
    launcher = ["hydra.launcher._target_=hydra._internal.core_plugins.basic_launcher.BasicLauncher"]
    typed = ["my.yaml", "+recipe@_global_=slow", "data.tiny.split=nope", "seed=1,2", "hydra.sweep.dir=sweep", *launcher]
    command("-m", "-cd", "conf", *typed)
    again = ["python", "-m", "sft_recipes", "-m", "-cd", str(tmp_path / "conf"), *typed]
    assert shlex.split((tmp_path / "sweep" / "command.txt").read_text()) == again
    assert (tmp_path / "sweep" / "command.txt").read_text().strip() in (tmp_path / "sweep" / "report.md").read_text()


def test_control_c_leaves_a_report_of_what_is_done(command, tmp_path):
    (tmp_path / "pressed_second.py").write_text(
        "import os, signal\n\ndef control_c(row, second=False):\n"
        "    if second:\n        os.kill(os.getpid(), signal.SIGINT)\n    return {'text': row['output']}\n"
    )
    typed = ["-m", *SHORT_ROWS_RUN, "data.file.formatter.name=pressed_second.control_c", "hydra.sweep.dir=sweep"]
    code, printed, said = command(*typed, "+data.file.formatter.second=false,true,false")
    assert (code, said.splitlines()[-1]) == (130, "Interrupted.")
    assert "1 of 2 jobs finished." in printed and "job 1 (second true): it did not finish." in printed
    assert (tmp_path / "sweep/report.html").is_file() and not (tmp_path / "sweep/2").exists()


def test_a_failed_job_lets_go_of_its_model_before_the_next(command, monkeypatch):
    class Model:
        pass

    alive, seen = [], []

    def fails(model):
        raise RuntimeError("CUDA out of memory")

    def job(*_):
        seen.append([model() is not None for model in alive])
        model = Model()
        model.itself = model  # as a trainer and its callbacks name each other
        alive.append(weakref.ref(model))
        try:
            fails(model)
        except RuntimeError as error:
            raise ValueError("trainer") from error

    gc.disable()
    monkeypatch.setattr("sft_recipes.train.main", job)
    try:
        assert command("-m", "+recipe=tiny", "seed=1,2,3", "hydra.sweep.dir=sweep")[0] == 1
    finally:
        gc.enable()
    assert seen == [[], [False], [False, False]]


def test_joblib_runs_several_jobs_at_once(command, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    rest = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    rest.append("data.file.data_files=rows.jsonl,./rows.jsonl,no.jsonl")
    # in an interpreter of its own: joblib's workers do not end in the child of a fork server
    typed = [sys.executable, "-m", "sft_recipes", "-m", *SHORT_ROWS_RUN, *rest]
    done = subprocess.run(typed, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "2 of 3 jobs finished." in done.stdout
    assert "no.jsonl): data.file.data_files=no.jsonl: there is no such file.\n" in done.stdout
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 2


def test_optuna_looks_for_the_objective_and_outlives_a_failed_job(command, tmp_path):
    pytest.importorskip("optuna")
    typed = [
        "-m",
        *SHORT_ROWS_RUN,
        "+sweep=optuna",
        "hydra.sweeper.n_trials=3",
        "trainer.learning_rate=choice(1e-3,-1)",
    ]
    code, printed, said = command(
        *typed, "evaluate.rows=1", "data.held_out=1", "objective=exact_match", "hydra.sweep.dir=sweep"
    )
    assert code == 1 and "to maximize the objective" in said
    assert re.search(r"^[12] of 3 jobs finished. Sorted by exact_match, the highest first.$", printed, re.M)
    assert "trainer.learning_rate should be above 0, not -1." in printed


def test_a_sweeper_that_is_not_installed_is_said_to_be_an_extra():
    line = "hydra/launcher=joblib is not installed here. Try pip install 'sft-recipes[sweep]'."
    assert unknown_choice("hydra/launcher", "joblib", ["basic"]) == line


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("recipes/sweep/*.yaml")))
def test_every_sweep_composes(command, name):
    assert command("+recipe=lima", f"+sweep={name}", "--cfg", "job")[0] == 0
