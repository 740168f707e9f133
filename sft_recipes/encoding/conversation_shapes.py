"""Conversations of one shape, rendered once with placeholders where a template writes what they say as it is."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from jinja2 import Environment, TemplateError, nodes

from sft_recipes.encoding.answer_spans import AnswerFormat
from sft_recipes.encoding.rendering import remove_markers
from sft_recipes.encoding.served_contexts import choose_answers
from sft_recipes.errors import DataError

ROLES, TEXTS = ("system", "user", "assistant", "tool"), ("content", "instruction", "input")
MARK = "\ue0f2"  # a character of private use, on both sides of a text's number in the place of the text
MOST_SHAPES = 1000  # that are kept
MESSAGES, TEXT, OTHER = "messages", "text", "other"  # what an expression may hold, beside what no text is in
METHODS = frozenset((*dir(dict), *dir(list)))


class ShapeCache:
    """What `render` makes of a conversation, from what it made of its shape: roles, flags, which texts are empty.

    A conversation has to be rendered, and `fill` gives None, where a text can matter to more than its own place: for
    whitespace around it, a thought, a special token that it spells out, and a template that does more than to write it.
    """

    def __init__(self, template: str, answers: AnswerFormat, special: Sequence[str], render: Callable[..., list]):
        self.render, self.moulds = render, {}
        self.is_verbatim = not answers.openings and writes_texts_verbatim(template)
        self.heads, self.tails = {*"".join(token[:-1] for token in special)}, {*"".join(token[1:] for token in special)}

    def fill(self, talk: Mapping[str, Any], train_on: str, unroll: str, is_typed: Callable[[str], bool]) -> Any:
        """The one Context of a conversation, or None; `is_typed` finds special tokens that a text spells out."""
        if not self.is_verbatim or talk.get("tools") or talk.get("chat_template_kwargs"):
            return None
        texts, shape = [], [train_on, unroll, talk.get("train") is not False]
        for message in talk["messages"]:
            for key, value in message.items():
                if key in TEXTS and type(value) is str and value == value.strip():
                    texts += [value] if value else []
                    shape += key, not value
                elif (key == "role" and value in ROLES) or (key == "train" and type(value) is bool):
                    shape += key, value
                else:
                    return None
            shape.append("end")
        shape, said = tuple(shape), "\0".join(texts)
        if shape not in self.moulds and len(self.moulds) < MOST_SHAPES:
            self.moulds[shape] = self.make_mould(talk, train_on, unroll)
        if not self.moulds.get(shape) or "think>" in said or is_typed(said):
            return None
        row, pieces = self.moulds[shape]
        pieces = [
            (place, "".join([texts[part] if type(part) is int else part for part in parts]), loss)
            for place, parts, loss in pieces
        ]
        if settings := row.conversation.get("chat_template_kwargs"):
            talk = {**talk, "chat_template_kwargs": settings}
        return row._replace(conversation=talk, pieces=pieces, text="".join([text for _, text, _ in pieces]))

    def make_mould(self, talk: Mapping[str, Any], train_on: str, unroll: str) -> tuple[Any, list] | None:
        """The row of a shape, and its pieces with numbers for texts; None where other texts could make other pieces."""
        numbers = count()
        messages = [
            {key: f"{MARK}{next(numbers)}{MARK}" if key in TEXTS and value else value for key, value in message.items()}
            for message in talk["messages"]
        ]
        try:
            trained = sum(choose_answers(messages, train_on).values()) * (talk.get("train") is not False)
            row, *more = self.render({**talk, "messages": messages}, train_on, unroll)
        except DataError:
            return None
        literals = re.split(f"{MARK}\\d+{MARK}", row.text)
        if not all(literals[1:-1]) or any(text[:1] in self.tails or text[-1:] in self.heads for text in literals):
            return None  # a text could complete a special token
        if more or row.notes or len(row.answers) != trained or row.text != "".join(text for _, text, _ in row.pieces):
            return None  # an answer, or all that follows it, is not shown as it is served
        if any(place == "typed" for place, _, _ in row.pieces):
            return None
        pieces = []
        for place, text, loss in row.pieces:
            parts = re.split(f"{MARK}(\\d+){MARK}", text)
            pieces.append((place, [int(part) if odd % 2 else part for odd, part in enumerate(parts)], loss))
        return row, pieces


def writes_texts_verbatim(template: str) -> bool:
    """Whether all that a template does with the texts of messages is to write them, to trim them, and to ask whether
    they are empty; as its syntax tree shows."""
    names, before = {"messages": MESSAGES, "loop": OTHER, "strftime_now": OTHER, "lipsum": OTHER}, None
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(remove_markers(template))
        while before != names:  # a name may be set below the line that uses it
            before = dict(names)
            find_kind(tree, names)
    except (TemplateError, LookupError):
        return False
    return MARK not in template


def find_kind(node: nodes.Node, names: dict[str, str]) -> str | None:
    """What a part of a template may hold; `names` learns what its variables hold, at any line, whatever their scope.

    Raises LookupError where it does anything else with texts, or with messages than to go through them, count them and
    read their fields.
    """

    def check(some: Iterable[nodes.Node], *allowed: str) -> str | None:
        found = {find_kind(each, names) for each in some} - {None}
        if not found <= {*allowed}:
            raise LookupError
        return next(iter(found), None)

    inner = list(node.iter_child_nodes())
    match node:
        case nodes.Name(name=name):
            return names.get(name)
        case nodes.Getattr(node=of, attr=key) | nodes.Getitem(node=of, arg=nodes.Const(value=str(key))):
            if check([of], MESSAGES, OTHER) == MESSAGES and key in METHODS:
                raise LookupError
            return TEXT if key in TEXTS else MESSAGES if key in ("nextitem", "previtem") else None
        case (
            nodes.Getitem(node=of, arg=nodes.Const() | nodes.Slice() | nodes.Neg() | nodes.Sub() as place)
            | nodes.Getitem(node=of, arg=nodes.Add(right=nodes.Const(value=int())) as place)
        ):  # a number, and no name of a field
            check([place])
            return check([of], MESSAGES)
        case nodes.Filter(name="trim", args=[], kwargs=[], dyn_args=None, dyn_kwargs=None):
            return check(inner, TEXT)
        case nodes.Filter(name="length"):
            check(inner, MESSAGES)
        case nodes.Test(name="defined" | "none" | "string" | "mapping" | "iterable"):
            check(inner, TEXT, MESSAGES, OTHER)
        case nodes.Add() | nodes.Concat() | nodes.And() | nodes.Or() | nodes.CondExpr():
            return check(inner, TEXT)
        case nodes.If() | nodes.Not():
            check(inner, TEXT, MESSAGES)
        case nodes.For(target=target, iter=value) | nodes.Assign(target=target, node=value):
            kind = check([value], MESSAGES, *([TEXT] if isinstance(node, nodes.Assign) else []))
            if kind and (not isinstance(target, nodes.Name) or names.setdefault(target.name, kind) != kind):
                raise LookupError
            check((each for each in inner if each not in (target, value)), TEXT, MESSAGES)
        case nodes.Output():
            check(inner, TEXT)
        case nodes.Stmt() if not isinstance(node, nodes.Continue | nodes.Break):
            raise LookupError  # a macro, a block, an import
        case _:
            check(inner)
    return None
