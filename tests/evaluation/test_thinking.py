"""Thoughts before an answer: told apart from it, counted, and missed where fine-tuning took them away."""

import pytest

from sft_recipes.evaluation.generation import generate_answers
from sft_recipes.evaluation.thinking import score_thoughts, split_thought
from sft_recipes.reporting.document import render_lines
from sft_recipes.reporting.result_tables import result_table
from support.small_models import Parrot


@pytest.mark.parametrize(
    ("text", "prompt", "thought", "answer"),
    [
        ("<think>\nTwo.\n</think>\n\nFour.", "<|im_start|>assistant\n", "Two.", "Four."),  # Qwen 3
        ("Two.\n</think>\n\nFour.", "<|im_start|>assistant\n<think>\n", "Two.", "Four."),  # its thinking-only releases
        ("Two. And so", "<|im_start|>assistant\n<think>\n", "Two. And so", ""),  # cut within the thought
        ("<think>\n\n</think>\n\nFour.", "<|im_start|>assistant\n", "", "Four."),
        ("Four.", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "", "Four."),  # enable_thinking=false
        ("<|channel>thought\nTwo.<channel|>Four.", "<|turn>model\n", "Two.", "Four."),  # Gemma 4
        (
            "<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>final<|message|>Four.",
            "<|start|>assistant", "Two.", "Four.",
        ),  # gpt-oss
        ("<|channel|>final<|message|>Four.", "<|start|>assistant", "", "Four."),
        ("[THINK]Two.[/THINK]Four.", "[/INST]", "Two.", "Four."),
        ("I <think> so.", "<|im_start|>assistant\n", "", "I <think> so."),
    ],
)  # fmt: skip
def test_a_thought_is_told_apart_from_its_answer(text, prompt, thought, answer):
    assert split_thought(text, prompt) == (thought, answer)


def test_thoughts_are_counted_measured_and_looked_behind():
    answers = [
        {"text": "Four.", "thought": "a", "thought_tokens": 10}, {"text": " ", "thought": "b", "thought_tokens": 30},
        {"text": "Four.", "thought": "c", "thought_tokens": 20}, {"text": "Four."},
    ]  # fmt: skip
    assert score_thoughts(answers) == {"share": 0.75, "tokens": 20, "answered": pytest.approx(2 / 3)}
    assert score_thoughts(answers[3:]) == {"share": 0}


def test_an_answer_is_compared_with_its_reference_without_the_thoughts_of_both(chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("tiny", "chatml")
    said = tokenizer("<think>toad</think>Figs.", add_special_tokens=False).input_ids
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "<think>a fox</think>Figs."}]
    (found,) = generate_answers(Parrot([said], 0), tokenizer, [{"messages": messages}], 1, len(said))
    assert (found["text"], found["reference"], found["thought"]) == ("Figs.", "Figs.", "toad")
    assert found["thought_tokens"] == len(tokenizer("toad", add_special_tokens=False).input_ids)


def metrics(base: dict, tuned: dict) -> dict:
    names = {"share": "thinks", "tokens": "thought_tokens", "answered": "answered"}
    tops = {names[key]: value for key, value in tuned.items()}
    return {"before": {"thinking": base}, "after": {"thinking": tuned}} | tops


def test_base_and_tuned_stand_in_the_table():
    base, tuned = {"share": 0.9, "tokens": 311.2, "answered": 0.8}, {"share": 0.0}
    assert result_table(metrics(base, tuned)) == [
        ["", "base", "tuned"],
        ["thinks before it answers", "90.0%", "0.0%"],
        ["tokens of a thought", "311", ""],
        ["answers after its thought", "80.0%", ""],
    ]


def test_a_fall_of_the_share_is_a_warning_with_the_way_out():
    assert render_lines("warnings.jinja", metrics=metrics({"share": 0.9}, {"share": 0.85})) == []
    assert render_lines("warnings.jinja", metrics=metrics({"share": 0.1}, {"share": 0.9})) == []
    (warning,) = render_lines("warnings.jinja", metrics=metrics({"share": 0.9}, {"share": 0.05}))
    assert warning.startswith(
        "Thinking: 90% of the base model's answers begin with a thought, 5% of the tuned model's."
    )
    assert "train on rows with them" in warning and "enable_thinking: false" in warning


def test_thoughts_without_an_answer_behind_them_are_a_warning():
    assert (
        render_lines(
            "warnings.jinja", metrics=metrics({"share": 1.0, "answered": 0.1}, {"share": 1.0, "answered": 0.95})
        )
        == []
    )
    (warning,) = render_lines(
        "warnings.jinja", metrics=metrics({"share": 1.0, "answered": 1.0}, {"share": 1.0, "answered": 0.4})
    )
    assert "40% of the tuned model's thoughts are followed by an answer" in warning and "max_new_tokens" in warning
