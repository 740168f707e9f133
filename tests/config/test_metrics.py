"""One table holds all metrics: what is added to it appears wherever metrics are measured, shown and chosen."""

import json

import pytest

from sft_recipes.config.metrics import METRICS, Metric, objective_direction
from sft_recipes.data.prepare import TrainingData
from sft_recipes.evaluation import text_metrics
from sft_recipes.evaluation.suite import EvalInputs, EvaluateOptions, compare_measurements, measured_metrics
from sft_recipes.reporting.document import render_lines
from sft_recipes.reporting.result_tables import measurement_table, result_table
from sft_recipes.reporting.sweep_report import write_sweep_report

ANSWERS = [{"text": "a long answer", "reference": "a", "stops": True}, {"text": "a", "reference": "a", "stops": True}]


@pytest.fixture
def words(monkeypatch):
    """A metric that a developer has added: its entry and its function."""
    entry = Metric("words", "words per answer", ".2f", "lower", "answers", "words", column="words")
    monkeypatch.setitem(METRICS, "words", entry)
    function = lambda answers: sum(len(answer["text"].split()) for answer in answers) / len(answers)  # noqa: E731
    monkeypatch.setattr(text_metrics, "words", function, raising=False)


def inputs(asked=("x",), held_out=(1,), texts=("x",), may_think=True) -> EvalInputs:
    """What a model is measured on, as far as names go."""
    data = TrainingData([], list(held_out), list(asked), {})
    return EvalInputs(data, [], list(asked), list(texts), EvaluateOptions(), 0, may_think=may_think)


def test_a_metric_that_is_an_entry_and_a_function_is_measured_and_can_be_the_objective(words):
    assert text_metrics.score_answers(ANSWERS)["words"] == 2.0
    assert "words" in measured_metrics(inputs()) and objective_direction("words") == "minimize"
    before, after = ({"answers": [], **text_metrics.score_answers(some)} for some in (ANSWERS[:1], ANSWERS))
    assert compare_measurements(before, after, inputs())[0]["words"] == 2.0


def test_it_is_in_the_report_s_tables_which_the_card_has_too(words):
    metrics = {"before": {"words": 3.0, "rows": 2}, "after": {"words": 2.0, "rows": 2}, "words": 2.0}
    assert result_table(metrics) == [["", "base", "tuned"], ["words per answer", "3.00", "2.00"]]
    assert measurement_table(metrics) == [
        ["measured", "base", "tuned"],
        ["words", "3.0000", "2.0000"],
        ["rows", "2", "2"],
    ]


def test_it_has_a_column_in_a_sweep_s_table_which_is_sorted_by_it(words, tmp_path):
    for number, value in enumerate((3.0, 1.0)):
        (tmp_path / f"{number}" / ".hydra").mkdir(parents=True)
        (tmp_path / f"{number}" / ".hydra" / "overrides.yaml").write_text(f"- trainer.weight_decay={value}")
        (tmp_path / f"{number}" / ".hydra" / "config.yaml").write_text("objective: words")
        (tmp_path / f"{number}" / "metrics.json").write_text(json.dumps({"words": value, "train_loss": 1.0}))
    assert write_sweep_report(tmp_path).splitlines()[:6] == [
        "2 of 2 jobs finished. Sorted by words, the lowest first.",
        "",
        "| job | weight_decay | words | loss   |",
        "| --- | ------------ | ----- | ------ |",
        "| 1   | 1.0          | 1.00  | 1.0000 |",
        "| 0   | 3.0          | 3.00  | 1.0000 |",
    ]


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        ("exact_match", False), ("rouge_l", False), ("chrf", False), ("stops", False), ("p_stop", False), ("mfu", False),
        ("tokens_per_second", False), ("eval_p_stop", False), ("mine.overlap", False),
        ("eval_loss", True), ("loss", True), ("eval_loss_turn_later", True), ("raw_text_loss", True), ("train_loss", True),
        ("bits_per_byte", True), ("train_seconds", True), ("peak_memory_gib", True), ("forgetting.change", True),
        ("mine.perplexity", True),
    ],
)  # fmt: skip
def test_which_way_is_better(name, lower):
    assert objective_direction(name) == ("minimize" if lower else "maximize")


def test_what_is_not_measured_cannot_be_the_objective():
    assert measured_metrics(inputs(asked=(), held_out=(), texts=())) == []
    assert measured_metrics(inputs(asked=(), texts=())) == ["eval_loss"]
    assert {"thinks", "answered"} <= {*measured_metrics(inputs())}
    assert "thinks" not in measured_metrics(inputs(may_think=False))
    assert "train_loss" not in measured_metrics(inputs()) and "train_loss" in measured_metrics(inputs(), training=True)


def test_of_models_that_never_think_the_share_is_0_as_the_objective_and_no_row_of_the_table():
    share = {"thinking": {"share": 0.0}}
    found, _ = compare_measurements({**share}, {**share}, inputs())
    assert found["thinks"] == 0.0 and result_table(found) == []


def test_a_change_that_rounds_to_zero_has_no_minus():
    metrics = {"before": {"raw_text": {"loss": 2.0}}, "raw_text_loss": 1.99999}
    assert result_table(metrics) == [["", "base", "tuned"], ["loss on raw text", "2.000", "2.000 (+0.0%)"]]
    found = {"verdict": "passed", "change": -0.00001, "worst": -0.01}
    (line,) = render_lines("verdict.jinja", found=found)
    assert line == "passed. The loss on raw text changed by +0.0%. The worst changed by +0.0 points."
