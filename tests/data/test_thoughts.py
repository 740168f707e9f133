"""Thinking models stay thinking: a thought that says nothing carries no loss, and rows are counted by whether they think."""

import logging
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from sft_recipes.data.prepare import load_data
from sft_recipes.data.streaming import load_stream
from sft_recipes.encoding.chat_template import prepare_tokenizer
from sft_recipes.encoding.encoder import IGNORE_INDEX, Encoder
from sft_recipes.errors import DataError
from support.configs import data_config
from support.paths import TINY_MODEL
from support.rows import write_jsonl

QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
PLAIN = {"messages": [{"role": "user", "content": "Which city?"}, {"role": "assistant", "content": "Paris."}]}
THINKS = {"messages": [PLAIN["messages"][0], PLAIN["messages"][1] | {"reasoning_content": "In France."}]}
EMPTY = "<think>\n\n</think>\n\n"


def qwen3(train_empty_thoughts: bool = False) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    control = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer.add_special_tokens({"extra_special_tokens": control}, replace_extra_special_tokens=False)
    tokenizer.chat_template = QWEN3
    return Encoder(tokenizer, prepare_tokenizer(tokenizer)[0], train_empty_thoughts)


def trained(encoder: Encoder, row: dict) -> str:
    """The text with loss."""
    ids, labels = (encoder.encode([row])[key][0] for key in ("input_ids", "labels"))
    return encoder.tokenizer.decode(ids[labels != IGNORE_INDEX])


def audit_of(path: Path, rows: list[dict], policy: str = "mask") -> dict:
    setting = data_config(
        groups={"data_checks": {"empty_thought": policy}}, file={"data_files": write_jsonl(path, rows)}, held_out=0
    )
    return load_data(setting, qwen3(policy == "keep"), 512).audit["file"]


def test_a_thought_that_the_template_inserts_carries_no_loss_and_one_of_the_row_s_own_does():
    assert trained(qwen3(), PLAIN) == "Paris.<|im_end|>"
    assert trained(qwen3(), THINKS) == "<think>\nIn France.\n</think>\n\nParis.<|im_end|>"


def test_keep_trains_the_empty_thought():
    assert trained(qwen3(train_empty_thoughts=True), PLAIN) == f"{EMPTY}Paris.<|im_end|>"


def test_an_empty_thought_that_a_row_spells_out_is_none_of_its_words(chat_tokenizer):
    tokenizer, template, _ = chat_tokenizer("tiny", "chatml")
    said = {"messages": [PLAIN["messages"][0], {"role": "assistant", "content": f"{EMPTY}Paris."}]}
    assert trained(Encoder(tokenizer, template), said) == "Paris.<|im_end|>"
    assert Encoder(tokenizer, template).contexts(said)[0].notes == {"empty_thought"}


def test_rows_with_and_without_thoughts_are_counted_and_both_are_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        audit = audit_of(tmp_path / "rows.jsonl", [PLAIN, THINKS, PLAIN])
    assert audit["thoughts"] == {"with": 1, "without": 2}
    assert audit["problems"]["empty_thought"] == {"rows": 2, "policy": "mask", "first": [0, 2]}
    assert "data.file: 1 row has a thought before the answer and 2 rows have none" in caplog.text


def test_a_stream_counts_the_rows_that_think_once(tmp_path):
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", [PLAIN, THINKS, PLAIN]), "streaming": True}
    _, stream = load_stream(data_config(file=file, held_out=0), qwen3(), 512, packing=False)
    assert len(list(stream.one_pass())) == 3
    assert stream.audit["file"]["thoughts"] == {"with": 1, "without": 2}


@pytest.mark.parametrize(("policy", "kept"), [("mask", 3), ("keep", 3), ("drop", 1)])
def test_the_policy_decides_about_rows_with_an_empty_thought(tmp_path, policy, kept):
    audit = audit_of(tmp_path / "rows.jsonl", [PLAIN, THINKS, PLAIN], policy)
    assert (audit["kept"], audit["problems"]["empty_thought"]["policy"]) == (kept, policy)


def test_raise_says_what_an_empty_thought_teaches(tmp_path):
    with pytest.raises(DataError, match="empty_thought .* teach a model not to think"):
        audit_of(tmp_path / "rows.jsonl", [PLAIN, THINKS], "raise")


def test_rows_of_their_own_are_counted_with_their_tokens(tmp_path):
    turns = {"messages": [*THINKS["messages"], *THINKS["messages"]]}
    audit = audit_of(tmp_path / "rows.jsonl", [turns])
    first = len(qwen3().encode([THINKS])["input_ids"][0])
    assert audit["problems"]["unrolled"] == {"rows": 1, "policy": "auto", "first": [0], "tokens": first}
    assert (audit["rows"], audit["kept"]) == (1, 2)


def test_a_source_s_settings_reach_its_rows_and_a_row_s_own_win(tmp_path):
    thinking_off = {"chat_template_kwargs": {"enable_thinking": False}}
    rows = [PLAIN, PLAIN | {"chat_template_kwargs": {"enable_thinking": True}}]
    setting = data_config(file={"data_files": write_jsonl(tmp_path / "rows.jsonl", rows)} | thinking_off, held_out=0)
    audit = load_data(setting, qwen3(), 512).audit["file"]
    assert audit["problems"]["empty_thought"]["first"] == [1]  # of the first one the prompt has it
