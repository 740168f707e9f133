"""Pairwise judgement, against a server on this machine that speaks OpenAI's protocol and judges by a rule."""

import json

import pytest

from sft_recipes.config.validation import call_validated
from sft_recipes.errors import ConfigError
from sft_recipes.evaluation.judge import JudgeOptions, check_judge, run_judge
from support.judge_server import PARTS, Judge


def answers(*pairs: tuple[str, str]) -> list[dict]:
    """Lines of answers.jsonl, each with what the base and the tuned model said."""
    return [
        {"prompt": f"question {place}", "reference": "r", "base": base, "tuned": tuned}
        for place, (base, tuned) in enumerate(pairs)
    ]


def options(server: Judge, **fields) -> JudgeOptions:
    return JudgeOptions(url=server.url, model="fake", **fields)


def better(question: str, first: str, second: str) -> str:
    """The rule of a fair judge: the answer with more exclamation marks."""
    a, b = first.count("!"), second.count("!")
    return "tie" if a == b else "first" if a > b else "second"


def test_wins_losses_and_ties_are_the_tuned_models_in_both_orders(judge_server):
    judge_server.rule = better
    rows = answers(("a", "b!"), ("a", "b!!"), ("a!", "b"), ("a", "b"), ("same", "same"))
    found = run_judge(rows, options(judge_server, price_per_million_input=2.0, price_per_million_output=8.0))
    assert found == {
        "rows": 5, "wins": 2, "ties": 2, "losses": 1, "inconsistent": 0, "unparsed": 0, "failed": 0,
        "model": "fake", "error": None, "win_rate": 0.6,
        "interval": [0.2307, 0.8824],  # of 3 in 5, as scipy.stats.binomtest(3, 5).proportion_ci(method="wilson") has it
        "input_tokens": 800, "output_tokens": 80, "cost": 0.00224,  # 800 · 2/10⁶ + 80 · 8/10⁶
        "verdicts": [
            {"row": 0, "verdict": "win", "base_first": "tuned", "tuned_first": "tuned"},
            {"row": 1, "verdict": "win", "base_first": "tuned", "tuned_first": "tuned"},
            {"row": 2, "verdict": "loss", "base_first": "base", "tuned_first": "base"},
            {"row": 3, "verdict": "tie", "base_first": "tie", "tuned_first": "tie"},
            {"row": 4, "verdict": "tie"},
        ],
    }  # fmt: skip
    assert len(judge_server.seen) == 8  # the same answer twice is not asked about


def test_each_pair_is_sent_in_both_orders_once_without_a_line_in_the_log(judge_server, caplog):
    caplog.set_level("INFO")
    run_judge(answers(("x", "y"), ("v", "w")), options(judge_server))
    sent = [PARTS.search(request["messages"][0]["content"]).groups() for _, _, request in judge_server.seen]
    assert not caplog.text
    assert sorted(sent) == [
        ("question 0", "x", "y"), ("question 0", "y", "x"), ("question 1", "v", "w"), ("question 1", "w", "v"),
    ]  # fmt: skip
    path, headers, request = judge_server.seen[0]
    assert path == "/v1/chat/completions"
    assert (request["model"], request["temperature"]) == ("fake", 0.0)
    assert headers["authorization"] == "Bearer none"


@pytest.mark.parametrize("rule", [lambda *_: "first", lambda q, first, second: "tie" if first == "x" else "first"])
def test_a_judge_who_goes_by_the_order_gives_ties(judge_server, rule):
    judge_server.rule = rule
    found = run_judge(answers(("x", "y")), options(judge_server))
    assert (found["wins"], found["ties"], found["losses"], found["inconsistent"]) == (0, 1, 0, 1)


def test_what_is_no_verdict_is_unparsed_and_counts_in_no_rate(judge_server):
    judge_server.rule = lambda question, first, second: (
        "hard to say" if question == "question 0" else better("", first, second)
    )
    found = run_judge(answers(("x", "y"), ("x", "y!")), options(judge_server))
    assert (found["rows"], found["wins"], found["unparsed"], found["win_rate"]) == (2, 1, 1, 1.0)


def test_a_busy_server_is_asked_again_and_says_how_long_to_wait(judge_server):
    judge_server.rule = better
    judge_server.failures = [(429, {"Retry-After": "7"}), (503, {}), (500, {})]
    found = run_judge(answers(("x", "y!")), options(judge_server, concurrency=1))
    assert (found["wins"], found["failed"]) == (1, 0)
    assert judge_server.waits[0] == 7 and len(judge_server.waits) == 3


@pytest.mark.parametrize("code, requests", [(500, 6), (400, 1)])
def test_a_request_that_fails_for_good_is_reported_and_ends_nothing(judge_server, monkeypatch, code, requests):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    judge_server.rule = better
    judge_server.failures = [(code, {})] * requests
    found = run_judge(answers(("x", "y!"), ("x", "y!")), options(judge_server, concurrency=1))
    assert (found["wins"], found["failed"], found["win_rate"]) == (1, 1, 1.0)
    assert found["error"].startswith(f"Error code: {code} ") and "secret-key" not in json.dumps(found)
    assert judge_server.seen[0][1]["authorization"] == "Bearer secret-key"


def test_a_server_that_speaks_something_else_gives_no_rate(judge_server):
    judge_server.body = b"<html>hello</html>"
    found = run_judge(answers(("x", "y")), options(judge_server))
    assert (found["failed"], found["win_rate"], found["interval"]) == (1, None, None)


def test_tokens_that_are_not_counted_have_no_cost(judge_server):
    judge_server.usage = None
    found = run_judge(
        answers(("x", "y")), options(judge_server, price_per_million_input=1.0, price_per_million_output=1.0)
    )
    assert (found["input_tokens"], found["output_tokens"], found["cost"]) == (None, None, None)
    judge_server.usage = {"prompt_tokens": 1, "completion_tokens": 1}
    assert run_judge(answers(("x", "y")), options(judge_server))["cost"] is None  # no price


def test_rows_and_temperature_and_a_prompt_of_ones_own(judge_server, tmp_path):
    (tmp_path / "mine.txt").write_text("{prompt}|{reference}|{first}|{second}")
    mine = options(judge_server, rows=1, temperature=None, prompt=str(tmp_path / "mine.txt"), api_key_env="MINE")
    assert run_judge(answers(("x {second}", "y"), ("x", "y")), mine)["rows"] == 1
    sent = {request["messages"][0]["content"] for _, _, request in judge_server.seen}
    assert sent == {"question 0|r|x {second}|y", "question 0|r|y|x {second}"}
    assert all("temperature" not in request for _, _, request in judge_server.seen)


def test_a_judge_that_answers_passes_the_check(judge_server):
    check_judge(options(judge_server))
    assert len(judge_server.seen) == 1


def test_a_key_that_is_refused_is_told_before_training(judge_server):
    judge_server.failures = [(401, {})]
    with pytest.raises(ConfigError) as caught:
        check_judge(options(judge_server))
    line = str(caught.value)
    assert (
        line.startswith(f"evaluate.judge: fake at {judge_server.url} does not answer: Error code: 401 ")
        and "\n" not in line
    )
    assert line.endswith("There is no key in OPENAI_API_KEY.")


def test_a_judge_that_is_not_there_is_told_before_training():
    with pytest.raises(ConfigError, match="evaluate.judge: fake at http://127.0.0.1:9/v1 does not answer: .*refused"):
        check_judge(JudgeOptions(url="http://127.0.0.1:9/v1", model="fake"))


@pytest.mark.parametrize(
    "fields, line",
    [
        ({"url": "localhost:8000"}, "evaluate.judge.url=localhost:8000 should be an address such as https://HOST/v1."),
        ({"url": "http://[::1"}, "evaluate.judge.url=http://[::1 should be an address such as https://HOST/v1."),
        ({"prompt": "nowhere.txt"}, "evaluate.judge.prompt=nowhere.txt: there is no such file."),
        ({"api_key": "sk-1"}, "evaluate.judge.api_key is not a field of evaluate.judge. Did you mean api_key_env?"),
    ],
)
def test_a_wrong_option_gets_a_line(fields, line):
    with pytest.raises(ConfigError) as caught:
        call_validated(JudgeOptions, {"url": "http://x/v1", "model": "fake"} | fields, "evaluate.judge")
    assert str(caught.value) == line


def test_a_prompt_without_a_place_for_an_answer_gets_a_line(tmp_path):
    (tmp_path / "mine.txt").write_text("{prompt} {first}")
    with pytest.raises(ConfigError, match=r"mine.txt should hold \{second\}.$"):
        JudgeOptions(url="http://x/v1", model="fake", prompt=str(tmp_path / "mine.txt"))
