"""Tokenizers of base models of every kind, as folders."""

import json
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from support.paths import ROOT, SHARED, TINY_MODEL

LLAMA3_SPLIT = (  # the split pattern of Llama 3 and Qwen
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def base_tokenizer_folder(kind: str, root: Path) -> Path:
    """A folder with a base model's tokenizer of one kind: byte-level BPE, SentencePiece, or Llama-3 like."""
    folder = root / kind
    folder.mkdir(exist_ok=True)
    if kind in ("neox", "llama2", "legacy") and not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    if kind == "neox":
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(SHARED / "neox_20b_tokenizer.json"), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
        )
        tokenizer.save_pretrained(folder)
    elif kind == "llama2":
        (folder / "tokenizer.model").write_bytes((SHARED / "llama2_tokenizer.model").read_bytes())
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config["add_bos_token"] = True
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    elif (
        kind == "legacy"
    ):  # SentencePiece as Mistral 7B's tokenizer.json has it: a dummy prefix after every special token
        spec = json.loads(
            AutoTokenizer.from_pretrained(base_tokenizer_folder("llama2", root)).backend_tokenizer.to_str()
        )
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaced]}
        spec["pre_tokenizer"] = None
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)
    elif kind == "llama3":
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=1200,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(
            [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("sft_recipes/**/*.py"))], trainer
        )
        PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
        ).save_pretrained(folder)
    else:
        AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(folder)
    return folder
