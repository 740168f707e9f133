"""Local files as plain Python rows: every value is what the file says, and what is wrong with a row has its line."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from reprlib import repr as short
from typing import Any, TextIO

import pyarrow

from sft_recipes.data.json_document import DECODER, read_document
from sft_recipes.errors import DataError, one_line

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
            if kind == "json":
                yield from read_json(file, field)
            elif kind == "csv":
                yield from read_csv(file, sep or ("\t" if ".tsv" in Path(path).suffixes else ","))
            else:
                lines = enumerate(whole_lines(read_pieces(file)), start=1)
                lines = ((text, line) for line, text in lines if not text.isspace())
                yield from ((checked_row({"text": text.rstrip("\n")}, text), line) for text, line in lines)
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


def read_pieces(file: TextIO) -> Iterator[str]:
    """The file's lines, in pieces where one is longer than a row may be: a packed file can hide one of any length."""
    return iter(lambda: file.readline(ROW_CHARACTERS + 1), "")


def whole_lines(pieces: Iterable[str]) -> Iterator[str]:
    """The lines; raises DataError for the first that is a piece."""
    for number, text in enumerate(pieces, start=1):
        if len(text) > ROW_CHARACTERS:
            raise DataError(f"line {number}: longer than {ROW_CHARACTERS:,} characters. Split the row.")
        yield text


def read_csv(file: TextIO, sep: str) -> Iterator[tuple[Row, int]]:
    """The rows under the header, every cell as text; blank lines are none."""
    csv.field_size_limit(ROW_CHARACTERS)  # of a cell, 131,072 unless told
    reader, columns = csv.reader(whole_lines(read_pieces(file)), delimiter=sep, strict=True), []
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
            columns = [name or f"Unnamed: {place}" for place, name in enumerate(cells)]
            if len(columns) > MOST_COLUMNS:
                raise DataError(f"line {line}: {len(columns):,} columns are more than the {MOST_COLUMNS:,} of a row.")
            if len(set(columns)) < len(columns):
                raise DataError(f"line {line}: two columns of {', '.join(columns)} have one name.")
        elif cells and len(cells) != len(columns):
            yield Fault(f"{len(cells)} cells under a header of {len(columns)}"), line
        elif cells:
            yield checked_row(dict(zip(columns, cells, strict=True)), "".join(cells)), line


def read_json(file: TextIO, field: str | None) -> Iterator[tuple[Row, int]]:
    """The rows of JSON Lines or of a document, which the first lines tell apart."""
    pieces = read_pieces(file)
    head = list(islice(pieces, 20))
    start = next((text.lstrip() for text in head if not text.isspace()), "")
    if field is None and not start.startswith("[") and any(map(is_row, whole_lines(head))):
        lines = enumerate(whole_lines(chain(head, pieces)), start=1)
        yield from ((parse_line(text), line) for line, text in lines if not text.isspace())
    else:
        items = read_document(file, "".join(head), field)
        yield from ((checked_row(value, text), line) for value, text, line in items)


def is_row(text: str) -> bool:
    """Whether a line is an object by itself, as in JSON Lines; an indented one is part of a document."""
    return text.startswith("{") and not isinstance(parse_line(text), Fault)


def parse_line(text: str) -> Row:
    """The row of one line of JSON Lines."""
    try:
        value = DECODER.decode(text.rstrip())  # the column of what is missing is the last one
    except (ValueError, RecursionError) as error:
        value = error
    return checked_row(value, text)


def checked_row(value: Any, text: str) -> Row:
    """The row that stands in `text`; a fault where that is no object, or a string in it is no proper text."""
    if isinstance(value, dict) and text.count("[") + text.count("{") > MOST_LEVELS and is_deeper(value, MOST_LEVELS):
        return Fault(f"nested deeper than {MOST_LEVELS} levels")
    broken = not text.isascii() and has_lone_surrogate(text)
    if broken or ("\\u" in text and HALF_CHARACTER.search(text)):
        place, half = next(lone_surrogates(value), ("", ""))
        if broken:
            byte = ord(half or next(lone_surrogates(text))[1]) - 0xDC00
            return Fault(
                f"{place or 'it'} has the byte 0x{byte:02x}, which is not valid in its encoding (data.NAME.encoding)"
            )
        if half:
            return Fault(f"{place} has half a character ({half!a})")
    if isinstance(value, dict) and len(value) > MOST_COLUMNS:
        return Fault(f"{len(value):,} fields are more than the {MOST_COLUMNS:,} of a row")
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, json.JSONDecodeError):
        return Fault(f"not JSON ({value.msg}, column {value.colno})")
    if isinstance(value, Exception):
        return Fault(one_line(value))
    return Fault(f"should be an object with the row's fields, not {short(value)}")


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and mappings stand within each other in more levels than these."""
    layer = [value]
    for _ in range(levels):
        layer = [item for part in layer for item in (part.values() if isinstance(part, dict) else part)]
        layer = [item for item in layer if isinstance(item, dict | list)]
    return bool(layer)


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds what no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


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
