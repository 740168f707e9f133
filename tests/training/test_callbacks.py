"""What is watched while training goes on, on made-up losses."""

import json
import logging

import pytest
from transformers import TrainerControl, TrainerState

from sft_recipes.training.callbacks import OVERFITTING_REMEDY, OverfittingMonitor, SampleAnswers


def watched(losses: list[tuple[float | None, float]]) -> OverfittingMonitor:
    """The callback after evaluations every ten steps: (the training loss logged before it, the held-out loss)."""
    callback, state = OverfittingMonitor(), TrainerState()
    for place, (trained, held_out) in enumerate(losses, start=1):
        state.global_step = 10 * place
        state.log_history += [] if trained is None else [{"loss": trained, "step": state.global_step}]
        callback.on_evaluate(None, state, TrainerControl(), metrics={"eval_loss": held_out})
        state.log_history.append({"eval_loss": held_out, "step": state.global_step})
    return callback


def test_falling_losses_close_to_each_other_are_no_overfitting():
    assert watched([(2.0, 2.1), (1.0, 1.2), (0.5, 0.79)]).warnings == []


def test_a_gap_above_three_tenths_of_a_nat_is_said_with_step_and_figures(caplog):
    with caplog.at_level(logging.WARNING):
        found = watched([(2.0, 2.1), (1.0, 1.25), (0.5, 0.9)]).warnings
    line = "Overfitting? In step 30 held-out loss 0.900 is 0.40 above the training loss, 0.500. "
    assert found == [line + OVERFITTING_REMEDY] == caplog.messages


def test_a_rise_of_more_than_a_hundredth_above_the_best_is_said_with_step_and_figures():
    # 1.008 is 0.8 % above 1.000, 1.025 is 2.5 % above it
    (found,) = watched([(1.0, 1.2), (1.0, 1.0), (1.0, 1.008), (1.0, 1.025)]).warnings
    assert found == f"Overfitting? In step 40 held-out loss 1.025 is 2.5% above its best, 1.000. {OVERFITTING_REMEDY}"


def test_it_is_said_once(caplog):
    assert len(watched([(1.0, 1.0), (0.9, 2.0), (0.1, 3.0), (0.1, 4.0)]).warnings) == 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize("losses", [[(None, 5.0), (None, 4.0)], [(5.0, 5.2), (None, 5.1)]])
def test_an_evaluation_before_the_first_logged_loss_is_not_compared_with_one(losses):
    assert watched(losses).warnings == []


def test_what_is_logged_without_a_held_out_loss_is_passed_over():
    callback = OverfittingMonitor()
    callback.on_evaluate(None, TrainerState(), TrainerControl(), metrics={"eval_p_stop": 0.5})
    assert callback.warnings == [] and callback.best == float("inf")


def test_samples_are_asked_every_so_many_steps_and_written_a_line_each(tmp_path, caplog):
    asked, path = [], tmp_path / "samples.jsonl"

    def ask() -> list[dict]:
        asked.append(True)
        return [{"prompt": f"Où? {n}", "reference": "Là.", "text": f"{len(asked)}", "stops": True} for n in "ab"]

    callback, state = SampleAnswers(ask, 4, path), TrainerState(is_world_process_zero=True)
    with caplog.at_level(logging.INFO):
        for step in range(1, 10):
            state.global_step = step
            callback.on_step_end(None, state, TrainerControl())
    expected = [
        {"step": step, "prompt": f"Où? {name}", "reference": "Là.", "text": text, "stops": True}
        for step, text in ((4, "1"), (8, "2"))
        for name in "ab"
    ]
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == expected
    assert "Où?" in path.read_text(encoding="utf-8")  # readable, not \u00f9
    assert caplog.messages == ["step 4, asked 'Où? a', says '1'", "step 8, asked 'Où? a', says '2'"]


def test_only_one_process_of_several_writes(tmp_path):
    callback = SampleAnswers(lambda: [{"prompt": "a", "text": "b"}], 1, tmp_path / "samples.jsonl")
    callback.on_step_end(None, TrainerState(global_step=1, is_world_process_zero=False), TrainerControl())
    assert not (tmp_path / "samples.jsonl").exists()
