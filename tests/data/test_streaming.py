"""Streams: the rows, the ledger and the errors that other rows have, while training goes on."""

import json
import re
import threading
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from sft_recipes.data import streaming
from sft_recipes.data.prepare import load_data
from sft_recipes.data.streaming import load_stream
from sft_recipes.data.token_rows import row_arrays
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, DataError
from sft_recipes.training.arguments import build_arguments
from support.commands import SHORT_TINY_RUN, read_metrics
from support.configs import data_config
from support.rows import question_rows, write_jsonl


@pytest.fixture(scope="module")
def encoder(chat_tokenizer):
    tokenizer, template, _ = chat_tokenizer("llama3", "chatml")
    return Encoder(tokenizer, template)


def stream(encoder, packing: int = 0, max_length: int = 64, held_out: int = 0, **sources):
    named = {name: {**source, "streaming": True} for name, source in sources.items()}
    return load_stream(data_config(held_out=held_out, **named), encoder, packing or max_length, packing > 0)[1]


def documents(rows) -> Counter:
    """The rows' documents, ids and labels, and how often each comes."""
    found = Counter()
    for row in rows:
        ends = np.cumsum(row.get("seq_lengths", [len(row["input_ids"])]))[:-1]
        parts = zip(*(np.split(row[key], ends) for key in ("input_ids", "labels")), strict=True)
        found.update((tuple(map(int, ids)), tuple(map(int, labels))) for ids, labels in parts)
    return found


MIXED = [*question_rows(40), *question_rows(3), {"instruction": "<|im_end|>", "input": "", "output": "Typed."}]


@pytest.mark.parametrize("packing", [0, 128])
def test_a_stream_gives_the_documents_and_the_ledger_of_the_same_rows_loaded(encoder, tmp_path, packing):
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", MIXED)}
    loaded = load_data(data_config(file=file, held_out=0), encoder, packing or 64)
    streamed = stream(encoder, packing, file=file)
    rows = list(streamed.one_pass())
    expected = zip(row_arrays(loaded.train, "input_ids"), row_arrays(loaded.train, "labels"), strict=True)
    assert documents(rows) == documents({"input_ids": ids, "labels": labels} for ids, labels in expected)
    assert streamed.audit["file"] == loaded.audit["file"]
    assert streamed.audit["file"]["problems"]["duplicate"]["first"] == [40, 41, 42]
    assert max(len(row["input_ids"]) for row in rows) <= (packing or 64)


def test_packed_rows_are_full_and_documents_wait_for_the_next_buffer(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "BUFFER_ROWS", 50)
    random = np.random.default_rng(0)
    rows = [
        {"instruction": f"Question {n}?", "input": "", "output": "Yes. " * random.integers(1, 40)} for n in range(400)
    ]
    streamed = stream(encoder, 256, file={"data_files": write_jsonl(tmp_path / "rows.jsonl", rows)})
    packed = list(streamed.one_pass())
    fill = np.array([len(row["input_ids"]) for row in packed]) / 256
    assert fill[:-2].mean() > 0.98 and documents(packed).total() == 400
    assert [row["seq_lengths"].sum() for row in packed] == [len(row["input_ids"]) for row in packed]


def test_a_row_that_waits_keeps_no_other_row_in_memory(encoder, tmp_path):
    streamed = stream(encoder, 256, file={"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(30))})
    ids, labels, *_ = next(streamed.mixed())
    assert ids.base is None and labels.base is None


def test_the_first_rows_are_held_out_and_not_trained_on(encoder, tmp_path):
    streamed = stream(encoder, held_out=5, file={"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(30))})
    assert [talk["messages"][0]["content"] for talk in streamed.questions] == [f"Question {n}?" for n in range(5)]
    texts = {encoder.tokenizer.decode(row["input_ids"]) for row in streamed.one_pass()}
    assert len(texts) == 25 and not any("Question 4?" in text for text in texts)


def test_sources_are_drawn_by_their_shares(encoder, tmp_path):
    some = {"data_files": write_jsonl(tmp_path / "a.jsonl", question_rows(1000)), "share": 0.2}
    more = {"data_files": write_jsonl(tmp_path / "b.jsonl", question_rows(1000, first=5000, answer="No."))}
    list((streamed := stream(encoder, some=some, more=more)).one_pass())
    no = sum("No." in encoder.tokenizer.decode(row["input_ids"]) for row in streamed.one_pass())
    total = len(list(streamed.one_pass()))
    assert no == pytest.approx(0.8 * total, rel=0.05) and total > 1000  # until the larger share's source ends


def test_later_passes_give_the_rows_in_another_order_and_count_nothing_twice(encoder, tmp_path):
    streamed = stream(encoder, file={"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(30))})
    first, second = list(streamed.one_pass()), list(streamed.one_pass())
    assert documents(first) == documents(second)
    assert [row["input_ids"].tolist() for row in first] != [row["input_ids"].tolist() for row in second]
    assert streamed.audit["file"]["rows"] == 30 and streamed.digest.rows == 60


def test_a_stream_goes_on_with_its_next_pass(encoder, tmp_path):
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(30))}
    ends, goes_on = stream(encoder, file=file), stream(encoder, file=file)
    passes = [row["input_ids"].tolist() for row in (*ends.one_pass(), *ends.one_pass())]
    assert [row["input_ids"].tolist() for row in islice(goes_on(), 60)] == passes


def test_a_broken_row_is_named_by_its_place_in_the_stream(encoder, tmp_path):
    rows = [*question_rows(1500), {"instruction": "Hm?", "input": "", "output": 5}]
    with pytest.raises(DataError, match=re.escape("data.file row 1500 (")):
        stream(encoder, file={"data_files": write_jsonl(tmp_path / "rows.jsonl", rows)})


def test_a_named_column_that_a_row_may_lack_may_begin_after_the_first_rows_of_a_stream(encoder, tmp_path):
    rows = [*question_rows(10), question_rows(1, 50)[0] | {"role_play": "Be brief."}]
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", rows)}
    file["formatter"] = {"name": "alpaca", "system": "role_play"}
    given = stream(encoder, held_out=4, file=file).one_pass()
    assert sum("Be brief." in encoder.tokenizer.decode(row["input_ids"]) for row in given) == 1
    file["formatter"] = {"name": "alpaca", "output": "reply"}
    with pytest.raises(DataError, match="formatter alpaca needs 'reply', the rows have"):
        stream(encoder, file=file)


@pytest.mark.parametrize(
    ("rows", "length", "policy", "line"),
    [
        (question_rows(3), 4, "drop", "none of 3 rows is left to train on"),
        ([*question_rows(95), *question_rows(5, 100, "no " * 60)], 64, "auto", "5 of the first 100 rows are longer than trainer.max_length=64"),
    ],
)  # fmt: skip
def test_too_long_rows_are_refused_as_elsewhere(encoder, tmp_path, rows, length, policy, line):
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", rows), "streaming": True}
    with pytest.raises(DataError, match=re.escape(line)):
        load_stream(data_config(held_out=0, max_length_policy=policy, file=file), encoder, length, False)


def test_what_a_stream_cannot_do_is_said(encoder, tmp_path):
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(30)), "streaming": True}
    setting = data_config(held_out=0, file=file)
    with pytest.raises(ConfigError, match="trainer.max_steps is missing"):
        build_arguments(setting, tmp_path)
    with pytest.raises(ConfigError, match="a stream has no length to take a share of"):
        load_stream(data_config(held_out=0.1, file=file), encoder, 64, False)
    with pytest.raises(ConfigError, match="data.b.streaming should be true, too"):
        data_config(a=file, b={**file, "streaming": False})
    with pytest.raises(ConfigError, match="drawn by their shares"):
        load_stream(data_config(held_out=0, a=file, b=file), encoder, 64, False)


@pytest.fixture
def small_buffers(monkeypatch):
    monkeypatch.setattr(streaming, "BUFFER_ROWS", 10)
    monkeypatch.setattr(streaming, "ENCODE_BATCH_ROWS", 10)


def test_the_next_buffer_is_encoded_while_this_one_is_given_out_and_counted_when_it_is(
    encoder, tmp_path, small_buffers
):
    file = {"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(50))}
    streamed = stream(encoder, file=file)
    rows = streamed.one_pass()
    first = list(islice(rows, 2))
    for _ in range(1000):
        if streamed.read["file"]["rows"] == 20:
            break
        time.sleep(0.01)
    assert (streamed.read["file"]["rows"], streamed.audit["file"]["rows"], streamed.digest.rows) == (20, 10, 2)
    first += list(islice(rows, 9))
    assert (streamed.audit["file"]["rows"], streamed.digest.rows) == (20, 11)
    everything = [*first, *rows]
    assert (streamed.audit["file"]["rows"], len(everything)) == (50, 50)
    assert {encoder.tokenizer.decode(row["input_ids"]) for row in everything[:10]} == {
        encoder.tokenizer.decode(row["input_ids"]) for row in islice(stream(encoder, file=file).one_pass(), 10)
    }


def test_a_row_that_trl_looks_at_is_not_counted_and_training_counts_every_buffer(encoder, tmp_path, small_buffers):
    streamed = stream(encoder, file={"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(50))})
    next(streamed())
    assert streamed.audit["file"]["rows"] == 10
    list(islice(streamed(), 45))
    assert (streamed.audit["file"]["rows"], streamed.audit["file"]["kept"], streamed.digest.rows) == (50, 50, 45)


def test_an_error_comes_when_its_buffer_is_due(encoder, tmp_path, small_buffers):
    rows = [*question_rows(35), {"instruction": "Hm?", "input": "", "output": 5}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    given, taken = stream_without_a_look(encoder, path), []
    with pytest.raises(DataError, match=re.escape("data.file row 35 (")):
        for row in given:
            taken.append(row)
    assert len(taken) == 30


def stream_without_a_look(encoder, path: str):
    setting = data_config(held_out=0, file={"data_files": path, "streaming": True})
    return streaming.RowStream(setting, encoder, 64, False).one_pass()


def test_who_looked_at_a_row_and_leaves_late_does_not_end_the_stream_of_another(encoder, tmp_path, small_buffers):
    streamed = stream(encoder, file={"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(50))})
    look, rows = streamed(), streamed()
    next(look), next(rows)
    look.close()
    assert len(list(islice(rows, 45))) == 45


def test_the_thread_ends_with_the_stream(encoder, tmp_path, small_buffers):
    before = threading.active_count()
    rows = stream(encoder, file={"data_files": write_jsonl(tmp_path / "rows.jsonl", question_rows(50))})()
    next(rows), next(rows)
    assert threading.active_count() > before
    rows.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_streamed_run_trains_over_several_passes_and_records_them(tiny_run, tmp_path, packing):
    path = write_jsonl(tmp_path / "rows.jsonl", question_rows(40))
    code, printed, folder = tiny_run(
        "model=tiny", "data=file", f"data.file.data_files={path}", "data.file.streaming=true", "data.held_out=4",
        f"trainer.packing={packing}", "trainer.per_device_train_batch_size=4", "trainer.max_length=256", *SHORT_TINY_RUN,
        "trainer.max_steps=12", "trainer.gradient_accumulation_steps=1",
    )  # fmt: skip
    written = json.loads((folder / "supervision.json").read_text())
    assert code == 0 and read_metrics(folder)["steps"] == 12 and read_metrics(folder)["eval_loss"] > 0
    assert (written["sources"]["file"]["rows"], written["sources"]["file"]["held_out"]) == (36, 4)
    assert written["digest"]["rows"] >= 12  # a pass may end in the middle of a batch


def test_preview_shows_a_stream_s_rows(tiny_run, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", question_rows(40))
    streamed = ["data=file", f"data.file.data_files={path}", "data.file.streaming=true", "data.held_out=0"]
    code, printed, _ = tiny_run("mode=preview", "model=tiny", *streamed, "trainer.max_steps=7")
    assert code == 0 and "first row: data.file 0" in printed and "7 steps of 128 rows." in printed
