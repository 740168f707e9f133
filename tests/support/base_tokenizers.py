"""Folders with the tokenizers of base models of every kind: small ones that are trained here, and real ones in ../shared.

The small ones are trained from texts in this repository that nobody edits, so that they are the same on every machine and
after every change. Each kind differs in how it joins text and special tokens, which is what makes an exact mask hard.
"""

import io
import json
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_recipes.encoding.chat_template import prepare_tokenizer
from sft_recipes.encoding.encoder import Encoder
from support.paths import NEEDS_SHARED, ROOT, SHARED, TINY_MODEL

KINDS = ("tiny", "llama3", "neox", "llama2", "legacy")
REAL_KINDS = ("real neox", "real llama2", "real legacy")
LLAMA3_SPLIT = (  # the split pattern of Llama 3 and Qwen
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def training_paragraphs() -> list[str]:
    """Prose of the tiny model's world and, for its indentation, the licence; blank lines stand behind, as in a chat."""
    prose = [json.loads(line)["text"] for line in (TINY_MODEL.parent / "data" / "prose.jsonl").open(encoding="utf-8")]
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n")
    return [f"{paragraph}\n\n" for paragraph in [*prose, *licence]]


@cache
def base_tokenizer_folder(kind: str, root: Path) -> Path:
    """A folder below `root` with a base model's tokenizer of one of KINDS or, where ../shared is there, of REAL_KINDS."""
    folder = root / kind
    folder.mkdir(exist_ok=True)
    if kind in REAL_KINDS and not SHARED.is_dir():
        pytest.skip(NEEDS_SHARED)
    if kind == "tiny":
        AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(folder)
    elif kind.endswith("llama2"):
        real = (SHARED / "llama2_tokenizer.model").read_bytes() if kind in REAL_KINDS else None
        (folder / "tokenizer.model").write_bytes(real or train_sentencepiece())
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    elif kind.endswith("legacy"):
        llama2 = base_tokenizer_folder(kind.replace("legacy", "llama2"), root)
        PreTrainedTokenizerFast(
            tokenizer_object=prepend_as_mistral(AutoTokenizer.from_pretrained(llama2).backend_tokenizer),
            bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        ).save_pretrained(folder)  # fmt: skip
    elif kind.endswith("neox"):
        file = SHARED / "neox_20b_tokenizer.json"
        tokenizer = Tokenizer.from_file(str(file)) if kind in REAL_KINDS else train_neox()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
        ).save_pretrained(folder)
    elif kind == "llama3":
        PreTrainedTokenizerFast(
            tokenizer_object=train_llama3(), bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
        ).save_pretrained(folder)
    return folder


def train_neox() -> Tokenizer:
    """As GPT-NeoX's: GPT-2's split, NFC, offsets without spaces, added tokens for runs of spaces."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    bpe.post_processor, bpe.decoder = processors.ByteLevel(trim_offsets=True), decoders.ByteLevel()
    train_bytes(bpe, ["<|endoftext|>", "<|padding|>"])
    bpe.add_tokens([" " * number for number in range(24, 1, -1)])
    return bpe


def train_llama3() -> Tokenizer:
    """As Llama 3's: its own split, no normalizer; the BOS is the chat template's."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    train_bytes(bpe, names)
    return bpe


def train_bytes(bpe: Tokenizer, special_tokens: list[str]) -> None:
    """Byte-level merges up to 1,200 tokens."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(training_paragraphs(), trainer)


def train_sentencepiece() -> bytes:
    """A tokenizer.model as Llama 2's, with its options: a dummy prefix, digits apart, bytes for what it has not seen."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(training_paragraphs()).splitlines()), model_writer=model, model_type="bpe", vocab_size=1200,
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=1.0, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def prepend_as_mistral(llama2: Tokenizer) -> Tokenizer:
    """The same pieces as Mistral 7B's tokenizer.json has them: a dummy prefix after every special token."""
    spec = json.loads(llama2.to_str())
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaced]}
    spec["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(spec))


def encoder_with_template(encoder: Encoder, path: Path, template: str) -> Encoder:
    """An encoder with another template, which is written to `path`, and a tokenizer of its own that serves with it."""
    tokenizer = AutoTokenizer.from_pretrained(encoder.tokenizer.name_or_path)
    path.write_text(template)
    return Encoder(tokenizer, prepare_tokenizer(tokenizer, str(path), any_stop=True)[0])  # as a run does
