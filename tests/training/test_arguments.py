"""The objective is an entry of metrics.json that a run measures, or the run says so."""

import pytest

from sft_recipes.errors import ConfigError
from sft_recipes.training.arguments import check_objective, resolve_objective


def test_without_a_name_it_is_the_held_out_loss_then_the_training_loss_then_what_there_is():
    assert resolve_objective(None, ["exact_match", "eval_loss", "train_loss"]) == "eval_loss"
    assert resolve_objective(None, ["exact_match", "train_loss"]) == "train_loss"
    assert resolve_objective(None, ["exact_match"]) == "exact_match"
    assert resolve_objective(None, []) is None


def test_a_part_of_the_held_out_loss_can_be_named_where_there_are_held_out_rows():
    assert resolve_objective("eval_loss_turn_later", ["eval_loss"]) == "eval_loss_turn_later"
    with pytest.raises(ConfigError, match="objective=eval_loss_turn_later is not measured in this run"):
        resolve_objective("eval_loss_turn_later", ["train_loss"])


def test_a_metric_that_is_not_measured_is_refused_with_those_that_are():
    with pytest.raises(
        ConfigError, match=r"objective=train_los is not measured in this run\. Did you mean train_loss\?"
    ):
        resolve_objective("train_los", ["train_loss", "exact_match"])


@pytest.mark.parametrize("metrics", [{}, {"p_stop": None}])
def test_an_objective_without_a_number_is_an_error_and_no_perfect_loss(metrics):
    with pytest.raises(ConfigError, match="objective=p_stop could not be measured in this run"):
        check_objective("p_stop", metrics)
    check_objective(None, metrics)
    check_objective("p_stop", {"p_stop": 0.0})
