"""Leaks: what gives a held-out row away, and held-out rows that are drawn with their twins."""

import json

import numpy as np
import pytest

from sft_recipes.curation.leaks import LeakIndex, hold_out_groups
from sft_recipes.curation.words import split_words
from sft_recipes.data.prepare import load_data
from sft_recipes.data.streaming import load_stream
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError
from sft_recipes.modeling.loading import load_tokenizer
from support.configs import composed, data_config
from support.rows import write_jsonl

PASSAGE = (
    "the river rises in the hills above the town where early fog keeps the small birds quiet until noon and then falls "
    "over three old weirs into a basin that the monks dug by hand for the mill they ran here"
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """The tiny model's."""
    tokenizer, template, _ = load_tokenizer(composed("model=tiny", "data=tiny").model)
    return Encoder(tokenizer, template)


def rows_of_letters(number: int) -> list[dict]:
    """So many rows that share no word but `about`."""
    names = [f"{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(number)]
    return [{"instruction": f"q{n}x q{n}y q{n}z about", "output": f"a{n}x a{n}y a{n}z a{n}v a{n}w"} for n in names]


def test_a_near_duplicate_and_a_row_with_half_of_a_passage_are_leaks():
    index = LeakIndex([split_words(PASSAGE), split_words("Where does the sungoat live? In the swamps.")])
    assert index.find_leak(split_words("Where does the sungoat live, please? In the swamps.")) == 1
    half = " ".join(PASSAGE.split()[:22])
    assert index.find_leak(split_words(f"{half} or so they say, but I have never been there and cannot tell")) == 0
    assert index.find_leak(split_words(" ".join(PASSAGE.split()[:12]) + " something else")) is None


def test_a_shared_way_to_ask_is_no_leak():
    index = LeakIndex([split_words("Can you tell me which language is spoken in Fenthia? People there speak Lumalic.")])
    assert index.find_leak(split_words("Can you tell me which language is spoken in Galune? It is Faludan.")) is None


def test_without_twins_the_drawn_rows_are_held_out():
    texts = [[f"w{n}", f"v{n}"] for n in range(10)]
    out = hold_out_groups([7, 2, 5], 10, lambda places: (texts[place] for place in places))
    assert out.tolist() == [2, 5, 7]


def test_twins_are_held_out_together_and_a_group_too_large_stays_in_training():
    texts = [["a"]] * 2 + [["b"]] * 5 + [["c"], ["d"], ["e"]]

    def read(places):
        return (texts[place] for place in places)

    assert hold_out_groups([0, 7, 8], 10, read).tolist() == [0, 1, 7]
    assert hold_out_groups([2, 7, 8], 10, read).tolist() == [7, 8]
    assert hold_out_groups([2, 3, 4], 10, read).tolist() == []


def test_a_training_twin_of_a_held_out_row_is_dropped_and_counted(tmp_path, encoder):
    rows = rows_of_letters(40)
    twins = [row | {"output": row["output"] + " indeed"} for row in rows[:3]]
    train, test = (
        write_jsonl(tmp_path / "train.jsonl", rows[3:] + twins),
        write_jsonl(tmp_path / "test.jsonl", rows[:3]),
    )
    files = {"path": "json", "data_files": {"train": train, "test": test}, "held_out_split": "test"}
    data = load_data(data_config("alpaca", mine=files), encoder, 1024)
    assert data.audit["mine"]["problems"]["leak"] == {"rows": 3, "policy": "drop", "first": [37, 38, 39]}
    assert data.audit["mine"]["kept"] == 37
    kept = load_data(data_config("alpaca", {"curation": {"leaks": None}}, mine=files), encoder, 1024)
    assert kept.audit["mine"]["kept"] == 40


def test_copies_that_differ_by_a_space_are_on_one_side_of_the_split(tmp_path, encoder):
    rows = rows_of_letters(60)
    copies = [row | {"output": row["output"].replace(" ", "  ", 1)} for row in rows]
    path = write_jsonl(tmp_path / "rows.jsonl", rows + copies)
    data = load_data(data_config("alpaca", mine={"data_files": path}, held_out=20), encoder, 1024)
    out = {row % 60 for row in data.held_out["row"]}
    assert len(data.held_out) == 20 and len(out) == 10
    assert not out & {row % 60 for row in data.train["row"]}
    assert len(data.train) == 100  # none was lost to the leak check


def test_rows_that_are_all_alike_cannot_be_held_out(tmp_path, encoder):
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of_letters(1) * 30)
    with pytest.raises(ConfigError, match="data.mine: no 3 rows can be held out"):
        load_data(data_config("alpaca", mine={"data_files": path}, held_out=3), encoder, 1024)


def test_rows_that_hold_a_benchmarks_question_are_dropped(tmp_path, encoder):
    rows = rows_of_letters(20)
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": rows[4]["instruction"], "answer": "42"}) + "\n")
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    groups = {"curation": {"decontaminate": [str(tmp_path / "bench.jsonl")]}}
    data = load_data(data_config("alpaca", groups, mine={"data_files": path}, held_out=0), encoder, 1024)
    assert data.audit["mine"]["problems"]["leak"] == {"rows": 1, "policy": "drop", "first": [4]}


@pytest.mark.parametrize(
    "named", ["folder", {"path": "json", "data_files": {"test": "folder/test.jsonl"}, "split": "test"}]
)
def test_questions_of_a_dataset_are_read_of_the_split_that_is_named(tmp_path, encoder, named, monkeypatch):
    rows = rows_of_letters(20)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "test.jsonl", [{"question": rows[4]["instruction"], "answer": "42"}])
    write_jsonl(tmp_path / "folder" / "train.jsonl", [{"question": rows[4]["instruction"], "answer": "42"}])
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    groups = {"curation": {"decontaminate": [named]}}
    data = load_data(data_config("alpaca", groups, mine={"data_files": path}, held_out=0), encoder, 1024)
    assert data.audit["mine"]["problems"]["leak"]["first"] == [4]


def test_a_stream_drops_twins_of_its_held_out_rows(tmp_path, encoder):
    rows = rows_of_letters(30)
    rows[20] = rows[0] | {"output": rows[0]["output"] + " indeed"}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = data_config("alpaca", mine={"data_files": path, "streaming": True}, held_out=4)
    data, _ = load_stream(config, encoder, 1024, packing=False)
    assert sorted(data.train["row"]) == [n for n in range(4, 30) if n != 20]
    assert np.array_equal(data.held_out["row"], [0, 1, 2, 3])
