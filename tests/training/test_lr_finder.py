"""A learning rate to begin with: the ramp, what is read off it, and what is left of it."""

import json
import random

import pytest

from sft_recipes.training.lr_finder import suggest_rate
from support.commands import SHORT_ROWS_RUN


def test_the_advice_is_the_steepest_place_or_a_tenth_of_where_it_diverges():
    rates = [10 ** (-6 + place / 20) for place in range(100)]  # to 9e-2
    falls = [3.0 - 2.0 / (1 + (1e-3 / rate) ** 2) for rate in rates]  # a step down, steepest in log rate at 1e-3
    advice = suggest_rate(rates, falls)
    assert advice.steepest == pytest.approx(1e-3, rel=0.15) and advice.diverges is None and advice.clear
    assert advice.rate == advice.steepest and "does not diverge" in advice.lines()[0]
    assert "tenth" not in advice.lines()[-1]
    breaks = [loss if rate < 5e-3 else 8.0 for rate, loss in zip(rates, falls, strict=True)]
    advice = suggest_rate(rates, breaks)
    assert advice.diverges == pytest.approx(5e-3, rel=0.3) and advice.rate == advice.diverges / 10
    assert f"diverges at {advice.diverges:.2g}." in advice.lines()[0]
    assert advice.lines()[-1].startswith(f"Try trainer.learning_rate={advice.diverges / 10:.2g}, the lower")
    nothing = [loss if rate < 5e-3 else float("nan") for rate, loss in zip(rates, falls, strict=True)]
    assert suggest_rate(rates, nothing).diverges == pytest.approx(5e-3, rel=0.13)


def test_a_loss_that_does_not_fall_is_said_to_be_a_guess():
    draw = random.Random(0)
    advice = suggest_rate([10 ** (-6 + place / 20) for place in range(100)], [draw.gauss(3, 0.5) for _ in range(100)])
    assert not advice.clear and any("hardly falls" in line for line in advice.lines())


def test_the_ramp_grows_by_one_factor_and_saves_no_model(command, tmp_path):
    typed = ["+recipe=tiny", "+sweep=lr_find", "lr_find.start=1e-4", "lr_find.end=1e-1", "trainer.max_steps=31"]
    code, printed, said = command(*typed, "hydra.run.dir=run")
    assert code == 0 and "Try trainer.learning_rate=" in printed and "Traceback" not in said
    found = json.loads((tmp_path / "run/lr_find.json").read_text())
    # 30 steps over three decades: a factor of 10^0.1; the last step's rate is seen by none
    assert found["learning_rate"] == pytest.approx([10 ** (-4 + place / 10) for place in range(len(found["loss"]))])
    assert 20 < len(found["loss"]) <= 30
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert there == {".hydra", "sft_recipes.log", "supervision.json", "lr_find.json", "lr_find.png"}


def test_a_ramp_downwards_gets_a_line(command):
    line = "lr_find.end=0.01 should be above lr_find.start=0.1.\n"
    code, _, said = command(*SHORT_ROWS_RUN, "+sweep=lr_find", "lr_find.start=0.1", "lr_find.end=0.01")
    assert code == 2 and said.endswith(line)
