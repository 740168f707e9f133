"""Any conversation, for tokenizers of every kind: the ids are its text's, the prompt is serving's, the loss on its answers."""

import re
import unicodedata
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_recipes.encoding.encoder import IGNORE_INDEX, Encoder
from support.base_tokenizers import KINDS

TEMPLATES_BY_KIND = [("tiny", "chatml"), ("llama3", "llama3"), ("neox", "alpaca"), ("neox", "tulu"), ("llama2", "llama2"),
                     ("llama2", "zephyr"), ("legacy", "chatml"), ("legacy", "vicuna")]  # fmt: skip
CONTROL = ("<|im_end|>", "<|eot_id|>", "<s>", "</s>", "<|endoftext|>", "[INST]", "### Response:")
# Any text, with what a tokenizer is known to trip over far more often than by chance
PIECE = st.text(max_size=8) | st.sampled_from(
    [" ", "  ", "\n", "\n\n", "\t", "\r\n", "▁", ".", ":", "e\u0301", "🙂", *CONTROL]
)
TEXT = st.lists(PIECE, max_size=6).map("".join)
ANSWER = TEXT.filter(str.strip)
# What the tokenizer itself takes for the same: GPT-NeoX's normalizes, SentencePiece writes a space as ▁
READ = dict.fromkeys(KINDS, str) | {"neox": lambda text: unicodedata.normalize("NFC", text)}
READ |= dict.fromkeys(("llama2", "legacy"), lambda text: text.replace("▁", " "))


def trained_spans(labels: np.ndarray) -> list[tuple[int, int]]:
    """Where the stretches with loss begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], labels != IGNORE_INDEX, [False]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@cache
def bytes_of_tokens(tokenizer) -> list[bytes]:
    """The bytes that each token stands for, from its spelling alone, without the tokenizer's own decoder."""
    special = {id: token.content.encode() for id, token in tokenizer.added_tokens_decoder.items()}
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if "▁" in pieces:  # SentencePiece
        plain = [
            bytes([int(piece[3:5], 16)]) if re.fullmatch("<0x..>", piece) else piece.replace("▁", " ").encode()
            for piece in pieces
        ]
    else:
        codes = {letter: code for code, letter in bytes_to_unicode().items()}
        plain = [bytes(codes[letter] for letter in piece if letter in codes) for piece in pieces]
    return [special.get(id, piece) for id, piece in enumerate(plain)]


def written(tokenizer, ids) -> bytes:
    """The bytes that tokens stand for."""
    known = bytes_of_tokens(tokenizer)
    return b"".join(known[id] for id in ids)


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's letters for bytes: the printable ones stand for themselves, the others for letters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [code for code in range(256) if code not in printable]
    return {code: chr(code) for code in printable} | {code: chr(256 + place) for place, code in enumerate(others)}


def served_ids(tokenizer, history: list[dict]) -> list[int]:
    """What a server feeds the model that keeps typed control tokens text, as transformers does it."""
    return tokenizer.apply_chat_template(
        history, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )


def turns(*texts: str) -> list[dict]:
    """Questions and answers in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


@pytest.mark.parametrize(("kind", "template"), TEMPLATES_BY_KIND)
@given(question=TEXT, answer=ANSWER)
def test_the_prompt_is_servings_and_the_loss_is_on_the_answer(chat_tokenizer, kind, template, question, answer):
    tokenizer, marked, _ = chat_tokenizer(kind, template)
    encoder = Encoder(tokenizer, marked)
    row = encoder.encode([{"messages": turns(question, answer)}])
    ids, labels = row["input_ids"][0], row["labels"][0]
    ((start, end),) = trained_spans(labels)
    assert ids[:start].tolist() == served_ids(tokenizer, turns(question))
    said = READ[kind](answer.strip() if template in ("llama2", "llama3") else answer)  # which these templates cut
    assert written(tokenizer, ids[start:end]).decode() == said + encoder.stop
    assert labels[start:end].tolist() == ids[start:end].tolist()


@pytest.mark.parametrize(("kind", "template"), TEMPLATES_BY_KIND)
@settings(max_examples=settings.default.max_examples // 2)
@given(texts=st.tuples(TEXT, ANSWER, TEXT, ANSWER))
def test_a_later_question_is_read_as_serving_reads_it(chat_tokenizer, kind, template, texts):
    tokenizer, marked, _ = chat_tokenizer(kind, template)
    row = Encoder(tokenizer, marked).encode([{"messages": turns(*texts)}])
    (_, end), (start, _) = trained_spans(row["labels"][0])
    ids, served = row["input_ids"][0], served_ids(tokenizer, turns(*texts[:3]))
    assert ids[end:start].tolist() == served[end - start :]  # all that stands behind the first answer
    assert written(tokenizer, ids[:start]) == written(tokenizer, served)


@pytest.mark.parametrize("kind", KINDS)
@given(text=ANSWER)
def test_raw_text_is_read_whole_and_trained_whole(chat_tokenizer, kind, text):
    tokenizer, marked, _ = chat_tokenizer(kind, "chatml")
    row = Encoder(tokenizer, marked).encode([{"text": text}])
    ids = row["input_ids"][0]
    assert row["labels"][0].tolist() == ids.tolist() and ids[-1] == tokenizer.eos_token_id
    said = READ[kind](text)
    if kind == "legacy" or (kind == "llama2" and not said.startswith(" ")):
        said = f" {said}"  # SentencePiece's dummy prefix; Metaspace has none in front of a space
    bos = "<s>" if kind in ("llama2", "legacy") else ""
    assert written(tokenizer, ids[:-1]).decode() == bos + said
