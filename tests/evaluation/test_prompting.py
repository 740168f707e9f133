"""Would a prompt have done it? The base behind a system prompt and a few rows with their answers."""

import pytest

from sft_recipes.config.options import EvaluateOptions
from sft_recipes.errors import ConfigError
from sft_recipes.evaluation.generation import generate_answers
from sft_recipes.evaluation.prompting import prompt_questions
from sft_recipes.reporting.document import render_lines
from sft_recipes.reporting.result_tables import result_table
from support.commands import read_metrics, run_command
from support.small_models import Parrot


def talk(*texts: str) -> dict:
    return {
        "messages": [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    }


ROWS = [talk("1+1?", "2"), talk("1+2?", "3"), talk("a", "b", "c", "d"), {"text": "prose"}]
SHOTS = EvaluateOptions(few_shot=2)


def test_in_plain_text_rows_come_first_and_the_question_last():
    (one,) = prompt_questions([talk("2+2?", "4")], ROWS, EvaluateOptions(few_shot=2, system="Sums."), 0, None)
    first, second = one["prompt_text"].split("\n\n")[1:5:2]
    assert {first, second} == {"User: 1+1?", "User: 1+2?"}
    assert one["prompt_text"].startswith("Sums.\n\nUser: 1+")
    assert one["prompt_text"].endswith("\n\nUser: 2+2?\n\nAssistant:")
    assert "Assistant: 2" in one["prompt_text"] and "Assistant: 4" not in one["prompt_text"]


def test_with_a_template_of_its_own_they_are_turns(chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("tiny", "chatml")
    (one,) = prompt_questions([talk("2+2?", "4")], ROWS[:1], EvaluateOptions(few_shot=1, system="Sums."), 0, tokenizer)
    assert one == {
        "messages": [{"role": "system", "content": "Sums."}, *ROWS[0]["messages"], *talk("2+2?", "4")["messages"]]
    }


def test_a_question_is_never_its_own_example_and_too_few_rows_are_refused():
    asked = [talk("1+1?", "2"), talk("1+2?", "3")]
    for one in prompt_questions(asked, ROWS, EvaluateOptions(few_shot=1), 0, None):
        texts = [message["content"] for message in one["messages"]]
        assert len(set(texts)) == 4
    with pytest.raises(ConfigError, match="evaluate.few_shot=2: rows with one question and its answer: 1"):
        prompt_questions(asked, ROWS, SHOTS, 0, None)


def test_a_system_prompt_that_the_template_leaves_out_is_refused(chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("tiny", "chatml")
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="evaluate.system: the chat template leaves out system messages"):
        prompt_questions([talk("2+2?", "4")], ROWS, EvaluateOptions(system="Sums."), 0, tokenizer)


def test_the_answer_to_plain_text_ends_where_the_next_question_begins(chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("tiny", "chatml")
    said = tokenizer(" Figs.\n\nUser: What else?", add_special_tokens=False).input_ids
    parrot, question = Parrot([said], 0), talk("Which?", "Figs.") | {"prompt_text": "User: Which?\n\nAssistant:"}
    (found,) = generate_answers(parrot, tokenizer, [question], 1, len(said))
    assert (found["text"], found["stops"]) == ("Figs.", True)
    assert parrot.input_ids.tolist() == [tokenizer("User: Which?\n\nAssistant:").input_ids]
    (found,) = generate_answers(Parrot([said[:3]], 0), tokenizer, [question], 1, 3)
    assert found["stops"] is False


def test_it_stands_between_base_and_tuned_and_is_described():
    prompted = {"exact_match": 0.5, "system": True, "few_shot": 1, "as_text": True}
    metrics = {"before": {"exact_match": 0.0, "prompted": prompted}, "exact_match": 1.0}
    assert result_table(metrics) == [["", "base", "prompted", "tuned"], ["exact match", "0.0%", "50.0%", "100.0%"]]
    assert render_lines("prompt.jinja", metrics=metrics) == [
        "Prompted is the base model behind a system prompt and 1 row with their answers, as plain text, since it came "
        "without a chat template."
    ]


def test_a_run_measures_it_and_evaluating_again_gives_the_same(tmp_path):
    options = ["evaluate.few_shot=2", "evaluate.rows=6", "evaluate.max_new_tokens=16", "evaluate.temperature=0"]
    assert run_command(tmp_path / "run", "trainer.max_steps=2", *options)[0] == 0
    first = read_metrics(tmp_path / "run")["before"]["prompted"]
    assert (first["rows"], first["few_shot"], first["as_text"]) == (6, 2, True)
    assert "| prompted" in (tmp_path / "run" / "report.md").read_text()
    again = ["mode=evaluate", f"evaluate.run={tmp_path / 'run'}", *options]
    assert run_command(tmp_path / "again", *again)[0] == 0
    assert read_metrics(tmp_path / "again")["before"]["prompted"] == pytest.approx(first)
