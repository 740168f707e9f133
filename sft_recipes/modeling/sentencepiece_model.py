"""A SentencePiece tokenizer's own file, `tokenizer.model`: saved for llama.cpp, and compared with its conversion."""

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerFast

from sft_recipes.errors import plural

log = logging.getLogger(__name__)


def warn_of_other_tokens(tokenizer: PreTrainedTokenizerFast, rows: Iterable[list[int]]) -> None:
    """Warns where a tokenizer that was converted from `tokenizer.model` alone makes other tokens than SentencePiece.

    The rows are token ids, whose texts are encoded by both. transformers 5 converts Llama's with wrong merges: four
    spaces before `return` are one token, where SentencePiece has three spaces and ` return`. From 5.24 on its generic
    class converts the same file right, and `tokenizer.json` is taken before `tokenizer.model`.
    """
    pieces = find_pieces(tokenizer)
    if pieces is None or pieces.with_name("tokenizer.json").is_file():
        return
    own = SentencePieceProcessor(model_file=str(pieces))
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]
    different = [text for text in texts if tokenizer(text, add_special_tokens=False).input_ids != own.encode(text)]
    if different:
        log.warning(
            "%d of %s %s other tokens than SentencePiece makes, with which the base was trained: transformers "
            "converts %s with wrong merges. Take the base's tokenizer.json, or let transformers 5.24 write one: "
            "transformers.PreTrainedTokenizerFast.from_pretrained('%s').save_pretrained('%s')",
            len(different), plural(len(texts), "row"), "has" if len(different) == 1 else "have", pieces,
            pieces.parent, pieces.parent,
        )  # fmt: skip


def find_pieces(tokenizer: PreTrainedTokenizerFast) -> Path | None:
    """The `tokenizer.model` that the tokenizer came with; None where it came with none."""
    pieces = Path(getattr(tokenizer, "vocab_file", None) or "")
    return pieces if pieces.name == "tokenizer.model" and pieces.is_file() else None


def save_sentencepiece_model(tokenizer: PreTrainedTokenizerFast, folder: Path) -> bool:
    """Saves the files that llama.cpp's converter reads of a SentencePiece tokenizer to `folder`.

    transformers 5 writes tokenizer.json only, which lacks the pieces' scores: without tokenizer.model the converter
    gives all pieces one score, and most texts become other tokens. It reads added tokens from added_tokens.json only.
    Returns False for a SentencePiece tokenizer that came without tokenizer.model.
    """
    pieces = find_pieces(tokenizer)
    if pieces is None:
        return not is_sentencepiece(tokenizer)
    shutil.copyfile(pieces, folder / pieces.name)
    known = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    added = {token: id for token, id in tokenizer.get_added_vocab().items() if id >= known}
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n", encoding="utf-8")
    return True


def is_sentencepiece(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a tokenizer was converted from SentencePiece's BPE, the one kind of BPE that falls back to bytes."""
    return getattr(tokenizer.backend_tokenizer.model, "byte_fallback", False)
