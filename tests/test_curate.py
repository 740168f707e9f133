"""mode=curate, from a file of planted rows to the file that a run reads back."""

import json
from pathlib import Path

import pytest
from make_dirty_rows import make_rows

from sft_recipes.curate import curate
from sft_recipes.data.prepare import load_data
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError
from sft_recipes.modeling.loading import load_tokenizer
from sft_recipes.reporting.run_folder import write_json
from sft_recipes.reporting.run_report import write_report
from support.configs import composed, error_of
from support.rows import write_jsonl


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def file_config(path: str, *overrides: str):
    """A run on one file of rows."""
    return composed("model=tiny", "data=file", f"data.file.data_files={path}", *overrides)


@pytest.fixture(scope="module")
def dirty(tmp_path_factory) -> tuple[list[dict], str]:
    """412 rows, of which 212 are planted, and their file."""
    rows = make_rows()
    return rows, write_jsonl(tmp_path_factory.mktemp("dirty") / "dirty.jsonl", rows)


def test_the_dirty_file_is_cleaned_of_exactly_what_was_planted(dirty, tmp_path):
    rows, path = dirty
    record = curate(file_config(path, "curation=strict"), tmp_path)
    planted = [number for number, row in enumerate(rows) if row["planted"]]
    removed = read_lines(tmp_path / "removed.jsonl")
    assert len(rows) == 412 and len(planted) == 212
    assert [line["row"] for line in removed] == planted
    assert all(line["reasons"] for line in removed)
    assert (record["rows"], record["removed"], record["kept"]) == (412, 212, 200)
    reasons = {rows[line["row"]]["planted"]: {reason.split(":")[0] for reason in line["reasons"]} for line in removed}
    assert reasons["copy"] == {"near_duplicate_rows"} and reasons["second_answer"] >= {"near_duplicate_instructions"}
    for name in ("near_empty_answer", "repetition", "abrupt_end", "refusal", "template_tokens"):
        assert name in reasons[name]


def test_report_counts_and_removes_nothing(dirty, tmp_path):
    rows, path = dirty
    record = curate(file_config(path, "curation=report"), tmp_path)
    assert (record["kept"], record["removed"]) == (412, 0)
    assert record["findings"]["near_duplicate_rows"]["rows"] == 200
    assert record["findings"]["refusal"]["rows"] == 3
    assert "near duplicate rows" in (tmp_path / "report.md").read_text()
    assert "near duplicate rows" in (tmp_path / "report.html").read_text()


def test_a_run_reads_what_was_kept(dirty, tmp_path):
    curate(file_config(dirty[1], "curation=strict"), tmp_path)
    config = file_config(str(tmp_path / "curated.jsonl"), "data.held_out=20")
    tokenizer, template, _ = load_tokenizer(config.model)
    audit = load_data(config, Encoder(tokenizer, template), 1024).audit["file"]
    assert (audit["rows"], audit["held_out"]) == (180, 20)
    assert audit["problems"].keys() <= {"leak"}  # every field is read; a few of the made rows share half a passage


def test_a_run_removes_rows_before_it_encodes_them_and_counts_them(dirty):
    config = file_config(dirty[1], "curation=strict", "data.held_out=0")
    tokenizer, template, _ = load_tokenizer(config.model)
    data = load_data(config, Encoder(tokenizer, template), 1024)
    assert len(data.train) == 200
    counted = data.audit["file"]["problems"]["curation_near_duplicate_rows"]
    assert (counted["rows"], counted["policy"]) == (200, "drop")


def test_a_run_that_removes_nothing_counts_and_its_report_has_the_section(dirty, tmp_path, monkeypatch):
    config = file_config(dirty[1], "curation=report", "data.held_out=0")
    tokenizer, template, _ = load_tokenizer(config.model)
    data = load_data(config, Encoder(tokenizer, template), 1024)
    assert len(data.train) == 412 and data.curation["findings"]["near_duplicate_rows"]["rows"] == 200
    write_json(tmp_path / "metrics.json", {"name": "mine"})
    write_json(tmp_path / "supervision.json", {"sources": data.audit, "curation": data.curation})
    write_report(tmp_path)
    section = (tmp_path / "report.md").read_text().partition("## Curation\n")[2]
    assert "Of 412 rows 0 were removed" in section and "| near duplicate rows         | 200  | 0       |" in section
    monkeypatch.setattr("sft_recipes.data.curate_sources.COUNTED_ROWS", 411)
    assert load_data(config, Encoder(tokenizer, template), 1024).curation is None  # too many to wait for


def test_the_best_rows_are_spread_over_types_of_task(tmp_path):
    long = "It takes some time and some care, and then it works as one would hope it does."
    rows = [
        {"instruction": f"Why does {name} rise?", "output": f"{name}. {long}"}
        for name in ("bread", "fog", "smoke", "steam")
    ]
    rows += [
        {"instruction": "Write a poem about rain.", "output": "Rain."},
        {"instruction": "Compute 3 + 4.", "output": "7"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    select = "curation.select={rows: 3, by: score, spread: task}"
    record = curate(file_config(path, "curation=report", select), tmp_path / "out")
    assert record["selected"] == {"question answering": 1, "creative": 1, "maths": 1}
    kept = [row["messages"][0]["content"] for row in read_lines(tmp_path / "out" / "curated.jsonl")]
    assert kept[1:] == ["Write a poem about rain.", "Compute 3 + 4."]


def test_the_best_rows_by_a_score_of_ones_own_are_spread_over_clusters_of_words(tmp_path, monkeypatch):
    (tmp_path / "my_score.py").write_text("def shortest(c):\n    return -len(c['messages'][1]['content'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    asks = [
        "Bake a loaf of rye bread.",
        "Bake a cake.",
        "Bake rye bread rolls.",
        "Debug the sorting loop.",
        "Debug my loop.",
    ]
    rows = [{"instruction": ask, "output": "x" * (9 - place)} for place, ask in enumerate(asks)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    select = "curation.select={rows: 2, by: my_score.shortest, spread: cluster}"
    record = curate(file_config(path, select), tmp_path / "out")
    kept = [row["messages"][0]["content"] for row in read_lines(tmp_path / "out" / "curated.jsonl")]
    assert kept == [
        "Bake rye bread rolls.",
        "Debug my loop.",
    ]  # the shortest answer of each cluster, not the two shortest
    assert sorted(record["selected"].values()) == [1, 1]


def test_a_share_of_refusals_may_stay_and_what_is_off_is_not_counted(dirty, tmp_path):
    refusal = "curation.filters.refusal={action: remove, keep_share: 0.005}"  # of 412 rows two
    record = curate(file_config(dirty[1], refusal, "curation.filters.echo.action=off", "curation.near_duplicates.rows=off"), tmp_path)  # fmt: skip
    assert (record["findings"]["refusal"]["rows"], record["findings"]["refusal"]["removed"]) == (3, 1)
    assert not record["findings"].keys() & {"echo", "near_duplicate_rows"}


def test_parquet_is_written_when_asked_for_and_read_back(dirty, tmp_path):
    curate(file_config(dirty[1], "curation=strict", "curation.output=parquet"), tmp_path)
    config = file_config(str(tmp_path / "curated.parquet"), "data.held_out=0", "curation=none")
    tokenizer, template, _ = load_tokenizer(config.model)
    assert len(load_data(config, Encoder(tokenizer, template), 1024).train) == 200


CALLS = [
    {"type": "function", "function": {"name": "now", "arguments": {"zone": None, "seed": 12345678901234567890123}}}
]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"default": None}}}]


@pytest.mark.parametrize("output", ["jsonl", "parquet"])
def test_the_rows_that_are_kept_are_read_back_as_they_were(tmp_path, output):
    rows = [
        {"messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "", "tool_calls": CALLS}]}
        | {"tools": TOOLS},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "train": False}]},
        {"text": "Raw text is trained as a whole."},
    ]
    (tmp_path / "out").mkdir()
    curate(file_config(write_jsonl(tmp_path / "a.jsonl", rows), f"curation.output={output}"), tmp_path / "out")
    options = ("data.held_out=0", "curation=none", "data_checks.marked_untrained=keep", "model.chat_template=chatml")
    before, after = (
        load_data(config, Encoder(*load_tokenizer(config.model)[:2]), 1024).train
        for path in ("a.jsonl", f"out/curated.{output}")
        for config in [file_config(str(tmp_path / path), *options)]
    )
    for column in ("input_ids", "labels"):
        assert sorted(before[column]) == sorted(after[column])
    assert len(after) == 3


def test_an_instruction_and_its_input_stay_two_blocks(tmp_path):
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    (tmp_path / "out").mkdir()
    curate(file_config(write_jsonl(tmp_path / "a.jsonl", [row])), tmp_path / "out")
    config = file_config(
        str(tmp_path / "out/curated.jsonl"), "data.held_out=0", "curation=none", "model.chat_template=alpaca"
    )
    tokenizer, template, _ = load_tokenizer(config.model)
    data = load_data(config, Encoder(tokenizer, template), 1024)
    text = tokenizer.decode(data.train[0]["input_ids"])
    assert "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n" in text
    assert data.audit["file"]["problems"] == {}


def test_the_report_shows_lengths_as_a_picture_and_verbs_with_their_objects(dirty, tmp_path):
    record = curate(file_config(dirty[1], "curation=strict"), tmp_path)
    lengths = record["diversity"]["length_counts"]["answer_tokens"]
    assert sum(lengths.values()) == 200 and len(lengths) > 5
    verbs, objects = record["diversity"]["verbs"], record["diversity"]["objects"]
    assert (verbs["describe"], objects["describe"]["otter"]) == (50, 5)  # ten animals in five places
    page = (tmp_path / "report.md").read_text()
    assert "![Rows by their lengths](lengths.png)" in page and (tmp_path / "lengths.png").stat().st_size > 5000
    assert "| describe" in page and "otter 5" in page


def test_a_filter_of_ones_own_gives_the_reason(tmp_path, monkeypatch):
    (tmp_path / "my_filters.py").write_text(
        "def too_kind(conversation):\n    return 'it says please' if 'please' in str(conversation) else None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"instruction": "Sing, please.", "output": "La."}, {"instruction": "Sing.", "output": "La."}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    curate(file_config(path, "curation.own_filters=[my_filters.too_kind]"), tmp_path / "out")
    assert [row["reasons"] for row in read_lines(tmp_path / "out" / "removed.jsonl")] == [
        ["my_filters.too_kind: it says please"]
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("+curation.filters.refusals={}", "curation.filters.refusals is no filter. Did you mean refusal?"),
        ("curation.filters.refusal.action=drop", "curation.filters.refusal.action cannot be 'drop'. Choices: off, remove, report."),
        ("curation.filters.echo.share=high", "curation.filters.echo.share should be a number, not 'high'."),
    ],
)  # fmt: skip
def test_a_mistake_in_curation_is_one_line(dirty, tmp_path, override, line):
    with pytest.raises(ConfigError) as raised:
        curate(file_config(dirty[1], override), tmp_path)
    assert str(raised.value).startswith(line)


def test_a_stream_is_not_curated(dirty, tmp_path):
    config = file_config(dirty[1], "data.file.streaming=true")
    assert error_of(curate, config, tmp_path) == (
        "mode=curate needs all rows at once. Write data.NAME.streaming=false."
    )
