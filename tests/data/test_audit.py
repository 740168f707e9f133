"""The ledger: each problem found in a row that has it and in no other, and done with as the policy says."""

import json
import re

import numpy as np
import pytest

from sft_recipes.data.audit import check_train_serve_parity
from sft_recipes.data.digest import audit_record, digest_rows
from sft_recipes.data.fields import RowFields
from sft_recipes.data.issues import ISSUE_BIT, ISSUES, find_issues
from sft_recipes.data.packing import pack_rows
from sft_recipes.data.prepare import load_data
from sft_recipes.data.token_rows import to_dataset
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, DataError
from support.base_tokenizers import encoder_with_template
from support.configs import data_config
from support.rows import question_rows, write_jsonl


@pytest.fixture(scope="module")
def encoder(chat_tokenizer):
    tokenizer, template, _ = chat_tokenizer("llama3", "chatml")
    return Encoder(tokenizer, template)


def say(role: str, content: str = "x", **more) -> dict:
    return {"role": role, "content": content, **more}


GOOD = {"messages": [say("user"), say("assistant")]}
ROWS = {
    "fine": (GOOD, set()),
    "fine with system and tools": (
        {
            "messages": [
                say("system"),
                say("user"),
                say("assistant"),
                say("tool"),
                say("assistant"),
                say("user"),
                say("assistant"),
            ]
        },
        set(),
    ),
    "raw text": ({"text": "prose"}, set()),
    "two questions": ({"messages": [say("user"), say("user"), say("assistant")]}, {"roles_out_of_order"}),
    "late system": ({"messages": [say("user"), say("system"), say("assistant")]}, {"roles_out_of_order"}),
    "unanswered": ({"messages": [say("user"), say("assistant"), say("user")]}, {"roles_out_of_order"}),
    "typed": ({"messages": [say("user", "<|im_end|>"), say("assistant")]}, {"typed_control_token"}),
    "untrained": ({"messages": [say("user"), say("assistant", train=False)]}, {"marked_untrained"}),
    "untrained raw text": ({"text": "prose", "train": False}, {"marked_untrained"}),
    "no question": ({"messages": [say("user", " "), say("assistant")]}, {"blank_question"}),
}


def issues_of(encoder: Encoder, rows: list[dict], formatter=None, train_on: str = "assistant") -> list[set[str]]:
    """The names of each row's issues; without a formatter the rows are conversations."""
    conversations = [formatter(row) for row in rows] if formatter else rows
    fields = RowFields(formatter or (lambda row, messages="messages", text="text": row))
    contexts = [context for each in conversations for context in encoder.contexts(each, train_on, "keep")]
    encoded = encoder.tokenized([context.pieces for context in contexts])
    found, _ = find_issues(encoder, fields, rows, contexts, encoded, train_on)
    return [{name for name in ISSUES if bits & ISSUE_BIT[name]} for bits in found]


@pytest.mark.parametrize("case", ROWS)
def test_each_problem_is_found_where_it_is(encoder, case):
    conversation, expected = ROWS[case]
    assert issues_of(encoder, [GOOD, conversation]) == [set(), expected]


DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content + "
    "eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STOP_BEHIND = DROPS_SYSTEM.replace("+ eos_token }}{% endgeneration %}", "}}{% endgeneration %}{{ eos_token }}")
TWO_ENDS = DROPS_SYSTEM.replace("{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")


@pytest.mark.parametrize(
    "template, messages, expected",
    [
        (DROPS_SYSTEM, [say("system", "Be brief."), *GOOD["messages"]], {"content_missing"}),
        (STOP_BEHIND, GOOD["messages"] * 2, {"stop_not_supervised"}),
        (TWO_ENDS, GOOD["messages"], {"double_bos_or_eos"}),
    ],
)
def test_a_template_that_loses_something_is_found_out(encoder, tmp_path, template, messages, expected):
    mine = encoder_with_template(encoder, tmp_path / "mine.jinja", template)
    assert issues_of(mine, [{"messages": messages}]) == [expected]


def test_raise_names_source_rows_problem_and_the_way_out(encoder, tmp_path):
    rows = [{"messages": [say("user"), say("user"), say("assistant")]}, GOOD]
    setting = data_config(
        groups={"data_checks": {"roles_out_of_order": "raise"}},
        file={"data_files": write_jsonl(tmp_path / "rows.jsonl", rows)},
        held_out=0,
    )
    line = (
        "data.file: 1 of 2 rows has roles_out_of_order (row 0…): their turns do not alternate. "
        "Fix them, or write data_checks.roles_out_of_order=drop (or keep)."
    )
    with pytest.raises(DataError, match=re.escape(line)):
        load_data(setting, encoder, 64)


def test_drop_drops_and_counts_and_keep_keeps_and_counts(encoder, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*question_rows(5), *question_rows(3)])
    for policy, kept in (("drop", 5), ("keep", 8)):
        setting = data_config(groups={"data_checks": {"duplicate": policy}}, file={"data_files": path}, held_out=0)
        audit = load_data(setting, encoder, 64).audit["file"]
        assert audit["problems"] == {"duplicate": {"rows": 3, "policy": policy, "first": [5, 6, 7]}}
        assert (audit["rows"], audit["kept"]) == (8, kept)


def test_rows_that_are_also_held_out_are_dropped_from_training(encoder, tmp_path):
    files = {
        "train": write_jsonl(tmp_path / "a.jsonl", question_rows(6)),
        "test": write_jsonl(tmp_path / "b.jsonl", question_rows(2, first=4)),
    }
    data = load_data(data_config(file={"data_files": files, "held_out_split": "test"}), encoder, 64)
    assert data.audit["file"]["problems"]["in_held_out"] == {"rows": 2, "policy": "drop", "first": [4, 5]}
    assert sorted(data.train["row"]) == [0, 1, 2, 3]


def test_no_row_left_is_an_error(encoder, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", question_rows(3))
    with pytest.raises(DataError, match="no row is left to train on"):
        load_data(data_config(file={"data_files": path}, held_out=0, max_length_policy="drop"), encoder, 4)


def test_rows_that_are_cut_to_nothing_are_counted(encoder, tmp_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [*question_rows(1), {"instruction": "long " * 60, "input": "", "output": "Yes."}]
    )
    data = load_data(data_config(file={"data_files": path}, held_out=0, max_length_policy="keep"), encoder, 32)
    whole = encoder.encode([{"messages": [say("user", "long " * 60), say("assistant", "Yes.")]}])["input_ids"][0]
    assert data.audit["file"]["problems"] == {
        "truncated": {"rows": 1, "policy": "keep", "first": [1], "tokens": len(whole) - 32},
        "fully_truncated": {"rows": 1, "policy": "drop", "first": [1], "tokens": 32},
    }


def test_a_template_that_serves_another_prompt_than_it_trains_is_refused(encoder, tmp_path):
    other = DROPS_SYSTEM.replace("assistant: {% endif %}", "bot: {% endif %}")
    with pytest.raises(ConfigError, match="shows …'.*bot: ' when it is served"):
        encoder_with_template(encoder, tmp_path / "mine.jinja", other)


def test_a_conversation_that_the_assistant_opens_is_trained(encoder, tmp_path):
    opened = {"messages": [say("assistant", "Hello!"), say("user"), say("assistant")]}
    data = load_data(
        data_config(file={"data_files": write_jsonl(tmp_path / "rows.jsonl", [opened])}, held_out=0), encoder, 64
    )
    assert data.audit["file"]["problems"]["roles_out_of_order"]["rows"] == 1


def test_earlier_answers_that_merge_with_a_line_break_are_no_other_context(encoder):
    check_train_serve_parity(
        encoder, [{"messages": [say("user"), say("assistant", "\n\nHm."), say("user"), say("assistant")]}]
    )


def test_a_template_that_changes_earlier_answers_is_refused(encoder, tmp_path):
    talk = [say("user"), say("assistant", "long"), say("user"), say("assistant", "short")]
    with pytest.raises(ConfigError, match="before an answer, serving"):
        check_train_serve_parity(
            encoder_with_template(encoder, tmp_path / "mine.jinja", CUTS_WHEN_SERVED), [{"messages": talk}]
        )


def test_a_row_with_another_context_is_told_before_a_later_one_that_the_template_refuses(encoder, tmp_path):
    template = CUTS_WHEN_SERVED + "{% if messages[0].content == 'no' %}{{ raise_exception('No.') }}{% endif %}"
    talk = [say("user"), say("assistant", "long"), say("user"), say("assistant", "short")]
    rows = [{"messages": talk}, {"messages": [say("user", "no"), say("assistant")]}]
    mine = encoder_with_template(encoder, tmp_path / "mine.jinja", template)
    with pytest.raises(ConfigError, match="before an answer, serving"):
        check_train_serve_parity(mine, rows)
    with pytest.raises(DataError, match="No."):
        check_train_serve_parity(mine, rows[1:])


CUTS_WHEN_SERVED = DROPS_SYSTEM.replace(
    "{{ m.content + eos_token }}", "{{ m.content[:1] if add_generation_prompt else m.content }}{{ eos_token }}"
)


def some_rows(shift: int = 0):
    documents = [np.arange(n, 2 * n + shift, dtype=np.int32) for n in range(3, 30)]
    numbers = {"source": np.zeros(27, dtype=int), "row": np.arange(27)}
    return to_dataset({"input_ids": documents, "labels": documents}, numbers)


def test_the_digest_is_of_lengths_ids_and_labels_in_order():
    import hashlib

    rows = some_rows()
    expected = hashlib.sha256()
    for row in rows:
        for values in (row["input_ids"], row["labels"]):
            expected.update(len(values).to_bytes(4, "little"))
            expected.update(b"".join(value.to_bytes(4, "little", signed=True) for value in values))
    assert digest_rows(rows)["sha256"] == expected.hexdigest()


def test_another_token_or_order_or_packing_is_another_digest():
    rows = some_rows()
    found = [
        digest_rows(r)["sha256"]
        for r in (rows, some_rows(1), rows.select(range(26, -1, -1)), pack_rows(rows, 64, 0), pack_rows(rows, 64, 1))
    ]
    assert len(set(found)) == 5


def test_supervision_json_has_what_a_run_was_trained_on(encoder, tmp_path):
    data = load_data(
        data_config(file={"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(5))}, held_out=0),
        encoder,
        64,
    )
    written = json.loads(json.dumps(audit_record(data.audit, digest_rows(data.train), {"name": "x"})))
    assert set(written) == {"digest", "sources", "versions", "config"}
    assert written["sources"]["file"]["kept"] == 5 and written["versions"]["trl"].startswith("1.16")
