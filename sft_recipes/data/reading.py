"""Local files as plain Python rows: every value is what the file says, and what is wrong with a row has its line."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from reprlib import repr as short
from typing import Any, TextIO

import pyarrow

from sft_recipes.data.json_document import DECODER, name_bad_byte, read_document
from sft_recipes.errors import DataError, one_line, plural

KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # what pyarrow unpacks, by a file's first bytes
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON may write one half of a surrogate pair


# Of a row: more is a mistake or malice, and takes memory in every step after this one
ROW_CHARACTERS, MOST_COLUMNS, MOST_LEVELS = 1 << 24, 10_000, 100


class Fault(str):
    """What is wrong with something in a file, so that it is no row."""


Row = dict[str, Any] | Fault


def read_file(
    path: str, kind: str, field: str | None = None, sep: str | None = None, encoding: str = "utf-8"
) -> Iterator[tuple[Row, int]]:
    """What a `json`, `csv` or `text` file holds, row by row, each with the line where it begins.

    A lone string is a row with `text`. `field` is the key under which a JSON document has its rows, `sep` stands
    between a csv's cells. Raises DataError where the rest of the file cannot be read.
    """
    try:
        with open_text(path, encoding, newline="" if kind == "csv" else None) as file:
            # pieces, where a line is longer than a row may be: a packed file can hide one of any length
            pieces = iter(lambda: file.readline(ROW_CHARACTERS + 1), "")
            if kind == "csv":
                yield from read_csv(whole_lines(pieces), sep or ("\t" if ".tsv" in Path(path).suffixes else ","))
                return
            head = list(islice(pieces, 20)) if kind == "json" else []
            if kind == "json" and (field is not None or not begins_with_lines(head)):
                items = read_document(file, "".join(head), field)
            else:
                lines = enumerate(whole_lines(chain(head, pieces)), start=1)
                parse = parse_line if kind == "json" else lambda text: text.rstrip("\n")
                items = ((parse(text), text, line) for line, text in lines if not text.isspace())
            yield from ((checked_row(value, text), line) for value, text, line in items)
    except DataError as error:
        raise DataError(f"{path}, {error}") from error
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read to its end: {one_line(error)}.") from error


def open_text(path: str, encoding: str, newline: str | None) -> TextIO:
    """The file as text, unpacked where it is packed; bytes that are none in its encoding become lone surrogates."""
    with open(path, "rb") as file:
        start = file.read(4)
    packed = next((name for magic, name in PACKED.items() if start.startswith(magic)), None)
    binary = pyarrow.input_stream(path, compression=packed) if packed else open(path, "rb")  # noqa: SIM115 - closed with the text
    encoding = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    return io.TextIOWrapper(binary, encoding, errors="surrogateescape", newline=newline)


def whole_lines(pieces: Iterable[str]) -> Iterator[str]:
    """The lines; raises DataError for the first that is a piece."""
    for number, text in enumerate(pieces, start=1):
        if len(text) > ROW_CHARACTERS:
            raise DataError(f"line {number}: longer than {ROW_CHARACTERS:,} characters. Split the row.")
        yield text


def begins_with_lines(head: Sequence[str]) -> bool:
    """Whether the first lines are of JSON Lines: one is an object by itself, and all are not within an array."""
    start = next((text.lstrip() for text in head if not text.isspace()), "")
    return not start.startswith("[") and any(
        text.startswith("{") and isinstance(parse_line(text), dict) for text in whole_lines(head)
    )


def parse_line(text: str) -> Any:
    """What one line of JSON Lines holds, or the error that it gives."""
    try:
        return DECODER.decode(text.rstrip())  # the column of what is missing is the last one
    except (ValueError, RecursionError) as error:
        return error


def read_csv(lines: Iterator[str], sep: str) -> Iterator[tuple[Row, int]]:
    """The rows under the header, every cell as text; blank lines are none."""
    csv.field_size_limit(ROW_CHARACTERS)  # of a cell, 131,072 unless told
    reader, columns = csv.reader(lines, delimiter=sep, strict=True), []  # strict: an open quote is told
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if not columns or re.search("unexpected end|field limit", str(error)):  # what follows is in that one cell
                raise DataError(f"line {line}: {error}, is a quote opened and not closed?") from error
            yield Fault(f"cells that cannot be told apart ({error})"), line
            continue
        if cells is None:
            return
        if cells and not columns:
            # as pandas reads the column without a name that it has written for its index
            columns = [name or f"Unnamed: {place}" for place, name in enumerate(cells)]
            if len(columns) > MOST_COLUMNS:
                raise DataError(f"line {line}: {len(columns):,} columns are more than the {MOST_COLUMNS:,} of a row.")
            if len(set(columns)) < len(columns):
                raise DataError(f"line {line}: two columns of {', '.join(columns)} have one name.")
        elif cells and len(cells) != len(columns):
            yield Fault(f"{plural(len(cells), 'cell')} under a header of {len(columns)}"), line
        elif cells:
            yield checked_row(dict(zip(columns, cells, strict=True)), "".join(cells)), line


def checked_row(value: Any, text: str) -> Row:
    """The row that stands in `text`; a fault where that is no object, or a string in it is no proper text."""
    if isinstance(value, json.JSONDecodeError):
        return Fault(name_bad_byte(text, value.pos) or f"not JSON ({value.msg}, column {value.colno})")
    if isinstance(value, Exception):
        return Fault(one_line(value))
    row = {"text": value} if isinstance(value, str) else value
    if not isinstance(row, dict) or not row:
        return Fault(f"should be an object with the row's fields, not {short(value)}")
    if len(row) > MOST_COLUMNS:
        return Fault(f"{len(row):,} fields are more than the {MOST_COLUMNS:,} of a row")
    if text.count("[") + text.count("{") > MOST_LEVELS and is_deeper(row, MOST_LEVELS):
        return Fault(f"nested deeper than {MOST_LEVELS} levels")
    broken = not text.isascii() and text.encode(errors="ignore").decode() != text
    if broken or ("\\u" in text and HALF_CHARACTER.search(text)):
        for place, half in lone_surrogates(row):
            bad_byte = name_bad_byte(half, 0)
            return Fault(f"{place}: {bad_byte}" if bad_byte else f"{place} has half a character ({half!a})")
    return row


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and mappings stand within each other in more levels than these."""
    layer = [value]
    for _ in range(levels):
        layer = [item for part in layer for item in (part.values() if isinstance(part, dict) else part)]
        layer = [item for item in layer if isinstance(item, dict | list)]
    return bool(layer)


def lone_surrogates(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Where strings have lone surrogates, and the first one of each.

    >>> list(lone_surrogates({"turns": ["ok", "a" + chr(0xD83D)]})) == [("turns[1]", chr(0xD83D))]
    True
    """
    if isinstance(value, str):
        yield from ((path, half) for half in re.findall("[\ud800-\udfff]", value)[:1])
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from lone_surrogates(key, f"a key in {path or 'the row'}")
        yield from lone_surrogates(item, f"{path}.{key}".lstrip("."))
    for place, item in enumerate(value) if isinstance(value, list) else ():
        yield from lone_surrogates(item, f"{path}[{place}]")
