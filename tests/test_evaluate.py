"""Base and tuned model measured alike: by a run itself, by mode=evaluate, and for the best checkpoint."""

import json
import sys
from pathlib import Path

import pytest

from sft_recipes.data.prepare import TrainingData
from sft_recipes.evaluation.suite import EvalInputs, EvaluateOptions, compare_measurements
from support.benchmark_tasks import CHOICE, world_questions
from support.commands import SHORT_TINY_RUN, read_metrics, run_command
from support.paths import ALL_TESTS
from support.rows import question_rows, write_jsonl

SHORT = ["trainer.max_steps=6", "evaluate.rows=12", "trainer.logging_steps=1", "trainer.check_memory=false"]
BEST = ["trainer.load_best_model_at_end=true", "trainer.eval_strategy=steps", "trainer.eval_steps=2",
        "trainer.save_steps=2", "evaluate.temperature=0", "evaluate.raw_text=null", *SHORT]  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def log(folder: Path) -> str:
    return (folder / "sft_recipes.log").read_text()


def close(value):
    """The value with room for rounding in every number."""
    if isinstance(value, dict):
        return {key: close(item) for key, item in value.items()}
    return pytest.approx(value, rel=1e-4, abs=1e-7) if isinstance(value, float) else value


@pytest.fixture(scope="module")
def fully_tuned(tmp_path_factory):
    """The folder of a short run that trains every weight."""
    folder = tmp_path_factory.mktemp("full") / "run"
    assert run_command(folder, "adapter=none", "trainer.learning_rate=1e-3", *SHORT)[0] == 0
    return folder


def test_evaluating_an_adapter_run_gives_what_training_wrote(trained, tmp_path):
    code, _ = run_command(tmp_path, "mode=evaluate", f"evaluate.run={trained}", "evaluate.rows=100")
    again, first = read_metrics(tmp_path), read_metrics(trained)
    assert code == 0
    for key in ("before", "after", "forgetting", "exact_match", "p_stop", "eval_loss", "raw_text_loss"):
        assert again[key] == close(first[key]), key
    assert lines(tmp_path / "answers.jsonl") == lines(trained / "answers.jsonl")
    assert again["warnings"] == [] and again["mode"] == "evaluate"


def test_evaluating_a_fully_tuned_run_gives_what_training_wrote(fully_tuned, tmp_path):
    code, _ = run_command(tmp_path, "mode=evaluate", f"evaluate.run={fully_tuned}", "evaluate.rows=12")
    again, first = read_metrics(tmp_path), read_metrics(fully_tuned)
    assert code == 0
    for key in ("before", "after", "forgetting"):
        assert again[key] == close(first[key]), key
    assert lines(tmp_path / "answers.jsonl") == lines(fully_tuned / "answers.jsonl")


def test_evaluating_has_no_training_loss_to_be_its_objective(trained, tmp_path):
    code, _ = run_command(
        tmp_path, "mode=evaluate", f"evaluate.run={trained}", "evaluate.rows=0", "objective=train_loss"
    )
    assert code == 2 and "objective=train_loss is not measured in this run." in log(tmp_path)
    assert not (tmp_path / "metrics.json").exists()


def test_a_file_of_questions_that_the_run_did_not_train_on_is_asked_whole(trained, tmp_path):
    questions = question_rows(23, answer="Where does it live?")
    path = write_jsonl(tmp_path / "probe.jsonl", questions)
    options = ["mode=evaluate", f"evaluate.run={trained}", "data=file", f"data.file.data_files={path}"]
    code, _ = run_command(tmp_path / "run", *options, "evaluate.temperature=0", "evaluate.raw_text=null")
    answers = lines(tmp_path / "run" / "answers.jsonl")
    record = json.loads((tmp_path / "run" / "supervision.json").read_text())["sources"]["file"]
    assert code == 0 and len(answers) == 23  # the default of 20 is for rows held out of training
    assert {answer["reference"] for answer in answers} == {"Where does it live?"}
    assert (record["rows"], record["held_out"], record["kept"], record["tokens"]) == (0, 23, 0, 0)
    assert "data.file: the run was not trained on these files, so all of their rows are held out." in log(
        tmp_path / "run"
    )


def test_of_a_file_of_questions_some_can_be_drawn(trained, tmp_path):
    path = write_jsonl(tmp_path / "probe.jsonl", question_rows(23))
    options = ["mode=evaluate", f"evaluate.run={trained}", "data=file", f"data.file.data_files={path}"]
    few = ["data.file.rows=5", "evaluate.temperature=0", "evaluate.raw_text=null"]
    assert run_command(tmp_path / "run", *options, *few)[0] == 0
    assert len(lines(tmp_path / "run" / "answers.jsonl")) == 5


def test_evaluate_without_a_run_says_what_to_write(tmp_path):
    assert run_command(tmp_path, "mode=evaluate")[0] == 2
    assert "evaluate.run is missing. Write evaluate.run=outputs/NAME/DATE" in log(tmp_path)


def test_evaluate_of_a_folder_without_a_model_says_so(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run_command(tmp_path / "run", "mode=evaluate", f"evaluate.run={tmp_path / 'empty'}")[0] == 2
    assert f"{tmp_path / 'empty'} has no .hydra/config.yaml" in capsys.readouterr().err


METRICS = ["p_stop", "exact_match", "eval_chrf", "loss_position_stop"]  # of the loss, and of answers


@pytest.mark.parametrize("metric", METRICS if ALL_TESTS else METRICS[:2])
def test_the_best_checkpoint_by_a_metric_of_ours_is_the_one_that_is_kept(tmp_path, metric):
    lower = metric.startswith("loss")
    code, _ = run_command(tmp_path, f"trainer.metric_for_best_model={metric}", *BEST)
    key = f"eval_{metric.removeprefix('eval_')}"
    found = [entry[key] for entry in read_metrics(tmp_path)["history"] if key in entry]
    assert code == 0
    after = read_metrics(tmp_path)["after"]
    name = metric.removeprefix("eval_")
    places = {"p_stop": ("held_out", "p_stop"), "loss_position_stop": ("held_out", "position", "stop")}
    for step in places.get(metric, (name,)):
        after = after[step]
    assert after == pytest.approx((min if lower else max)(found[:3]), rel=1e-4)
    assert kept(tmp_path) == f"checkpoint-{2 + 2 * found[:3].index((min if lower else max)(found[:3]))}"


def kept(folder: Path) -> str:
    """The name of the best checkpoint, as the last state of the trainer has it."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return f"checkpoint-{json.loads((last / 'trainer_state.json').read_text())['best_global_step']}"


def test_the_best_checkpoint_by_a_function_of_one_s_own(tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text(
        "calls = []\n\n\ndef earliest(answers):\n    calls.append(answers)\n    return -float(len(calls))\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    code, _ = run_command(tmp_path / "run", "trainer.metric_for_best_model=my_metric.earliest", *BEST)
    import my_metric

    assert code == 0
    history = read_metrics(tmp_path / "run")["history"]
    assert [entry["eval_my_metric.earliest"] for entry in history if "eval_my_metric.earliest" in entry] == [-1, -2, -3]
    assert kept(tmp_path / "run") == "checkpoint-2"
    assert {len(said) for said in my_metric.calls} == {12}
    assert set(my_metric.calls[0][0]) == {"prompt", "reference", "text", "stops"}


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("exact_mach", "Did you mean exact_match?"),
        ("p_stopp", "Did you mean p_stop?"),
        ("raw_text_loss", "is not measured while training."),
        ("my_metrics.missing", "trainer.metric_for_best_model=my_metrics.missing could not be imported"),
    ],
)
def test_an_unknown_metric_is_refused_in_one_line(tmp_path, metric, said):
    code, _ = run_command(tmp_path, f"trainer.metric_for_best_model={metric}", *BEST)
    assert code == 2 and not (tmp_path / "metrics.json").exists()
    line = log(tmp_path).strip().splitlines()[-1]
    assert f"trainer.metric_for_best_model={metric}" in line and said in line


def test_raw_text_alone_has_no_p_stop_to_go_by(tmp_path):
    prose = ["~data.tiny", "data.prose.share=null", "data.held_out=20", "trainer.metric_for_best_model=p_stop"]
    code, _ = run_command(tmp_path, *prose, *BEST)
    assert code == 2
    assert "metric_for_best_model=p_stop is not measured" in log(tmp_path).strip().splitlines()[-1]


def test_samples_every_asks_three_questions_on_the_way(tmp_path):
    code, _ = run_command(tmp_path, "evaluate.samples_every=3", "evaluate.temperature=0", *SHORT)
    found, asked = lines(tmp_path / "samples.jsonl"), lines(tmp_path / "answers.jsonl")[:3]
    assert code == 0
    assert [(line["step"], line["prompt"]) for line in found] == [(s, one["prompt"]) for s in (3, 6) for one in asked]
    assert [(line["text"], line["stops"]) for line in found[3:]] == [
        (one["tuned"], one["tuned_stops"]) for one in asked
    ]
    assert "Samples over training" in (tmp_path / "report.md").read_text()


def test_asking_on_the_way_changes_nothing_of_the_training(tmp_path):
    runs = {"asked": ["evaluate.samples_every=1"], "not": ["evaluate.samples_every=0"]}
    for name, more in runs.items():
        run_command(tmp_path / name, *more, *SHORT, "evaluate.raw_text=null", "adapter.lora.lora_dropout=0.1")
    losses = [[entry.get("loss") for entry in read_metrics(tmp_path / name)["history"]] for name in runs]
    assert losses[0] == losses[1]


def questions(**options) -> EvalInputs:
    return EvalInputs(TrainingData(None, None, [], {}), ["mine"], [], [], EvaluateOptions(**options), 0)


@pytest.mark.parametrize(
    ("base", "tuned", "verdict"),
    [
        (2.0, 1.9, "passed"),
        (2.0, 2.19, "passed"),
        (2.0, 2.22, "warning"),
        (2.0, 2.32, "failed"),
        (2.0, float("nan"), "failed"),
    ],
)
def test_forgetting_is_the_relative_rise_of_the_loss_on_raw_text(base, tuned, verdict):
    before, after = ({"raw_text": {"loss": loss, "bits_per_byte": loss / 3}} for loss in (base, tuned))
    found, lines = compare_measurements(before, after, questions())
    assert found["forgetting"] == {
        "change": pytest.approx((tuned - base) / base, nan_ok=True), "verdict": verdict,
        "warn_above": 0.1, "fail_above": 0.15,
    }  # fmt: skip
    assert found["bits_per_byte"] == pytest.approx(tuned / 3, nan_ok=True) and lines == []


def test_the_limits_of_forgetting_are_the_config_s():
    before, after = ({"raw_text": {"loss": loss, "bits_per_byte": 1.0}} for loss in (1.0, 1.04))
    assert (
        compare_measurements(before, after, questions(warn_above=0.01, fail_above=0.03))[0]["forgetting"]["verdict"]
        == "failed"
    )


def test_answers_stand_side_by_side_and_leave_the_metrics():
    one = {"prompt": "Hi?", "reference": "Ho."}
    before = {"exact_match": 0.0, "answers": [one | {"text": "Hi? Hi?", "stops": False, "sampled": "Hu?"}]}
    after = {"exact_match": 1.0, "stops": 1.0, "answers": [one | {"text": "Ho.", "stops": True, "sampled": "Ho!"}]}
    found, said = compare_measurements(before, after, questions())
    assert found == {
        "before": {"exact_match": 0.0}, "after": {"exact_match": 1.0, "stops": 1.0}, "exact_match": 1.0, "stops": 1.0
    }  # fmt: skip
    assert said == [
        {"prompt": "Hi?", "reference": "Ho.", "base": "Hi? Hi?", "tuned": "Ho.", "base_stops": False,
         "tuned_stops": True, "base_sampled": "Hu?", "tuned_sampled": "Ho!"}
    ]  # fmt: skip


def test_the_held_out_loss_is_flat_in_the_metrics_for_an_objective():
    held_out = {"loss": 0.5, "p_stop": 0.9, "rows": 2, "tokens": 9, "turn": {"first": 0.4}}
    found, _ = compare_measurements({"held_out": held_out}, {"held_out": held_out | {"loss": 0.3}}, questions())
    flat = {key: value for key, value in found.items() if key not in ("before", "after")}
    assert flat == {"eval_loss": 0.3, "eval_p_stop": 0.9, "eval_loss_turn_first": 0.4, "p_stop": 0.9}


def test_benchmarks_are_run_on_base_and_tuned_and_their_drop_is_reported(tiny_run, task):
    path = task("world", world_questions(8), **CHOICE)
    code, _, folder = tiny_run(f"evaluate.lm_eval=[{path}]", *SHORT_TINY_RUN, "evaluate.rows=0")
    found = read_metrics(folder)
    before, after = (found[part]["lm_eval"]["world"] for part in ("before", "after"))
    assert code == 0 and {before * 8, after * 8} <= set(range(9))
    assert found["benchmarks"]["points"] == {"world": 100 * (before - after)}
    assert "world" in (folder / "report.md").read_text()


def test_a_judge_compares_base_and_tuned_in_both_orders(tiny_run, judge_server):
    judge_server.rule = lambda question, first, second: "first"  # whatever stands first is better: no verdict holds
    judge = f"evaluate.judge={{url: '{judge_server.url}', model: fake}}"
    code, _, folder = tiny_run(judge, *SHORT_TINY_RUN, "evaluate.rows=4")
    found = read_metrics(folder)["judge"]
    assert code == 0 and (found["rows"], found["wins"], found["losses"], found["ties"]) == (4, 0, 0, 4)
    assert len(judge_server.seen) == 1 + 2 * found["inconsistent"]  # one request before training
    assert "fake" in (folder / "report.md").read_text()


def test_a_benchmark_that_is_not_there_and_a_judge_that_does_not_answer_end_the_run_before_it_begins(tiny_run):
    code, _, folder = tiny_run("evaluate.lm_eval=[nowhere.yaml]", *SHORT_TINY_RUN)
    assert code == 2 and "nowhere.yaml cannot be loaded." in (folder / "sft_recipes.log").read_text()
    code, _, folder = tiny_run("evaluate.judge={url: 'http://127.0.0.1:9/v1', model: fake}", *SHORT_TINY_RUN)
    assert code == 2 and "does not answer" in (folder / "sft_recipes.log").read_text()
    assert not (folder / "supervision.json").exists()
