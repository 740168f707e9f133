"""Mixtures: shares of rows or tokens, a total, too small sources, raw text beside conversations; loaded or streamed."""

import re
from collections import Counter
from itertools import islice

import pytest

from sft_recipes.data import prepare
from sft_recipes.data.prepare import load_data
from sft_recipes.data.streaming import load_stream
from sft_recipes.data.token_rows import flat_values, row_lengths
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, DataError
from sft_recipes.reporting.run_report import audit_table
from support.configs import composed, data_config, error_of
from support.rows import question_rows, write_jsonl


@pytest.fixture(scope="module")
def encoder(chat_tokenizer):
    tokenizer, template, _ = chat_tokenizer("llama3", "chatml")
    return Encoder(tokenizer, template)


@pytest.fixture
def mixed(encoder, tmp_path):
    """Loads sources of so many rows each, with their shares; `prose` is raw text, `long` has long answers."""

    def load(rows: dict[str, int], shares: dict[str, float] | None = None, seed: int = 0, **mix):
        answers = {"long": "Yes, " * 20}
        sources = {}
        for place, (name, number) in enumerate(rows.items()):
            talks = question_rows(number, first=1000 * place, answer=answers.get(name, "Yes."))
            if name.startswith("prose"):
                talks = [{"text": f"Prose number {n} goes on for a while."} for n in range(number)]
            if not (path := tmp_path / f"{name}.jsonl").exists():
                write_jsonl(path, talks)
            sources[name] = {"data_files": str(path)}
            sources[name] |= {"share": shares[name]} if name in (shares or {}) else {}
        return load_data(data_config(groups={"mix": mix, "seed": seed}, held_out=0, **sources), encoder, 256)

    return load


def rows_of(data, index: int) -> list[int]:
    """The row numbers of a source in the mixture."""
    return flat_values(data.train, "row")[flat_values(data.train, "source") == index].tolist()


def test_a_total_is_met_to_the_row_by_shares_of_the_whole(mixed):
    data = mixed({"a": 90, "b": 90, "c": 90, "d": 90}, {"a": 0.35, "b": 0.3, "c": 0.2, "d": 0.15}, total=40)
    assert [len(rows_of(data, index)) for index in range(4)] == [14, 12, 8, 6]
    assert data.audit["a"]["kept"] == 14
    assert data.audit["a"]["mix"] == {"asked": 0.35, "got": 0.35, "of": "rows", "times": round(14 / 90, 4)}


def test_rows_are_drawn_without_replacement_by_the_seed(mixed):
    first, again, other = (
        sorted(rows_of(mixed({"a": 90, "b": 90}, {"a": 0.5, "b": 0.5}, seed, total=100), 0)) for seed in (0, 0, 1)
    )
    assert len(set(first)) == 50 and first == again != other


def test_a_source_that_is_too_small_is_repeated_evenly_and_the_factor_is_said(mixed, caplog):
    data = mixed({"a": 30, "b": 10}, {"a": 0.5, "b": 0.5}, total=50)
    counts = Counter(rows_of(data, 1))
    assert len(counts) == 10 and sorted(counts.values()) == [2] * 5 + [3] * 5  # 25 rows out of 10
    assert data.audit["b"]["mix"]["times"] == 2.5
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["data.b.share=0.5 is 25 rows of this mixture, and data.b has 10: they are repeated 2.50 times."]


def test_more_repeats_than_allowed_are_refused_with_the_total_that_fits(mixed):
    line = error_of(lambda: mixed({"a": 90, "b": 5}, {"a": 0.5, "b": 0.5}, total=60))
    assert line == (
        "data.b.share=0.5 is 30 rows of this mixture, and data.b has 5, which 6.0 times its rows would make. Write a "
        "smaller share, mix.total=40, mix.when_short=shrink, or mix.max_repeat above 4."
    )
    assert len(mixed({"a": 90, "b": 5}, {"a": 0.5, "b": 0.5}, total=40).train) == 40
    assert len(mixed({"a": 90, "b": 5}, {"a": 0.5, "b": 0.5}, total=60, max_repeat=6).train) == 60


def test_shrink_lowers_the_total_to_what_the_scarcest_source_has_and_says_so(mixed, caplog):
    data = mixed({"a": 900, "b": 10}, {"a": 0.85, "b": 0.15}, when_short="shrink")
    assert [len(rows_of(data, index)) for index in range(2)] == [57, 10]  # 10 / 0.15 = 66.7 rows
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["data: the mixture is 67 rows rather than 910: data.b has no more for its share of 0.15."]


def test_raise_refuses_a_source_that_is_too_small(mixed):
    with pytest.raises(ConfigError, match=r"Write a smaller share, mix.total=20, mix.when_short=shrink, or .*=repeat"):
        mixed({"a": 90, "b": 10}, {"a": 0.5, "b": 0.5}, total=50, when_short="raise")


def test_shares_of_tokens_count_the_tokens_with_loss(mixed, encoder):
    data = mixed({"short": 400, "long": 100}, {"short": 0.5, "long": 0.5}, by="tokens", total=2000)
    got = [data.audit[name]["supervised_tokens"] for name in ("short", "long")]
    answers = [len(encoder.encode([{"text": text}])["input_ids"][0]) for text in ("Yes.", "Yes, " * 20)]
    assert all(abs(number - 1000) <= longest / 2 for number, longest in zip(got, answers, strict=True))
    assert len(rows_of(data, 0)) > 10 * len(rows_of(data, 1))


def test_raw_text_is_a_share_of_all_tokens_beside_the_conversations(mixed):
    data = mixed({"a": 200, "prose": 400}, raw_text=0.1)
    tokens = row_lengths(data.train)[flat_values(data.train, "source") == 1]
    assert len(rows_of(data, 0)) == 200
    assert abs(tokens.sum() / row_lengths(data.train).sum() - 0.1) < tokens.max() / row_lengths(data.train).sum()
    assert data.audit["prose"]["mix"]["of"] == "tokens"
    assert (data.audit["a"]["mix"]["asked"], data.audit["a"]["mix"]["got"]) == (1, 1)  # of the conversations
    assert rows_of(mixed({"a": 200, "prose": 400}, raw_text=0), 1) == []


def test_raw_text_beside_is_no_part_of_the_whole_of_which_conversations_ask_shares(mixed):
    data = mixed({"a": 90, "b": 30, "prose": 400}, {"a": 0.5, "b": 0.5}, raw_text=0.1)
    assert [len(rows_of(data, index)) for index in range(2)] == [60, 60]  # of 120 conversations


def test_sources_of_raw_text_share_it_in_proportion_to_their_size(mixed):
    data = mixed({"a": 200, "prose": 300, "prose_2": 100}, raw_text=0.1)
    large, small = (data.audit[name]["mix"] for name in ("prose", "prose_2"))
    assert large["asked"] / small["asked"] == pytest.approx(3, rel=0.05)  # their rows are nearly equally long
    assert large["got"] + small["got"] == pytest.approx(0.1, abs=0.005)


def test_raw_text_that_runs_out_where_a_mixture_shrinks_is_said(mixed, caplog):
    data = mixed({"a": 200, "prose": 5, "prose_2": 5}, raw_text=0.5, when_short="shrink")
    assert [data.audit[name]["mix"]["times"] for name in ("prose", "prose_2")] == [1, 1]
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 2 and all(re.search(r"data.prose\w* has \d+: they are taken once.$", line) for line in said)


def test_raw_text_that_is_asked_for_by_its_name_is_one_token_of_a_hundred():
    assert composed("model=tiny", "data=[dolly,prose]").mix.raw_text == 0.01
    assert composed("model=tiny", "data=[dolly,prose]", "mix.raw_text=0.05").mix.raw_text == 0.05
    assert composed("model=tiny", "data=dolly").mix.raw_text is None


def test_raw_text_with_a_share_of_its_own_keeps_it_and_that_is_said(mixed, caplog):
    data = mixed({"a": 90, "prose": 400}, {"prose": 0.1}, raw_text=0.01)
    assert len(rows_of(data, 1)) == 10 and "data.prose.share=0.1 holds, not mix.raw_text=0.01." in caplog.text


def test_raw_text_needs_a_source_of_it_and_is_nothing_beside_itself(mixed):
    line = error_of(lambda: mixed({"a": 9, "b": 9}, raw_text=0.01))
    assert line.startswith("mix.raw_text=0.01: no source is raw text. Write 'data=[a,b,prose]'")
    assert len(mixed({"prose": 9}, raw_text=0.01).train) == 9


def test_the_table_shows_what_was_asked_and_got(mixed):
    table = audit_table(mixed({"a": 30, "b": 10}, {"a": 0.5, "b": 0.5}, total=50).audit)
    assert "| b      | 50.00%      | 50.00%    | rows | 2.50        |" in table and max(map(len, table)) <= 80


def test_another_share_mixes_the_same_prepared_rows_again(mixed, monkeypatch, tmp_path):
    monkeypatch.setenv("SFT_RECIPES_CACHE", str(tmp_path / "cache"))
    shares = [{"a": 0.5, "b": 0.5}, {"a": 0.25, "b": 0.75}]
    assert len(mixed({"a": 30, "b": 30}, shares[0], total=20).train) == 20
    monkeypatch.setattr(prepare, "encode_sources", None)
    data = mixed({"a": 30, "b": 30}, shares[1], total=20)
    assert [len(rows_of(data, index)) for index in range(2)] == [5, 15]


def streamed(encoder, tmp_path, rows: dict[str, int], shares: dict[str, float], **mix):
    sources = {}
    for name, number in rows.items():
        talks = [{"text": f"Prose {n} goes on for a while."} for n in range(number)]
        talks = talks if name == "prose" else question_rows(number, answer=f"{name}.")
        file = write_jsonl(tmp_path / f"{name}.jsonl", talks)
        sources[name] = {"data_files": file, "streaming": True} | ({"share": shares[name]} if name in shares else {})
    return load_stream(data_config(groups={"mix": mix}, held_out=0, **sources), encoder, 64, False)[1]


def test_a_stream_keeps_the_shares_from_its_first_row_on(encoder, tmp_path):
    stream = streamed(encoder, tmp_path, {"a": 400, "b": 400}, {"a": 0.3})
    stream.passes = 1
    sources = [row[2] for row in islice(stream.mixed(), 100)]
    assert all(abs(sources[:end].count(0) - 0.3 * end) <= 1 for end in range(1, 101))


def test_a_stream_reads_a_small_source_again_until_the_large_one_ends(encoder, tmp_path, caplog):
    stream = streamed(encoder, tmp_path, {"a": 20, "b": 60}, {"a": 0.5, "b": 0.5})
    texts = Counter(encoder.tokenizer.decode(row["input_ids"]) for row in stream.one_pass())
    assert Counter(text.rstrip("\n").endswith("a.<|im_end|>") for text in texts.elements())[True] in (59, 60)
    assert stream.audit["a"]["rows"] == 20 and stream.audit["a"]["mix"]["got"] == pytest.approx(0.5, abs=0.01)
    short = streamed(encoder, tmp_path, {"a": 10, "b": 90}, {"a": 0.5, "b": 0.5}, max_repeat=2)
    assert len(list(short.one_pass())) in (39, 40)  # 10 rows twice, and as many of the other source
    once = streamed(encoder, tmp_path, {"a": 10, "b": 90}, {"a": 0.5, "b": 0.5}, when_short="shrink")
    assert len(list(once.one_pass())) in (19, 20)


def test_a_stream_counts_tokens_where_shares_are_of_tokens(encoder, tmp_path):
    stream = streamed(encoder, tmp_path, {"a": 300, "prose": 300}, {}, raw_text=0.25)
    stream.passes = 1
    rows = list(islice(stream.mixed(), 200))
    tokens = [sum(len(ids) for ids, _, source, *_ in rows if source == index) for index in (0, 1)]
    assert tokens[1] / sum(tokens) == pytest.approx(0.25, abs=0.01)


def test_what_a_stream_cannot_mix_is_said(encoder, tmp_path):
    with pytest.raises(ConfigError, match=re.escape("mix.total: a stream has no end")):
        streamed(encoder, tmp_path, {"a": 9}, {}, total=5)
    with pytest.raises(DataError, match="data.a ends before the other sources"):
        streamed(encoder, tmp_path, {"a": 9, "b": 90}, {"a": 0.5, "b": 0.5}, when_short="raise")


@pytest.mark.parametrize(
    ("mix", "line"),
    [
        ({"raw_text": 1}, "mix.raw_text should be at least 0 and below 1, not 1."),
        ({"total": 0}, "mix.total should be at least 1, not 0."),
        ({"max_repeat": 0.5}, "mix.max_repeat should be at least 1, not 0.5."),
        ({"by": "token"}, "mix.by cannot be 'token'. Did you mean tokens?"),
        ({"when_shrot": "raise"}, "mix.when_shrot is not a field of mix. Did you mean when_short?"),
    ],
)
def test_a_mistake_in_mix_is_one_line(mix, line):
    assert error_of(lambda: data_config(groups={"mix": mix}, a={"path": "x"})) == line


def test_shares_that_make_no_whole_are_refused(mixed):
    line = error_of(lambda: mixed({"a": 9, "b": 9}, {"a": 0.5, "b": 0.3}))
    assert line == "data: shares (a 0.5, b 0.3) should be above 0 and sum to 1, or to less where a source has none."
