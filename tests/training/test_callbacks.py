"""What is checked and logged while training goes on, on made-up losses."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from sft_recipes.errors import ConfigError
from sft_recipes.training.callbacks import (
    FiniteLossCheck,
    LossLogger,
    LossMonitor,
    SampleAnswers,
    find_warning,
    load_callbacks,
)
from support.configs import error_of

RISE_ADVICE = (
    "overfitting where the training loss goes on falling, else a rate that is too high. Try fewer "
    "trainer.num_train_epochs, a lower trainer.learning_rate, adapter=lora with dropout, or more rows."
)


def monitored(
    losses: list[tuple[list[float], float]], initial: float | None = None, max_steps: int = 1000
) -> LossMonitor:
    """The monitor after evaluations every ten steps: (the training losses logged before it, the held-out loss)."""
    monitor, state = LossMonitor(initial), TrainerState(max_steps=max_steps)
    for place, (trained, held_out) in enumerate(losses, start=1):
        state.global_step = 10 * place
        state.log_history += [{"loss": loss, "step": state.global_step} for loss in trained]
        state.log_history.append({"eval_loss": held_out, "step": state.global_step})
        monitor.on_evaluate(SimpleNamespace(), state, TrainerControl())
    return monitor


def test_held_out_loss_that_falls_is_no_overfitting_however_far_the_training_loss_is_below_it():
    assert monitored([([2.0], 2.1), ([1.0], 1.9), ([0.1], 1.8)], initial=2.5).warnings == []


def test_a_training_loss_with_raw_text_in_it_is_not_compared_with_the_held_out_loss():
    # the first steps of a tiny run: 15 % of the rows are prose, which the base model knows already
    assert monitored([([4.1, 3.8], 5.1), ([3.6], 4.8)], initial=5.8).warnings == []


def test_a_rise_names_step_and_figures_and_says_what_to_try(caplog):
    with caplog.at_level(logging.WARNING):
        # 1.008 is 0.8 % above 1.000, 1.025 is 2.5 % above it
        found = monitored([([1.4], 1.2), ([1.1], 1.0), ([0.8], 1.008), ([0.5], 1.025)], initial=2.0).warnings
    assert found == caplog.messages == [
        f"In step 40 the held-out loss is 1.025, 2.5% above 1.000 in step 20: {RISE_ADVICE}"
    ]  # fmt: skip


def test_a_held_out_loss_above_the_one_before_training_is_a_rise_too():
    (found,) = monitored([([0.9, 0.7], 1.1)], initial=1.0).warnings
    assert found == f"In step 10 the held-out loss is 1.100, 10.0% above 1.000 before training: {RISE_ADVICE}"


def test_only_the_first_warning_is_given(caplog):
    assert len(monitored([([1.0], 1.0), ([0.9], 2.0), ([0.1], 3.0)]).warnings) == 1
    assert len(caplog.records) == 1


def test_half_of_the_steps_without_a_change_of_either_loss_is_a_model_that_learns_nothing():
    flat = [([2.01, 1.99], 2.10), ([2.02, 1.98], 2.095), ([1.99, 2.01], 2.099)]
    assert monitored(flat[:1], initial=2.1, max_steps=40).warnings == []  # 10 of 40 steps: it may be warming up
    assert monitored(flat, initial=2.1, max_steps=40).warnings == [
        "In step 20 the held-out loss is 2.095 and was 2.100 before training; the training loss has not moved either, so "
        "the model learns nothing. Try a higher trainer.learning_rate or more steps."
    ]


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [([2.0, 2.0, 1.5, 1.5], 2.1), ([2.0, 2.0, 2.5, 2.5], 2.1), ([2.0, 2.0, 2.0, 2.0], 2.05), ([], 2.1), ([2.0], 2.1)],
)
def test_where_one_of_the_losses_moved_or_was_not_logged_nothing_is_said_of_a_plateau(trained, held_out):
    assert monitored([(trained, held_out)], initial=2.1, max_steps=10).warnings == []


def test_without_a_loss_before_training_the_first_evaluation_is_the_one_to_compare_with():
    assert monitored([([2.0, 2.0], 2.1), ([2.0, 2.0], 2.1)], initial=None, max_steps=20).warnings == []
    assert len(monitored([([2.0], 2.1), ([1.0], 2.2)]).warnings) == 1


def test_metrics_without_a_held_out_loss_are_ignored():
    assert find_warning([{"eval_p_stop": 0.5, "step": 1}], None, 10) == []


@pytest.mark.parametrize("losses", [[1.0, float("nan")], [float("inf"), 1.0], [float("inf"), float("-inf")]])
def test_a_step_with_one_loss_that_is_not_finite_ends_training_and_is_named(losses, tmp_path):
    check = FiniteLossCheck()
    for loss in losses:
        check.add(torch.tensor(loss))
    with pytest.raises(ConfigError, match="in step 8; no model is saved"):
        check.on_pre_optimizer_step(SimpleNamespace(output_dir=tmp_path), TrainerState(global_step=7), TrainerControl())


def test_finite_losses_are_looked_at_once_a_step(monkeypatch):
    looks, look = [], torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: looks.append(look(tensor)) or looks[-1])
    check = FiniteLossCheck()
    for _ in range(2):
        for _ in range(4):
            check.add(torch.tensor(0.25))
        check.on_pre_optimizer_step(None, TrainerState(), TrainerControl())
    assert looks == [1.0, 1.0]


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
    assert caplog.messages == ["Step 4, question 'Où? a', answer '1'", "Step 8, question 'Où? a', answer '2'"]


def test_only_one_process_of_several_writes(tmp_path):
    callback = SampleAnswers(lambda: [{"prompt": "a", "text": "b"}], 1, tmp_path / "samples.jsonl")
    callback.on_step_end(None, TrainerState(global_step=1, is_world_process_zero=False), TrainerControl())
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_callback_of_the_user_s_own_is_made_from_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_callbacks.py").write_text(
        "from transformers import TrainerCallback\n\nclass Mine(TrainerCallback):\n    pass\n\n"
        "class Greedy(TrainerCallback):\n    def __init__(self, steps):\n        self.steps = steps\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (mine,) = load_callbacks(["my_callbacks.Mine"])
    assert isinstance(mine, TrainerCallback) and type(mine).__name__ == "Mine"
    (greedy,) = load_callbacks([{"name": "my_callbacks.Greedy", "steps": 3}])
    assert greedy.steps == 3
    assert error_of(load_callbacks, ["my_callbacks.Greedy"]) == (
        "callbacks=my_callbacks.Greedy: Greedy.__init__() missing 1 required positional argument: 'steps'. "
        "Options are written as callbacks='[{name: my_callbacks.Greedy, OPTION: VALUE}]'."
    )


@pytest.mark.parametrize(
    ("name", "start"),
    [
        (
            "no_such_module.Mine",
            "callbacks=no_such_module.Mine could not be imported: No module named 'no_such_module'.",
        ),
        ("transformers.NoSuchCallback", "callbacks=transformers.NoSuchCallback could not be imported: "),
        ("Mine", "callbacks=Mine is unknown. One of your own is written module.name."),
        ("math.floor", "callbacks=math.floor is of Python itself, and no function of your own."),
        ("torch.floor", "callbacks=torch.floor is not a class that inherits from transformers.TrainerCallback."),
        ("transformers.Trainer", "callbacks=transformers.Trainer is not a class that inherits from transf"),
    ],
)
def test_a_name_that_is_no_callback_gets_a_line(name, start):
    assert error_of(load_callbacks, [name]).startswith(start)


def test_the_losses_are_logged_with_the_time_that_is_left(caplog, monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    callback, state = LossLogger(), TrainerState(max_steps=100, is_world_process_zero=True)
    with caplog.at_level(logging.INFO):
        callback.on_train_begin(None, state, TrainerControl())
        state.global_step = 5
        callback.on_step_end(None, state, TrainerControl())
        callback.on_log(None, state, TrainerControl(), {"loss": 1.23456, "learning_rate": 2e-5, "num_tokens": 7})
    assert caplog.messages == [
        "5 of 100 steps done; about 3 min left.", "step 5 of 100: loss 1.2346, learning_rate 2.00e-05"
    ]  # fmt: skip
