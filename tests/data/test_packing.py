"""Packing: every document whole, once, as full as best-fit decreasing makes it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_recipes.data.packing import pack_lengths, pack_rows, padding_share
from sft_recipes.data.token_rows import to_dataset
from support.rows import rows_of


def slow_best_fit_decreasing(lengths: list[int], max_length: int) -> int:
    """The number of rows of the textbook algorithm: each document, longest first, into the fullest row with room."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(max_length - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_best_fit_decreasing(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, random.integers(2, 65), size=300)
    found = pack_lengths(lengths, 64, seed)
    assert sorted(np.concatenate(found).tolist()) == list(range(300))
    assert max(lengths[row].sum() for row in found) <= 64
    assert len(found) == slow_best_fit_decreasing(lengths.tolist(), 64)


@given(st.integers(1, 40).flatmap(lambda most: st.tuples(st.just(most), st.lists(st.integers(1, most), max_size=60))))
def test_any_documents_are_packed_whole_once_and_as_tightly(case):
    max_length, lengths = case
    found = pack_lengths(lengths, max_length)
    assert sorted(index for row in found for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= max_length for row in found)
    assert len(found) == slow_best_fit_decreasing(lengths, max_length)


def test_a_document_that_fits_no_row_is_an_error():
    with pytest.raises(ValueError, match="from 1 to 8, found 3 to 9"):
        pack_lengths([3, 9], 8)


def test_the_seed_decides_and_nothing_else():
    lengths = [5] * 40 + [3] * 40
    first, again, other = (np.concatenate(pack_lengths(lengths, 16, seed)).tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_packed_rows_hold_whole_documents_side_by_side():
    documents = [np.full(length, length, dtype=np.int32) for length in (3, 2, 4, 1)]
    numbers = {"source": np.zeros(4, dtype=int), "row": np.arange(4)}
    found = pack_rows(to_dataset({"input_ids": documents, "labels": documents}, numbers), max_length=5, seed=0)
    assert sorted(map(tuple, found["input_ids"])) == [(3, 3, 3, 2, 2), (4, 4, 4, 4, 1)]
    assert sorted(map(tuple, found["seq_lengths"])) == [(3, 2), (4, 1)]
    assert found["labels"] == found["input_ids"]


def test_many_documents_of_all_lengths_are_packed_to_99_5_percent():
    lengths = np.random.default_rng(0).lognormal(5, 1, size=52_000).astype(int).clip(1, 2048)
    assert lengths.sum() / len(pack_lengths(lengths, 2048)) / 2048 >= 0.995


def test_real_lengths_are_packed_to_99_5_percent():
    names = ("gsm8k_train.json", "gpteacher_roleplay.json", "alpaca_en_demo.json")
    texts = [row["instruction"] + row["output"] for name in names for row in rows_of(name)]
    lengths = np.array([min(len(text) // 4 + 12, 2048) for text in texts])
    lengths = np.concatenate([lengths] * 5)[:52_000]
    assert lengths.sum() / len(pack_lengths(lengths, 2048)) / 2048 >= 0.995


def test_rows_grouped_by_length_are_padded_less():
    random = np.random.default_rng(0)
    documents = [np.ones(length, dtype=np.int32) for length in random.integers(1, 500, size=400)]
    numbers = {"source": np.zeros(400, dtype=int), "row": np.arange(400)}
    some = to_dataset({"input_ids": documents, "labels": documents}, numbers)
    assert (
        padding_share(some, 8, 2, grouped=True, seed=0) < 0.1 < 0.4 < padding_share(some, 8, 2, grouped=False, seed=0)
    )


def test_the_share_of_padding_by_hand():
    documents = [np.ones(length, dtype=np.int32) for length in (2, 4)]
    numbers = {"source": np.zeros(2, dtype=int), "row": np.arange(2)}
    some = to_dataset({"input_ids": documents, "labels": documents}, numbers)
    assert padding_share(some, 2, 1, grouped=False, seed=0) == pytest.approx(2 / 8)
    assert padding_share(some, 1, 1, grouped=False, seed=0) == 0
