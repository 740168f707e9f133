"""Sources, held-out rows, mixtures, lengths, and the lines a broken row gets."""

import re
import sys

import numpy as np
import pytest

from sft_recipes.data.prepare import load_data
from sft_recipes.data.token_rows import flat_values, row_arrays
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, DataError
from support.configs import data_config
from support.rows import question_rows, write_jsonl


@pytest.fixture(scope="module")
def encoder(chat_tokenizer):
    tokenizer, template, _ = chat_tokenizer("llama3", "chatml")
    return Encoder(tokenizer, template)


def test_an_alpaca_file_is_recognised_by_its_columns(encoder, tmp_path):
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(10))}
    data = load_data(data_config(file=file, held_out=0), encoder, 64)
    assert len(data.train) == 10
    texts = {encoder.tokenizer.decode(ids) for ids in row_arrays(data.train, "input_ids")}
    assert "<|im_start|>user\nQuestion 3?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n" in texts


def test_held_out_rows_are_not_trained_on(encoder, tmp_path):
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(50))}
    data = load_data(data_config(file=file, held_out=0.2), encoder, 64)
    trained, out = set(data.train["row"]), set(data.held_out["row"])
    assert (len(trained), len(out), trained & out) == (40, 10, set())
    assert {question["messages"][0]["content"] for question in data.questions} == {f"Question {n}?" for n in out}


def test_a_smoke_run_holds_out_few_of_its_few_rows(encoder, tmp_path):
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(300))}
    data = load_data(
        data_config(file=file, held_out=2000, groups={"smoke": True}), encoder, 64
    )  # more than a source gives
    assert (len(data.train), len(data.held_out)) == (180, 20)


def test_a_number_of_held_out_rows_is_a_number(encoder, tmp_path):
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(50))}
    assert len(load_data(data_config(file=file, held_out=7), encoder, 64).held_out) == 7


def test_rows_held_out_by_length_are_of_every_length(encoder, tmp_path):
    rows = (
        question_rows(30)
        + question_rows(10, first=30, answer="Yes. " * 8)
        + question_rows(10, first=40, answer="No. " * 20)
    )
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", rows)}
    data = load_data(data_config(file=file, held_out=10, held_out_by_length=True), encoder, 200)
    kinds = [0 if row < 30 else 1 if row < 40 else 2 for row in data.held_out["row"]]
    assert [kinds.count(kind) for kind in range(3)] == [6, 2, 2]


def test_a_split_of_its_own_can_be_held_out(encoder, tmp_path):
    files = {
        "train": write_jsonl(tmp_path / "a.jsonl", question_rows(5)),
        "test": write_jsonl(tmp_path / "b.jsonl", question_rows(3, first=90)),
    }
    data = load_data(data_config(file={"data_files": files, "held_out_split": "test"}, held_out=0.5), encoder, 64)
    assert (len(data.train), len(data.held_out)) == (5, 3)
    assert data.questions[0]["messages"][0]["content"] == "Question 90?"


def test_the_seed_decides_the_order(encoder, tmp_path):
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(30))}
    orders = [load_data(data_config(file=file, held_out=0), encoder, 64).train["row"][:] for _ in range(2)]
    assert orders[0] == orders[1] != list(range(30))


def test_a_share_is_a_share_of_the_mixture(encoder, tmp_path):
    a = {"data_files": write_jsonl(tmp_path / "a.jsonl", question_rows(90))}
    b = {"data_files": write_jsonl(tmp_path / "b.jsonl", [{"text": "prose"}] * 50), "share": 0.1}
    data = load_data(data_config(a=a, b=b, held_out=0), encoder, 64)
    assert np.bincount(flat_values(data.train, "source")).tolist() == [90, 10]
    assert data.audit["b"]["kept"] == 10


def test_a_broken_row_is_named_by_index_line_and_field(encoder, tmp_path):
    broken = [*question_rows(4), {"instruction": "Q?", "input": "", "output": " "}]
    path = write_jsonl(tmp_path / "rows.jsonl", broken, blank_lines=2)
    with pytest.raises(DataError, match=re.escape(f"data.file row 4 ({path}, line 7): output is blank.")):
        load_data(data_config(file={"data_files": path}, held_out=0), encoder, 64)


def test_a_row_that_the_template_refuses_is_named(chat_tokenizer, tmp_path):
    tokenizer, template, _ = chat_tokenizer("llama3", "vicuna")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tool = [*talk, {"role": "tool", "content": "x"}, talk[1]]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk}, {"messages": tool}])
    with pytest.raises(DataError, match=r"data.file row 1 .*vicuna template has no place for tool messages"):
        load_data(data_config(file={"data_files": path}, held_out=0), Encoder(tokenizer, template), 64)


def test_few_long_rows_are_dropped_with_a_count(encoder, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*question_rows(199), *question_rows(1, answer="long " * 99)])
    data = load_data(data_config(file={"data_files": path}, held_out=0), encoder, 64)
    assert (len(data.train), data.audit["file"]["problems"]["truncated"]["rows"]) == (199, 1)


def test_many_long_rows_are_refused_with_the_length_that_keeps_99_percent(encoder, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*question_rows(9), *question_rows(1, answer="x " * 40)])
    length = len(load_data(data_config(file={"data_files": path}, held_out=0), encoder, None).train[:]["input_ids"][0])
    longest = max(
        map(len, load_data(data_config(file={"data_files": path}, held_out=0), encoder, None).train[:]["input_ids"])
    )
    with pytest.raises(
        DataError, match=rf"1 of 10 rows \(10.0%\) is longer than trainer.max_length=64; {longest} keeps 99 %"
    ):
        load_data(data_config(file={"data_files": path}, held_out=0), encoder, 64)
    assert length < longest


@pytest.mark.parametrize("policy, rows, longest", [("drop", 9, 21), ("keep", 10, 64)])
def test_the_policy_for_long_rows_is_a_choice(encoder, tmp_path, policy, rows, longest):
    path = write_jsonl(tmp_path / "rows.jsonl", [*question_rows(9), *question_rows(1, answer="x " * 90)])
    data = load_data(data_config(file={"data_files": path}, held_out=0, max_length_policy=policy), encoder, 64)
    assert len(data.train) == rows
    assert (max(map(len, data.train["input_ids"])) == 64) == (longest == 64)


def test_a_user_s_own_formatter_is_module_dot_function(encoder, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def rows(row, asked='q'):\n"
        "    return {'messages': [{'role': 'user', 'content': row[asked]}, {'role': 'assistant', 'content': row['a']}]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": "Hi", "a": "Hello!"}])
    file = {"data_files": path, "formatter": {"name": "mine.rows", "asked": "q"}}
    data = load_data(data_config(file=file, held_out=0), encoder, 64)
    assert "Hello!" in encoder.tokenizer.decode(data.train[0]["input_ids"])
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    "formatter, line",
    [
        ("alpacca", "data.file.formatter=alpacca is no formatter. Did you mean alpaca?"),
        ("nowhere.rows", "data.file.formatter=nowhere.rows could not be imported: No module named 'nowhere'."),
        (
            {"name": "alpaca", "outptu": "x"},
            "data.file.formatter.outptu is not a field of alpaca. Did you mean output?",
        ),
        ("chatml", "chatml needs 'messages', the row has instruction, input, output."),
    ],
)
def test_a_wrong_formatter_gets_a_line_that_helps(encoder, tmp_path, formatter, line):
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(3)), "formatter": formatter}
    with pytest.raises((ConfigError, DataError), match=re.escape(line)):
        load_data(data_config(file=file, held_out=0), encoder, 64)


def test_a_root_formatter_that_no_source_uses_is_an_error():
    with pytest.raises(ConfigError, match="formatter=alpaca is used by no source: a have their own."):
        data_config(formatter="alpaca", a={"path": "x", "formatter": "chatml"})


def test_no_nulls_of_arrow_s_merged_structs_reach_the_template(encoder, tmp_path):
    def call(**arguments):
        return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}

    rows = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "", "tool_calls": [call(x=1)]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "", "tool_calls": [call(y="b")]},
            ]
        },
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = load_data(data_config(file={"data_files": path}, held_out=0), encoder, None)
    texts = [encoder.tokenizer.decode(ids) for ids in row_arrays(data.train, "input_ids")]
    assert sorted(re.search(r'"arguments": (.*)}\n', text)[1] for text in texts) == ['{"x": 1}', '{"y": "b"}']


def test_supervise_is_a_choice_of_the_source(encoder, tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk}]), "train_on": "last"}
    data = load_data(data_config(file=file, held_out=0), encoder, 64)
    assert data.audit["file"]["supervised_tokens"] == 2  # b and the stop token, once


def test_a_csv_and_a_parquet_file_are_read_too(encoder, tmp_path):
    import pandas

    frame = pandas.DataFrame(question_rows(4))
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        assert (
            len(load_data(data_config(file={"data_files": str(tmp_path / name)}, held_out=0), encoder, 64).train) == 4
        )
