"""Local files: every value is what the file says, loaded or streamed, and what is wrong with a row has its line."""

import gzip
import io
import json
import random
import re
import tracemalloc
from itertools import islice

import pyarrow
import pytest
from datasets import Dataset

from sft_recipes.config.options import Source
from sft_recipes.data import json_document
from sft_recipes.data.json_document import read_document
from sft_recipes.data.prepare import load_data
from sft_recipes.data.reading import Fault
from sft_recipes.data.sources import load_rows, stream_rows
from sft_recipes.data.streaming import load_stream
from sft_recipes.data.token_rows import row_arrays
from sft_recipes.encoding.encoder import IGNORE_INDEX, Encoder
from sft_recipes.errors import ConfigError, DataError
from support.configs import data_config, error_of
from support.rows import question_rows, write_jsonl

HELLO = {"instruction": "Hi", "output": "Yo"}


@pytest.fixture(scope="module")
def encoder(chat_tokenizer):
    tokenizer, template, _ = chat_tokenizer("llama3", "chatml")
    return Encoder(tokenizer, template)


def loaded(files, **options) -> list:
    """The rows and faults of files that are loaded."""
    rows = load_rows("data.file", source(files, **options), "train")
    return [row for _, row, _ in rows.records(range(len(rows)))]


def streamed(files, **options) -> list:
    """The rows and faults of files that are streamed."""
    return [row for _, row, _ in stream_rows("data.file", source(files, streaming=True, **options), "train")]


def source(files, **options) -> Source:
    return Source(data_files=list(map(str, files)) if isinstance(files, list) else str(files), **options)


@pytest.fixture(params=[loaded, streamed])
def read(request):
    """Each of the two ways to read files."""
    return request.param


def written(path, content: str | bytes):
    """The path, with this content in it."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# text stays text


CELLS = ["01067", "1.50", "2021-03-04", "NA", "N/A", "None", "null", "true", "False", "1e5", "inf", "", " x ", "007"]


@pytest.mark.parametrize(("name", "sep"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv", ";"), ("a.csv", "|")])
def test_a_cell_of_a_table_stays_the_characters_it_is(read, tmp_path, name, sep):
    lines = "".join(f"q{sep}{cell}\n" for cell in CELLS)
    path = written(tmp_path / name, f"instruction{sep}output\n{lines}")
    options = {} if sep in ",\t" else {"sep": sep}
    assert read(path, **options) == [{"instruction": "q", "output": cell} for cell in CELLS]


def test_a_tab_separates_a_tsv_and_may_be_named_for_another_file(read, tmp_path):
    text = 'instruction\toutput\n1, 2\t3\n"a\tb"\t"say ""hi""\nthere"\n'
    rows = [{"instruction": "1, 2", "output": "3"}, {"instruction": "a\tb", "output": 'say "hi"\nthere'}]
    assert read(written(tmp_path / "a.tsv", text)) == rows
    assert read(written(tmp_path / "a.csv", text), sep="\\t") == rows


def test_a_string_that_looks_like_a_date_is_a_string_in_every_file(read, tmp_path):
    answers = ["Ann", "2021-03-04", "2021-03-04T05:06:07Z"]
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [{"output": answer}]) for n, answer in enumerate(answers)]
    assert read(files) == [{"output": answer} for answer in answers]
    assert read(files[1:]) == [{"output": answer} for answer in answers[1:]]


def test_numbers_keep_their_digits_and_nulls_and_switches_are_what_they_are(read, tmp_path):
    text = '{"a": 12345678901234567890123, "b": [1.5, true, null], "c": {"seats": null, "x": -0.0}, "d": 1}'
    (row,) = read(written(tmp_path / "a.jsonl", text + "\n"))
    assert row == {"a": 12345678901234567890123, "b": [1.5, True, None], "c": {"seats": None, "x": -0.0}, "d": 1}
    assert [type(value) for value in row["b"]] == [float, bool, type(None)] and type(row["d"]) is int


def test_a_number_where_text_should_stand_is_refused_by_its_name(encoder, tmp_path):
    path = written(tmp_path / "a.jsonl", '{"instruction": "2+2?", "output": 4}\n')
    with pytest.raises(DataError, match=r"data.file row 0 \(.*a.jsonl, line 1\): output should be text, not 4"):
        load_data(data_config(file={"data_files": str(path)}, held_out=0), encoder, 64)


def test_lines_of_text_are_rows_and_blank_ones_are_none(read, tmp_path):
    path = written(tmp_path / "a.txt", "One.\r\n\n  Two, 01067 \n \t\nlast")
    assert read(path) == [{"text": "One."}, {"text": "  Two, 01067 "}, {"text": "last"}]


# the forms that JSON comes in


ROWS = [
    {"instruction": "Où? 🦊", "output": "2021-03-04", "tools": None},
    {"output": [1, {"a": {}}], "more": "\ud83e\udd8a"},
]
LINES = "\n".join(json.dumps(row) for row in ROWS)
FORMS = {
    "lines": LINES,
    "lines with blank ones between": "\n\n" + LINES.replace("\n", "\n \n") + "\n\n",
    "an array": json.dumps(ROWS),
    "an indented array": json.dumps(ROWS, indent=4, ensure_ascii=True),
    "objects over several lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "arrays of characters as they are": json.dumps(
        [ROWS[0], {"output": [1, {"a": {}}], "more": "🦊"}], ensure_ascii=False
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "BOM"])
def test_json_is_read_in_every_form(read, tmp_path, form, ending, mark):
    expected = [ROWS[0], {"output": [1, {"a": {}}], "more": "🦊"}]
    text = FORMS[form].replace("\ud83e\udd8a", "🦊")
    assert read(written(tmp_path / f"a.{ending}", mark + text)) == expected


def test_a_single_object_is_one_row(read, tmp_path):
    assert read(written(tmp_path / "a.json", json.dumps(HELLO))) == [HELLO]
    assert read(written(tmp_path / "b.json", json.dumps(HELLO, indent=2))) == [HELLO]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "json", "txt"])
@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_packed_files_are_unpacked(read, tmp_path, ending, packing):
    texts = {"jsonl": '{"text": "Yo"}\n', "json": '[{"text": "Yo"}]', "csv": "text\nYo\n", "txt": "Yo\n"}
    plain = texts[ending].encode()
    packed = gzip.compress(plain) if packing == "gz" else pyarrow.compress(plain, "zstd", asbytes=True)
    assert read(written(tmp_path / f"a.{ending}.{packing}", packed)) == [{"text": "Yo"}]


def test_rows_stand_under_a_key_as_a_list_or_as_columns(read, tmp_path):
    listed = written(tmp_path / "a.json", json.dumps({"version": {"data": 2}, "data": [HELLO, HELLO], "end": [1]}))
    columns = written(tmp_path / "b.json", json.dumps({"data": {"instruction": ["Hi", "Ho"], "output": ["Yo", None]}}))
    assert read(listed, field="data") == [HELLO, HELLO]
    assert read(columns, field="data") == [HELLO, {"instruction": "Ho", "output": None}]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"version": 1, "rows": []}', "field data: the file has version, rows."),
        ('{"data": {"a": [1], "b": []}}', "field data: should be a list of rows, or lists of one length by column."),
        ('{"data": "x"}', "field data: should be a list of rows, or lists of one length by column."),
        ('[{"data": 1}]', "field data: the file is a list, without keys. Leave data.NAME.field out."),
    ],
)
def test_a_key_without_rows_is_refused(read, tmp_path, content, line):
    with pytest.raises(DataError, match=re.escape(f"a.json, {line}")):
        read(written(tmp_path / "a.json", content), field="data")


@pytest.mark.parametrize("seed", range(20))
def test_a_document_is_read_in_pieces_of_any_size_as_json_reads_it_whole(monkeypatch, seed):
    draw = random.Random(seed)

    def value(depth: int = 0):
        kinds = [
            lambda: draw.choice(["", 'a"b\\', "é🦊\n", "[{", "x" * draw.randrange(40)]),
            lambda: draw.randrange(-9, 10**30),
        ]
        kinds += [lambda: draw.uniform(-1e9, 1e9), lambda: None, lambda: draw.random() < 0.5]
        if depth < 3:
            kinds += [lambda: [value(depth + 1) for _ in range(draw.randrange(4))]]
            kinds += [lambda: {f"k{n}": value(depth + 1) for n in range(draw.randrange(4))}]
        return draw.choice(kinds)()

    rows = [value() for _ in range(12)]
    text = json.dumps(rows, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
    monkeypatch.setattr(json_document, "CHUNK_CHARACTERS", draw.randrange(1, 50))
    head = draw.randrange(len(text))
    found = list(read_document(io.StringIO(text[head:]), text[:head], None))
    assert [item for item, _, _ in found] == rows
    assert [json.loads(part) for _, part, _ in found] == rows


# rows of one source differ


def test_keys_may_turn_up_after_ten_megabytes_and_in_the_second_file(read, tmp_path):
    early = [{"instruction": "Q" * 1100, "input": None, "output": "A"}] * 10_000
    late = [{"instruction": "Q", "input": "given", "output": "A", "tools": [{"name": "f"}], "weight": 0}]
    first = write_jsonl(tmp_path / "a.jsonl", early + late)
    second = write_jsonl(tmp_path / "b.jsonl", [{"messages": [], "input": 3}])
    found = read([first, second])
    assert len(found) == 10_002 and found[0] == early[0] and found[-2:] == [*late, {"messages": [], "input": 3}]


def call(**arguments) -> dict:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def test_arguments_of_different_shapes_are_rendered_as_they_are_written(encoder, tmp_path):
    calls = [call(city="Bonn", seats=None), call(city=["Bonn"]), call(id=12345678901234567890123), call()]
    user = {"role": "user", "content": "Order"}
    rows = [{"messages": [user, {"role": "assistant", "content": "", "tool_calls": [each]}]} for each in calls]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = load_data(data_config(file={"data_files": path}, held_out=0), encoder, 256)
    texts = {
        row: encoder.tokenizer.decode(ids) for row, ids in zip(data.train["row"], data.train["input_ids"], strict=True)
    }
    for row, part in enumerate(['"seats": null', '"city": ["Bonn"]', "12345678901234567890123", '"arguments": {}']):
        assert part in texts[row]
    assert not any("null" in texts[row] for row in (1, 2, 3))


def test_nulls_that_arrow_fills_in_do_not_reach_the_template(encoder, tmp_path):
    user = {"role": "user", "content": "Order"}
    rows = [
        {"messages": [user, {"role": "assistant", "content": "", "tool_calls": [each]}]}
        for each in (call(x=1), call(y="b"))
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    data = load_data(data_config(file={"data_files": str(tmp_path / "a.parquet")}, held_out=0), encoder, 256)
    texts = [encoder.tokenizer.decode(ids) for ids in data.train["input_ids"]]
    assert len(texts) == 2 and not any("null" in text for text in texts)


@pytest.mark.parametrize("way", ["loaded", "streamed"])
def test_a_column_that_was_named_may_be_missing_from_some_rows_and_not_from_all(encoder, tmp_path, way):
    def prepare(column):
        file = {"data_files": path, "formatter": {"name": "alpaca", "input": column}, "streaming": way == "streamed"}
        setting = data_config(file=file, held_out=0)
        return load_data(setting, encoder, 64) if way == "loaded" else load_stream(setting, encoder, 64, False)[0]

    rows = [{"instruction": "Q", "context": "given", "output": "A"}, {"instruction": "Q2", "output": "A"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = prepare("context")
    assert sorted("given" in encoder.tokenizer.decode(ids) for ids in data.train["input_ids"]) == [False, True]
    # a stream's later rows may have it (tests/data/test_streaming.py); there `context` is counted as an unread field
    if way == "loaded":
        line = r"^data.file: formatter alpaca needs 'contxt', the rows have instruction, con"
        with pytest.raises(DataError, match=line):
            prepare("contxt")


def test_a_row_without_a_field_is_a_fault(read, tmp_path):
    assert isinstance(read(written(tmp_path / "a.jsonl", '{}\n{"text": "a"}\n'))[0], Fault)


# what is wrong has its file, line and field


@pytest.mark.parametrize(
    ("name", "content", "line", "fault"),
    [
        ("a.jsonl", b'{"output": "Yo"}\n{"output": "Y\xff"}\n', 2, "output: the byte 0xff is not valid in its encoding (data.NAME.encoding)"),
        ("a.jsonl", b'{"output": "Yo"}\n{"x": ["a", {"y": "\xc3"}]}\n', 2, "x[1].y: the byte 0xc3"),
        ("a.csv", b"a,b\n1,2\n3,\xe9\n", 3, "b: the byte 0xe9"),
        ("a.txt", b"ok\n\xe9\n", 2, "text: the byte 0xe9"),
        ("a.jsonl", b'{"a": "x"}\n\n{"a": ["\\ud83d b"]}\n', 3, "a[0] has half a character ('\\ud83d')"),
        ("a.jsonl", b'{"a": 1}\n{"\\udc00": 1}\n', 2, "a key in the row has half a character"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1\n', 2, "not JSON (Expecting ',' delimiter, column 8)"),
        ("a.jsonl", b'{"a": 1}\n{"a": \xff}\n', 2, "the byte 0xff is not valid in its encoding (data.NAME.encoding)"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1}\xe9\n', 2, "the byte 0xe9 is not valid"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n', 2, "should be an object with the row's fields, not [1, 2]"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', 2, "the key 'a' stands twice in one object"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1e400}\n', 2, "the number 1e400 is too large"),
        ("a.json", b'[{"a": 1},\n {"b": "Y\xff"}]', 2, "b: the byte 0xff"),
        ("a.json", b'[{"a": 1},\n {"b": 1, "b": 2}]', 2, "the key 'b' stands twice"),
        ("a.csv", b'a,b\n"1\n2",x\n3\n', 4, "1 cell under a header of 2"),
        ("a.csv", b"a,b\n1,2,3\n", 2, "3 cells under a header of 2"),
    ],
)  # fmt: skip
def test_a_faulty_row_is_named_by_its_line(read, tmp_path, name, content, line, fault):
    path = written(tmp_path / name, content)
    rows = read(path)
    (wrong,) = [row for row in rows if isinstance(row, Fault)]
    assert fault in wrong
    where = source(path, streaming=read is streamed)
    records = (
        stream_rows("data.file", where, "train")
        if where.streaming
        else load_rows("data.file", where, "train").records(range(len(rows)))
    )
    assert [place for _, row, place in records if isinstance(row, Fault)] == [f"{path}, line {line}"]


def test_an_option_that_files_of_a_kind_do_not_have_is_refused(read, tmp_path):
    with pytest.raises(ConfigError, match="^data.file.field is no option for such files. Leave it out.$"):
        read(written(tmp_path / "a.txt", "Hi"), field="rows")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.json", '[{"a": 1},\n{"a": 2}\n{"a": 3}]', "a.json, line 3: not JSON ({ stands where , or ] should)."),
        ("a.json", '[{"a": 1},\n{"a": 2}', "a.json, line 2: not JSON (its end stands where , or ] should)."),
        ("a.json", '[{"a": 1},\n{"a": tru}]', "a.json, line 2: not JSON (Expecting value)."),
        (
            "a.json",
            b'[{"a": 1},\n\xff]',
            "a.json, line 2: the byte 0xff is not valid in its encoding (data.NAME.encoding).",
        ),
        ("a.json", '[{"a": 1}]\nmore', "a.json, line 2: not JSON (more follows after the rows)."),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "a.csv, line 2: unexpected end of data, is a quote opened and not closed?"),
        ("a.csv", "a,a\n1,2\n", "a.csv, line 1: two columns of a, a have one name."),
        ("a.jsonl", "\n \n", "a.jsonl has no rows."),
        ("a.csv", "a,b\n", "a.csv has no rows."),
        ("a.txt", "", "a.txt has no rows."),
    ],
)
def test_a_file_that_breaks_off_is_refused_with_the_line(read, tmp_path, name, content, line):
    with pytest.raises(DataError, match=r"^data\.file: .*" + re.escape(line)):
        read(written(tmp_path / name, content))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"rows": [{"a": 1}]}\n{"rows": [{"a": 2}]}\n', "line 2: not JSON (more follows after the rows)"),
        ('{"rows": [{"a": 1}], "more":', "line 1: not JSON (Expecting value)"),
        ('{"rows": [{"a": 1}]', "line 1: not JSON (its end stands where , or } should)"),
    ],
)
def test_what_follows_the_rows_under_a_key_is_read_to_the_end(read, tmp_path, content, fault):
    with pytest.raises(DataError, match=re.escape(fault)):
        read(written(tmp_path / "a.json", content), field="rows")


def test_a_packed_file_that_breaks_off_is_refused(read, tmp_path):
    packed = gzip.compress(b"".join(b'{"text": "%d"}\n' % (number * 7919) for number in range(10_000)))
    with pytest.raises(DataError, match=r"a.jsonl.gz cannot be read to its end"):
        read(written(tmp_path / "a.jsonl.gz", packed[:-2000]))


def test_other_encodings_are_read_when_they_are_named(read, tmp_path):
    rows = [{"instruction": "Wer?", "output": "Jörg"}]
    for encoding in ("latin-1", "utf-16", "cp1252"):
        path = written(tmp_path / "a.csv", "instruction,output\nWer?,Jörg\n".encode(encoding))
        assert read(path, encoding=encoding) == rows
    with pytest.raises(ValueError, match=r"encoding=latin-17 is unknown. Write utf-8, latin-1"):
        Source(encoding="latin-17")


def test_a_file_that_is_not_there_and_a_split_that_is_not_there_are_refused(read, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [HELLO])
    assert "none.jsonl: there is no such file" in error_of(read, tmp_path / "none.jsonl")
    where = Source(data_files={"train": path})
    with pytest.raises(ConfigError, match="there is no split 'tran' in its files. Did you mean train?"):
        load_rows("data.file", where, "tran") if read is loaded else list(stream_rows("data.file", where, "tran"))


def test_a_cache_that_cannot_be_written_is_not_taken_for_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("sft_recipes.data.raw_rows.HF_DATASETS_CACHE", "/proc/nothing/datasets")
    line = error_of(loaded, write_jsonl(tmp_path / "a.jsonl", [HELLO]))
    assert line.endswith("'/proc/nothing'. HF_HOME names the folder for downloads and caches.")


# all of them in one pass


FAULTY = [{"instruction": f"Q{n}", "output": "" if n % 2 else "A"} for n in range(16)]


@pytest.fixture(params=["loaded", "streamed"])
def prepared(request, encoder):
    """The training rows and the audit of a source, loaded or streamed."""

    def prepare(**file):
        setting = data_config(file=file | {"streaming": request.param == "streamed"}, held_out=0)
        if request.param == "loaded":
            data = load_data(setting, encoder, 64)
        else:
            data = load_stream(setting, encoder, 64, False)[0]
        return data.train, data.audit["file"]

    return prepare


def test_all_faulty_rows_are_counted_and_the_first_five_shown(prepared, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", FAULTY)
    with open(path, "a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError) as caught:
        prepared(data_files=path)
    line = str(caught.value)
    assert line.startswith(f"data.file: 9 of 17 rows cannot be used: row 1 ({path}, line 2): output is blank; row 3 (")
    assert [f"row {row} (" in line for row in (1, 3, 5, 7, 9, 11)] == [True] * 5 + [False]
    assert line.endswith("; …. Fix them, or write data.file.on_error=drop.")


def test_faulty_rows_are_dropped_and_counted_where_they_may_be(prepared, tmp_path, caplog):
    path = write_jsonl(tmp_path / "rows.jsonl", FAULTY)
    with open(path, "a") as file:
        file.write("{broken\n")
    train, audit = prepared(data_files=path, on_error="drop")
    assert sorted(train["row"]) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert audit["problems"]["unusable"] == {"rows": 9, "policy": "drop", "first": [1, 3, 5, 7, 9, 11, 13, 15, 16]}
    assert (audit["rows"], audit["kept"]) == (17, 8) and "9 of 17 rows cannot be used" in caplog.text


def test_a_wrong_answer_to_what_to_do_with_faults_is_refused(tmp_path):
    line = error_of(lambda: data_config(file={"data_files": "a.jsonl", "on_error": "skip"}))
    assert "data.file.on_error should be raise or drop" in line or "on_error" in line


# size


def test_one_s_own_files_are_read_without_a_request(read, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append("a request"))
    assert read(write_jsonl(tmp_path / "a.jsonl", [HELLO])) == [HELLO] and not asked


def test_a_stream_takes_no_more_memory_than_its_rows(tmp_path):
    path = tmp_path / "a.json"
    with open(path, "w") as file:
        file.write("[" + ",\n".join(json.dumps({"text": f"{number} " + "x" * 1000}) for number in range(30_000)) + "]")
    tracemalloc.start()
    count = sum(
        len(row["text"]) > 1000 for _, row, _ in stream_rows("data.file", source(path, streaming=True), "train")
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_000 and peak < path.stat().st_size / 3


def test_the_first_rows_of_a_stream_come_before_the_file_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(HELLO) + "\n" + json.dumps(HELLO) + "\n" * 30)
    with open(path, "a") as file:
        file.write("x" * 50_000_000)  # a broken row at the end
    rows = stream_rows("data.file", source(path, streaming=True), "train")
    assert [row for _, row, _ in islice(rows, 2)] == [HELLO, HELLO]


# a part of the rows


def test_a_number_of_rows_is_a_sample_by_the_seed(encoder, tmp_path):
    file = {"data_files": write_jsonl(tmp_path / "a.jsonl", question_rows(300)), "rows": 40}
    drawn = [
        sorted(load_data(data_config(file=file, held_out=0, groups={"seed": seed}), encoder, 64).train["row"])
        for seed in (1, 1, 2)
    ]
    assert len(set(drawn[0])) == 40 and drawn[0] == drawn[1] != drawn[2] and max(drawn[0]) > 100
    data = load_data(data_config(file=file, held_out=0.25), encoder, 64)
    assert (len(data.train), len(data.held_out), data.audit["file"]["rows"]) == (30, 10, 30)


def test_a_sample_by_length_has_as_many_of_every_length(encoder, tmp_path):
    rows = [*question_rows(90), *question_rows(10, 90, "Yes. " * 30)]
    file = {"data_files": write_jsonl(tmp_path / "a.jsonl", rows), "rows": 10, "sample_by": "length"}
    for seed in range(5):
        data = load_data(data_config(file=file, held_out=0, groups={"seed": seed}), encoder, 256)
        assert sorted(row >= 90 for row in data.train["row"]) == [False] * 9 + [True]


def test_more_rows_than_there_are_is_said(encoder, tmp_path, caplog):
    file = {"data_files": write_jsonl(tmp_path / "a.jsonl", question_rows(30)), "rows": 40}
    assert len(load_data(data_config(file=file, held_out=0), encoder, 64).train) == 30
    assert "data.file.rows=40: the source has no more than 30 rows." in caplog.text


def test_a_sample_of_a_stream_is_refused(encoder, tmp_path):
    file = {"data_files": write_jsonl(tmp_path / "a.jsonl", question_rows(30)), "rows": 4, "streaming": True}
    with pytest.raises(ConfigError, match=r"data.file.rows=4: a stream has no end to draw from"):
        load_stream(data_config(file=file, held_out=0), encoder, 64, False)


# long raw text, and what is lost


@pytest.mark.parametrize("way", ["loaded", "streamed"])
def test_raw_text_is_cut_into_pieces_of_max_length_and_nothing_is_lost(encoder, tmp_path, way):
    text = "The river rises in the hills, and nobody asks why. " * 50
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "Short."}, {"text": text}])
    setting = data_config(file={"data_files": path, "streaming": way == "streamed"}, held_out=0)
    data = load_data(setting, encoder, 32) if way == "loaded" else load_stream(setting, encoder, 32, False)[0]
    pieces = sorted(
        (piece, ids.tolist(), labels.tolist())
        for row, piece, ids, labels in zip(
            data.train["row"], data.train["piece"], row_arrays(data.train, "input_ids"), row_arrays(data.train, "labels"), strict=True,
        )
        if row == 1
    )  # fmt: skip
    whole = encoder.tokenizer(text).input_ids
    whole = whole if whole[-1] == encoder.tokenizer.eos_token_id else [*whole, encoder.tokenizer.eos_token_id]
    assert [token for _, ids, _ in pieces for token in ids] == whole
    assert all(ids == labels and 2 <= len(ids) <= 32 for _, ids, labels in pieces)
    assert data.audit["file"]["problems"]["cut_into_pieces"] == {
        "rows": 1,
        "policy": "keep",
        "first": [1],
        "pieces": len(pieces),
    }
    assert data.audit["file"]["tokens"] == len(whole) + len(encoder.encode([{"text": "Short."}])["input_ids"][0])


def test_held_out_raw_text_is_cut_into_pieces_too(encoder, tmp_path):
    rows = [{"text": "The river rises in the hills. " * 40}, {"text": "And falls into the sea. " * 40}]
    data = load_data(data_config(file={"data_files": write_jsonl(tmp_path / "a.jsonl", rows)}, held_out=1), encoder, 32)
    whole = encoder.encode(rows)["input_ids"]
    assert sum(map(len, data.held_out["input_ids"])) + sum(map(len, data.train["input_ids"])) == sum(map(len, whole))


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_the_tokens_that_a_cut_costs_are_counted(encoder, tmp_path, caplog, policy):
    rows = [*question_rows(3), {"instruction": "Q?", "input": "", "output": "word " * 90}]
    file = {"data_files": write_jsonl(tmp_path / "a.jsonl", rows)}
    whole = load_data(data_config(file=file, held_out=0), encoder, None).audit["file"]["tokens"]
    data = load_data(data_config(file=file, held_out=0, max_length_policy=policy), encoder, 64)
    lost = data.audit["file"]["problems"]["truncated"]["tokens"]
    assert lost > 20 and data.audit["file"]["tokens"] + lost == whole
    assert f"with {lost:,} tokens" in caplog.text


def test_what_is_supervised_of_a_sample_is_its_answers(encoder, tmp_path):
    file = {"data_files": write_jsonl(tmp_path / "a.jsonl", question_rows(9)), "rows": 3}
    data = load_data(data_config(file=file, held_out=0), encoder, 64)
    kept = [
        ids[labels != IGNORE_INDEX]
        for ids, labels in zip(*(row_arrays(data.train, key) for key in ("input_ids", "labels")), strict=True)
    ]
    assert [encoder.tokenizer.decode(ids) for ids in kept] == ["Yes.<|im_end|>"] * 3
