"""The `tokenizers` object beneath a fast tokenizer: many texts at once, and texts from the middle of a longer one."""

import json
import re
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers.utils.chat_template_utils import mark_control_tokens

# The marks that transformers puts around a control token that somebody typed
TOKEN_START, TOKEN_END = mark_control_tokens("x", re.compile("x")).split("x")


def encode_batch(
    backend: Tokenizer, texts: list[str], add_special_tokens: bool = False, encode_special_tokens: bool = False
) -> list[Encoding]:
    """Many texts tokenized at once, on all cores; `encode_special_tokens` reads special tokens in them as text."""
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = encode_special_tokens
    try:
        return backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    finally:
        backend.encode_special_tokens = False


def without_dummy_prefix(backend: Tokenizer) -> Tokenizer:
    """A tokenizer for the middle of a text: SentencePiece's dummy prefix belongs to the beginning of a text alone."""
    splitting = component_specs(backend.pre_tokenizer, "pretokenizers")
    normalizing = component_specs(backend.normalizer, "normalizers")
    prefixed = any(part.get("prepend_scheme", "never") != "never" or part.get("add_prefix_space") for part in splitting)
    if not prefixed and not any(part["type"] == "Prepend" for part in normalizing):
        return backend
    spec = json.loads(backend.to_str())
    for part in splitting:
        part |= {"prepend_scheme": "never"} if part["type"] == "Metaspace" else {}
        part |= {"add_prefix_space": False} if part["type"] == "ByteLevel" else {}
    if splitting:
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splitting}
    kept = [part for part in normalizing if part["type"] != "Prepend"]
    spec["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    return Tokenizer.from_str(json.dumps(spec))


def component_specs(component: Any, key: str) -> list[dict[str, Any]]:
    """The members of a tokenizers Sequence as mappings, or the one component there is."""
    if component is None:
        return []
    spec = json.loads(component.__getstate__())
    return spec.get(key, [spec])
