"""A JSON document of any size, item by item: an array, objects one after another, or what stands under a key."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, TextIO

from sft_recipes.errors import DataError

Item = tuple[Any, str, int]  # a value or the error that it gave, its text, and the line where it begins
CHUNK_CHARACTERS = 1 << 20  # that are read at once
ITEM_CHARACTERS, PART_CHARACTERS = 1 << 24, 1 << 28  # at most, of an item, and of a part beside or around the rows
SPACE = re.compile(r"\s*")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of whose equal keys json would keep the last alone."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} stands twice in one object")
    return found


def finite_float(text: str) -> float:
    """A number with a fraction or an exponent; beyond 1.8e308 Python would make it infinite."""
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text} is too large")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_float=finite_float)
LENIENT_DECODER = json.JSONDecoder(parse_int=str)  # Python reads whole numbers of 4,300 digits at most


def name_bad_byte(text: str, place: int) -> str:
    """What is wrong at this place of a JSON text where a byte is no character, as surrogateescape marks it; else ''."""
    found = text[place : place + 1]
    fault = f"the byte 0x{ord(found or ' ') & 0xFF:02x} is not valid in its encoding (data.NAME.encoding)"
    return fault if "\udc80" <= found <= "\udcff" else ""


def read_document(file: TextIO, head: str, field: str | None) -> Iterator[Item]:
    """The items of the document that begins with `head` and goes on in `file`; raises DataError where it breaks off.

    Under the key `field` stands a list of rows, or a mapping from columns to lists of one length.
    """
    document = Document(file, head, ITEM_CHARACTERS if field is None else PART_CHARACTERS)
    if field is None and document.peek() != "[":
        while document.peek():
            yield document.value()
    elif field is None:
        yield from document.array()
    elif document.peek() == "[":
        raise DataError(f"field {field}: the file is a list, without keys. Leave data.NAME.field out.")
    else:
        names = []
        for name in document.entries():  # to the end, or a file that breaks off and a second document would go unseen
            names.append(name)
            if name != field:
                document.value()
            else:
                yield from document.array() if document.peek() == "[" else document.columns(field)
        if field not in names:
            raise DataError(f"field {field}: the file has {', '.join(names)}.")
    if document.peek():
        document.fail("more follows after the rows")


class Document:
    """A JSON text that is read as far as it is asked for, so that an item takes no more memory than its own."""

    def __init__(self, file: TextIO, text: str, most: int):
        self.file, self.text, self.place, self.most = file, text, 0, most
        self.line, self.counted = 1, 0  # the line of the character `counted`

    def read_on(self) -> bool:
        """Takes in more of the file, at least as much as waits; False at its end."""
        waiting = len(self.text) - self.place
        if waiting > self.most:
            self.fail(f"an item is longer than {self.most:,} characters")
        if more := self.file.read(max(CHUNK_CHARACTERS, waiting)):
            self.line_at(self.place)
            self.text, self.place, self.counted = self.text[self.place :] + more, 0, 0
        return bool(more)

    def line_at(self, place: int) -> int:
        """The line of a character."""
        self.line += self.text.count("\n", self.counted, place)
        self.counted = place
        return self.line

    def peek(self) -> str:
        """The next character that is no space, '' at the end."""
        while True:
            self.place = SPACE.match(self.text, self.place).end()
            if self.place < len(self.text) or not self.read_on():
                return self.text[self.place : self.place + 1]

    def take(self, known: str) -> str:
        """Steps over the next character, which has to be one of these."""
        found = self.peek()
        if not found or found not in known:
            self.fail(f"{found or 'its end'} stands where {' or '.join(known)} should")
        self.place += 1
        return found

    def value(self) -> Item:
        """The next value; its error where it is JSON, but not to be used."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                # a text that is cut shows so at its end, or where its last string begins
                cut = error.pos > len(self.text) - 20 or error.msg.startswith("Unterminated")
                if not (cut and self.read_on()):
                    self.fail(error.msg, error.pos)
                continue
            except RecursionError:
                self.fail("it is nested too deeply")
            except ValueError as error:
                value, end = error, LENIENT_DECODER.raw_decode(self.text, self.place)[1]
            if end + 2 < len(self.text) or not self.read_on():  # a number may go on, 1 with e-5
                line, text = self.line_at(self.place), self.text[self.place : end]
                self.place = end
                return value, text, line

    def array(self) -> Iterator[Item]:
        """The items of the array that begins here."""
        separator = self.take("[")
        if self.peek() == "]":
            separator = self.take("]")
        while separator != "]":
            yield self.value()
            separator = self.take(",]")

    def columns(self, field: str) -> Iterator[Item]:
        """The rows of the mapping from columns to lists of one length that begins here."""
        columns, text, line = self.value()
        lists = list(columns.values()) if isinstance(columns, dict) else []
        if not lists or not all(isinstance(cells, list) and len(cells) == len(lists[0]) for cells in lists):
            raise DataError(f"field {field}: should be a list of rows, or lists of one length by column.")
        return ((dict(zip(columns, cells, strict=True)), text, line) for cells in zip(*lists, strict=True))

    def entries(self) -> Iterator[str]:
        """The keys of the object that begins here; the value of each is to be read before the next one."""
        separator = self.take("{")
        while separator != "}":
            name = self.value()[0] if self.peek() == '"' else self.take('"')
            self.take(":")
            yield name
            separator = self.take(",}")

    def fail(self, why: str, place: int | None = None) -> None:
        """Raises DataError with the line."""
        place = self.place if place is None else place
        raise DataError(f"line {self.line_at(place)}: {name_bad_byte(self.text, place) or f'not JSON ({why})'}.")
