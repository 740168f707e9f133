"""Successive halving finds what the whole grid finds, in a third of its steps."""

import json
import math

import pytest

from sft_recipes.reporting.sweep_report import read_jobs
from sft_recipes.reporting.sweep_table import Group, Job, rank_groups
from sft_recipes.sweeps.halving import choose_survivors
from support.commands import read_metrics

pytest.importorskip("optuna")
STEPS = 18
TINY = ["-m", "+recipe=tiny", f"trainer.max_steps={STEPS}", "evaluate.rows=0", "evaluate.raw_text=null", "evaluate.weight_change=false", "trainer.check_memory=false",
        "trainer.eval_strategy=no", "trainer.save_strategy=no", "trainer.per_device_train_batch_size=8",
        "data.tiny.split='train[:200]'", "data.tiny.held_out_split='test[:20]'", "trainer.learning_rate=1e-5,1e-3,2e-2,1"]  # fmt: skip


def make_groups(losses: dict[str, list[float]]) -> list[Group]:
    jobs = [Job(f"{rate} {seed}", {"trainer.learning_rate": rate, "seed": str(seed)}, None, {"eval_loss": loss})
            for rate, some in losses.items() for seed, loss in enumerate(some)]  # fmt: skip
    return rank_groups(jobs, "eval_loss")


def test_it_chooses_what_the_whole_grid_chooses_in_a_third_of_its_steps(command, tmp_path):
    code, printed, _ = command(*TINY, "+sweep=halving", "hydra.sweep.dir=halved")
    assert code == 0 and command(*TINY, "hydra.sweep.dir=whole")[0] == 0
    halved, whole = (read_jobs(tmp_path / folder) for folder in ("halved", "whole"))
    best, winner = (rank_groups(jobs, "eval_loss")[0].jobs[0] for jobs in (whole, halved))
    assert winner.settings["trainer.learning_rate"] == best.settings["trainer.learning_rate"]
    assert winner.metrics["eval_loss"] == best.metrics["eval_loss"]  # stopped and resumed twice on the way
    assert sum(job.metrics["steps"] for job in halved) <= math.ceil(sum(job.metrics["steps"] for job in whole) / 3)
    assert "After 11% of the steps 1 of 4 settings go on:" in printed and "| stops " in printed
    assert "1 of 4 jobs finished." in printed and "stopped after 11% of its steps: eval_loss " in printed
    stopped = next(job.name for job in halved if job is not winner)
    assert read_metrics(tmp_path / "halved" / stopped)["stopped_at"] == 0.11


def test_a_quarter_goes_on_the_best_and_no_failed_one():
    groups = make_groups({f"1e-{number}": [float(number)] for number in range(1, 9)} | {"1": [math.nan]})
    left = choose_survivors([group for group in groups if group.objective], "eval_loss", 25)
    assert [group.jobs[0].name for group in left] == ["1e-1 0", "1e-2 0"]  # of the eight numbers


def test_the_higher_share_goes_on():
    jobs = [
        Job(str(x), {"seed": "1", "trainer.weight_decay": str(x)}, None, {"exact_match": x})
        for x in (0.1, 0.9, 0.5, 0.2)
    ]
    left = choose_survivors(rank_groups(jobs, "exact_match"), "exact_match", 25)
    assert [group.jobs[0].name for group in left] == ["0.9"]


def test_what_the_seeds_cannot_tell_from_the_best_goes_on():
    groups = make_groups({"1e-1": [1, 2, 3], "1e-2": [2, 3, 4], "1e-3": [7, 8, 9], "1e-4": [8, 9, 10]})
    # Welch's threshold of two such sets is 2.776 · √(1/3 + 1/3) = 2.27
    assert [group.settings["trainer.learning_rate"] for group in choose_survivors(groups, "eval_loss", 25)] == [
        "1e-1",
        "1e-2",
    ]


def test_ties_go_on_together():
    groups = make_groups({"1e-1": [1.0], "1e-2": [1.0], "1e-3": [2.0], "1e-4": [3.0]})
    assert len(choose_survivors(groups, "eval_loss", 25)) == 2


def test_started_again_it_goes_on_at_the_rung_that_it_had_come_to(command, monkeypatch):
    begun = []

    def job(config, folder):
        begun.append((config.trainer.fields["learning_rate"], config.trainer.stop_at))
        if len(begun) == 6:
            raise KeyboardInterrupt
        share = {"stopped_at": config.trainer.stop_at} if config.trainer.stop_at else {}
        (folder / "metrics.json").write_text(json.dumps({"train_loss": config.trainer.fields["learning_rate"]} | share))
        return config.trainer.fields["learning_rate"]

    monkeypatch.setattr("sft_recipes.train.main", job)
    typed = [*TINY, "+sweep=halving", "trainer.learning_rate=4,3,2,1", "hydra.sweep.dir=sweep"]
    assert command(*typed)[0] == 130 and command(*typed)[0] == 0
    assert begun == [(4, 0.11), (3, 0.11), (2, 0.11), (1, 0.11), (1, 0.33), (1, None), (1, None)]
