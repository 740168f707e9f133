"""The jobs of a sweep encode their rows once, and again where anything of them differs."""

import pytest

from sft_recipes.config.schema import Config
from sft_recipes.data import sweep_cache
from sft_recipes.data.prepare import load_data
from sft_recipes.data.sweep_cache import cache
from sft_recipes.encoding.encoder import Encoder
from support.configs import data_config
from support.rows import question_rows, write_jsonl


def made_of(path: str, **change) -> Config:
    return data_config(groups=change, file={"data_files": path}, held_out=5)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"trainer": {"learning_rate": 1.0}, "name": "other"}, True),
        ({"seed": 1}, False),
        ({"smoke": True}, False),
        ({"data_checks": {"duplicate": "drop"}}, False),
        ({"max_length": 64}, False),
        ({"template": "zephyr"}, False),
        ({"file": True}, False),
    ],
)
def test_rows_are_used_again_only_where_nothing_of_them_differs(tmp_path, chat_tokenizer, change, same):
    path = write_jsonl(tmp_path / "a.jsonl", question_rows(20))
    first = Encoder(*chat_tokenizer("tiny", "chatml")[:2])
    made = load_data(made_of(path), first, 128)
    if change.pop("file", False):
        write_jsonl(tmp_path / "a.jsonl", question_rows(21))
    max_length, template = change.pop("max_length", 128), change.pop("template", "chatml")
    again = load_data(made_of(path, **change), Encoder(*chat_tokenizer("tiny", template)[:2]), max_length)
    assert (again.questions is made.questions) == same


def test_only_as_many_rows_are_kept_as_there_is_room_for(tmp_path, chat_tokenizer, monkeypatch):
    monkeypatch.setattr(sweep_cache, "CACHE_BYTES", 0)
    encoder = Encoder(*chat_tokenizer("tiny", "chatml")[:2])
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", question_rows(n)) for n in (20, 21)]
    first, last = (load_data(made_of(path), encoder, 128) for path in paths)
    assert [data.questions for data in cache.values()] == [last.questions]
    assert load_data(made_of(paths[0]), encoder, 128).questions is not first.questions
