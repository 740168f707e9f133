"""Rows are encoded once, kept on the disk, and encoded again where anything that they depend on differs."""

import json
import logging
import stat
import sys
import threading
from dataclasses import replace
from datetime import date

import pytest

from sft_recipes.config.compose import compose
from sft_recipes.data import prepare, row_cache
from sft_recipes.data.prepare import load_data
from sft_recipes.data.token_rows import TrainingData
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import DataError
from support.configs import data_config
from support.processes import run_ranks
from support.rows import question_rows, write_jsonl

LONG = {"instruction": "Long?", "input": "", "output": "no " * 200}
PACKED = {"input_ids", "labels", "seq_lengths"}


@pytest.fixture
def encoded(monkeypatch, tmp_path):
    """The cache in a folder of the test's own, and what is encoded from now on, a word each time."""
    seen, make = [], prepare.encode_sources
    monkeypatch.setenv("SFT_RECIPES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "encode_sources", lambda *given: seen.append("encoded") or make(*given))
    return seen


@pytest.fixture
def encoder(chat_tokenizer):
    return Encoder(*chat_tokenizer("tiny", "chatml")[:2])


@pytest.fixture
def path(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", [*question_rows(40), *question_rows(2), LONG])


def made_of(path, **change):
    return data_config(groups=change, file={"data_files": str(path)}, held_out=5, max_length_policy="drop")


def contents(data: TrainingData) -> dict:
    """All that a run gets, as plain values."""
    values = {key: value for key, value in vars(data).items() if value is not None}
    values |= {"audit": json.dumps(data.audit), "curation": json.dumps(data.curation)}
    return {key: value[:] if hasattr(value, "features") else value for key, value in values.items()}


def entries(tmp_path):
    return sorted(each for each in (tmp_path / "cache").glob("rows-*") if each.is_dir())


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_found_is_what_was_made_to_the_bit(tmp_path, path, encoder, encoded, monkeypatch, packing):
    made, found = (load_data(made_of(path), encoder, 128, packing) for _ in range(2))
    monkeypatch.setenv("SFT_RECIPES_CACHE", "")
    without = load_data(made_of(path), encoder, 128, packing)
    assert contents(made) == contents(found) == contents(without)
    assert encoded == ["encoded", "encoded"] and len(found.questions) == 4 and len(found.left_out) == 1
    assert found.train.cache_files and not without.train.cache_files  # mapped
    assert packing == (found.packed is not None and set(found.packed.column_names) == PACKED)
    assert [stat.S_IMODE(each.stat().st_mode) for each in entries(tmp_path)] == [0o700, 0o700]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"trainer": {"learning_rate": 1.0}, "name": "other", "mix": {"total": 20}}, True),
        ({"data_checks": {"duplicate": "drop"}}, True),
        ({"max_length": 64}, True),
        ({"seed": 1}, False),
        ({"smoke": True}, False),
        ({"data_checks": {"empty_thought": "keep"}}, False),
        ({"template": "zephyr"}, False),
        ({"file": True}, False),
        ({"version": True}, False),
        ({"cache": False}, False),
    ],
)
def test_rows_are_found_only_where_nothing_of_them_differs(
    tmp_path, path, chat_tokenizer, encoder, encoded, monkeypatch, change, same
):
    load_data(made_of(path), encoder, 128)
    if change.pop("file", False):
        write_jsonl(tmp_path / "a.jsonl", question_rows(43))
    if change.pop("version", False):
        monkeypatch.setattr(row_cache, "stack_versions", lambda: {"tokenizers": "2"})
    max_length, template = change.pop("max_length", 128), change.pop("template", "chatml")
    keep = change.pop("cache", True)
    config = made_of(path, **change)
    config = replace(config, data=replace(config.data, cache=keep))
    thoughts = config.data_checks.empty_thought == "keep"
    load_data(config, Encoder(*chat_tokenizer("tiny", template)[:2], thoughts), max_length)
    assert encoded == ["encoded"] * (1 if same else 2)


def test_rows_that_were_refused_for_their_length_are_not_encoded_again(path, encoder, encoded):
    config = made_of(path)
    config = replace(config, data=replace(config.data, max_length_policy="auto"))
    with pytest.raises(DataError, match="longer than trainer.max_length=128"):
        load_data(config, encoder, 128)
    assert len(load_data(config, encoder, 1024).train) == 39 and encoded == ["encoded"]


@pytest.mark.parametrize("own", ["formatter", "filter"])
def test_rows_of_a_function_of_ones_own_are_not_kept(tmp_path, encoder, encoded, monkeypatch, caplog, own):
    caplog.set_level(logging.INFO)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rows_now", raising=False)
    (tmp_path / "rows_now.py").write_text(
        "def read(row):\n    return {'text': row['text']}\n\n\ndef bad(row):\n    pass\n"
    )
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "Yes"}] * 9)
    change = {"curation": {"own_filters": ["rows_now.bad"]}} if own == "filter" else {}
    config = data_config("text" if own == "filter" else "rows_now.read", groups=change, file={"data_files": path})
    for _ in range(2):
        load_data(config, encoder, 128)
    assert encoded == ["encoded"] * 2 and not entries(tmp_path) and " is your own" in caplog.text


def test_other_code_of_ours_encodes_anew(path, encoder, encoded, monkeypatch):
    load_data(made_of(path), encoder, 128)
    monkeypatch.setattr(row_cache, "CODE", "edited")
    load_data(made_of(path), encoder, 128)
    assert encoded == ["encoded"] * 2


def test_the_order_of_sources_their_splits_and_values_of_the_environment_tell_rows_apart(
    tmp_path, path, encoder, encoded, monkeypatch
):
    other = write_jsonl(tmp_path / "b.jsonl", question_rows(30))
    two = {"a": {"data_files": str(path)}, "b": {"data_files": str(other)}}
    monkeypatch.setenv("ANSWER", "output")

    def load(sources, answer="output", **change):
        options = {"data": sources | {"max_length_policy": "drop", "held_out": 5}, "formatter": {"output": answer}}
        config = compose(None, "model=tiny", "data=file", "formatter=alpaca", "trainer.max_steps=1", **options)
        read = {name: replace(source, **change) for name, source in config.sources.items()}
        return load_data(replace(config, sources=read), encoder, 128)

    assert [*load(two).audit] == ["a", "b"] and [*load(dict(reversed(two.items()))).audit] == ["b", "a"]
    assert len(load({"a": two["a"]}).held_out) == 4  # and one near-duplicate
    assert len(load({"a": two["a"]}, split=None, held_out_split="train").held_out) == 42  # mode=evaluate asks all
    load({"a": two["a"]}, "${oc.env:ANSWER}")
    monkeypatch.setenv("ANSWER", "input")
    with pytest.raises(DataError, match="input"):
        load({"a": two["a"]}, "${oc.env:ANSWER}")
    assert encoded == ["encoded"] * 5  # the first value of the variable is that of the rows before it


@pytest.mark.parametrize("damage", ["cut", "flipped", "files.json", "data.json", "gone"])
def test_a_damaged_entry_is_made_again(tmp_path, path, encoder, encoded, caplog, damage):
    made = contents(load_data(made_of(path), encoder, 128))
    for entry in entries(tmp_path):
        file = entry / (damage if damage.endswith("json") else "train.arrow")
        content = bytearray(file.read_bytes())
        content[-200] ^= 1
        file.write_bytes({"cut": content[:-300], "flipped": content}.get(damage, b"{"))
        if damage == "gone":
            file.unlink()
    again = load_data(made_of(path), encoder, 128)
    assert contents(again) == made and encoded == ["encoded", "encoded"]
    assert ("is damaged, so its rows are encoded again" in caplog.text) or damage == "gone"
    load_data(made_of(path), encoder, 128)
    assert encoded == ["encoded", "encoded"]


def test_a_run_says_where_its_rows_come_from(path, encoder, encoded, caplog):
    caplog.set_level(logging.INFO)
    load_data(made_of(path), encoder, 128)
    assert "data.cache=false" not in caplog.text
    load_data(made_of(path), encoder, 128)
    assert "data.cache=false encodes anew" in caplog.text


@pytest.mark.parametrize("where", ["no folder", "full disk"])
def test_a_run_goes_on_without_the_cache_where_it_cannot_be_written(
    tmp_path, path, encoder, encoded, monkeypatch, caplog, where
):
    if where == "no folder":
        (tmp_path / "cache").write_text("")

    def full(*_):
        raise OSError(28, "No space left on device")

    if where == "full disk":
        monkeypatch.setattr(row_cache, "write_tables", full)
    assert len(load_data(made_of(path), encoder, 128).train) == 38
    assert sum("be kept in" in record.getMessage() for record in caplog.records) == 1
    assert ("could not be kept" if where == "full disk" else "cannot be kept") in caplog.text
    assert not entries(tmp_path) and not list(tmp_path.glob("cache/.rows-*"))


def test_a_conversation_that_json_cannot_hold_is_not_kept(tmp_path, encoder, encoded, caplog):
    data = load_data(made_of(write_jsonl(tmp_path / "a.jsonl", question_rows(9))), encoder, 128)
    odd = replace(data, questions=[{"messages": [], "tools": [date(2026, 1, 1)]}])
    assert row_cache.cached("odd", lambda: odd) is odd and "date is not JSON serializable" in caplog.text


def test_errors_are_raised_each_time_and_leave_nothing(tmp_path, encoder, encoded):
    path = write_jsonl(tmp_path / "a.jsonl", [*question_rows(9), {"instruction": "Hm?", "input": "", "output": 5}])
    for _ in range(2):
        with pytest.raises(DataError, match="data.file row 9"):
            load_data(made_of(path), encoder, 128)
    assert encoded == ["encoded", "encoded"] and not entries(tmp_path)


def test_two_jobs_at_once_encode_once(path, encoder, encoded, caplog):
    caplog.set_level(logging.INFO)
    jobs = [threading.Thread(target=load_data, args=(made_of(path), encoder, 128)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert encoded == ["encoded"]


def test_the_entry_that_was_not_used_for_the_longest_time_makes_room(tmp_path, path, encoder, encoded, monkeypatch):
    load_data(made_of(path), encoder, 128)
    half = tmp_path / "cache" / ".rows-half"
    half.mkdir()
    for each, age in zip((*entries(tmp_path), half), (3000, 3000, 90_000), strict=True):
        row_cache.os.utime(each, (row_cache.time.time() - age,) * 2)
    old, monkeyed = set(entries(tmp_path)), monkeypatch.setattr(row_cache, "CACHE_BYTES", 0)
    load_data(made_of(path, seed=1), encoder, 128)
    assert len(entries(tmp_path)) == 1 and not old & set(entries(tmp_path)) and not half.exists() and monkeyed is None


TWO_PROCESSES = """
import os, sys, torch
from sft_recipes.__main__ import leave_process_group
from sft_recipes.data import row_cache
from sft_recipes.data.row_cache import cached, first_of_node
from sft_recipes.data.token_rows import TrainingData, to_dataset
from sft_recipes.errors import DataError

def make():
    print("encoded by", os.environ["LOCAL_RANK"])
    if len(sys.argv) > 2:
        raise DataError("a bad row")
    rows = to_dataset({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    return TrainingData(rows, rows, [], {})

rank, hash_file = int(os.environ["LOCAL_RANK"]), row_cache.hash_file
row_cache.hash_file = lambda path: hash_file(path) if not rank else print("hashed again", path)
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
try:
    data = first_of_node(lambda: cached("two", make))
    print(rank, "maps", data.train[0]["input_ids"], data.train.cache_files[0]["filename"])
except DataError as error:
    sys.exit(f"{error}")
finally:
    leave_process_group()
"""


@pytest.mark.parametrize("bad", [False, True])
def test_one_process_of_a_node_encodes_and_the_others_map_its_rows_or_end_with_it(tmp_path, bad):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    given = [str(tmp_path / "store"), *["bad"] * bad]
    ended = run_ranks(tmp_path, *given, script=tmp_path / "two.py", SFT_RECIPES_CACHE=str(tmp_path / "cache"))
    if bad:
        assert [rank.stdout for rank in ended] == ["encoded by 0\n", ""]
        assert [rank.stderr.splitlines()[-1] for rank in ended] == ["a bad row"] * 2  # on another node as well
    else:
        file = tmp_path / "cache" / "rows-two" / "train.arrow"
        assert ended[0].stdout == f"encoded by 0\n0 maps [1, 2] {file}\n"
        assert ended[1].stdout == f"1 maps [1, 2] {file}\n"
