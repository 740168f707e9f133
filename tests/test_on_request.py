"""What a run measures when it is asked to: benchmarks and a judge, through the command."""

from test_harness import CHOICE, questions, task  # noqa: F401
from test_judge import server  # noqa: F401
from test_training import SHORT, command, metrics  # noqa: F401


def test_benchmarks_are_run_on_base_and_tuned_and_their_drop_is_reported(command, task):  # noqa: F811
    path = task("world", questions(8), **CHOICE)
    code, _, folder = command(f"evaluate.lm_eval=[{path}]", *SHORT, "evaluate.rows=0")
    found = metrics(folder)
    before, after = (found[part]["lm_eval"]["world"] for part in ("before", "after"))
    assert code == 0 and {before * 8, after * 8} <= set(range(9))
    assert found["benchmarks"]["points"] == {"world": 100 * (before - after)}
    assert "world" in (folder / "report.md").read_text()


def test_a_judge_compares_base_and_tuned_in_both_orders(command, server):  # noqa: F811
    server.rule = lambda question, first, second: "first"  # whatever stands first is better: no verdict holds
    judge = f"evaluate.judge={{url: '{server.url}', model: fake}}"
    code, _, folder = command(judge, *SHORT, "evaluate.rows=4")
    found = metrics(folder)["judge"]
    assert code == 0 and (found["rows"], found["wins"], found["losses"], found["ties"]) == (4, 0, 0, 4)
    assert len(server.seen) == 1 + 2 * found["inconsistent"]  # one request before training
    assert "fake" in (folder / "report.md").read_text()


def test_a_benchmark_that_is_not_there_and_a_judge_that_does_not_answer_end_the_run_before_it_begins(command):  # noqa: F811
    code, _, folder = command("evaluate.lm_eval=[nowhere.yaml]", *SHORT)
    assert code == 2 and "nowhere.yaml: there is no such file." in (folder / "sft_recipes.log").read_text()
    code, _, folder = command("evaluate.judge={url: 'http://127.0.0.1:9/v1', model: fake}", *SHORT)
    assert code == 2 and "does not answer" in (folder / "sft_recipes.log").read_text()
    assert not (folder / "supervision.json").exists()
