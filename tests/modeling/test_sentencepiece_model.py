"""What transformers makes of a `tokenizer.model` alone is compared with SentencePiece itself, on the run's rows."""

import shutil

import pytest
import transformers
from packaging.version import Version
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_recipes.modeling.sentencepiece_model import warn_of_other_tokens

TEXTS = ["the    License", "the License"]


@pytest.fixture
def pieces_only(tokenizer_folder, tmp_path):
    """A folder as Llama 2 was published in, without tokenizer.json; as there, runs of spaces are merged last."""
    folder = shutil.copytree(tokenizer_folder("llama2"), tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    config = '{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}'
    (folder / "tokenizer_config.json").write_text(config)
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    for piece in model.pieces:
        if piece.piece.startswith("▁▁"):
            piece.score = -1e6 - len(piece.piece)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return folder


def test_wrong_merges_of_spaces_are_said_with_a_way_out(pieces_only, caplog):
    tokenizer = AutoTokenizer.from_pretrained(pieces_only)
    warn_of_other_tokens(tokenizer, [tokenizer(text).input_ids for text in TEXTS])
    assert "1 of 2 rows has other tokens than SentencePiece makes" in caplog.text
    way_out = f"PreTrainedTokenizerFast.from_pretrained('{pieces_only}').save_pretrained('{pieces_only}')"
    assert way_out in caplog.text
    if Version(transformers.__version__) < Version("5.24"):  # its generic class leaves out the space before a text
        return
    PreTrainedTokenizerFast.from_pretrained(pieces_only).save_pretrained(pieces_only)
    right, own = AutoTokenizer.from_pretrained(pieces_only), SentencePieceProcessor()
    own.load(str(pieces_only / "tokenizer.model"))
    for text in TEXTS:
        assert right(text, add_special_tokens=False).input_ids == own.encode(text)


def test_the_same_tokens_and_a_tokenizer_json_are_not_spoken_of(pieces_only, caplog):
    tokenizer = AutoTokenizer.from_pretrained(pieces_only)
    warn_of_other_tokens(tokenizer, [tokenizer(TEXTS[1]).input_ids])
    tokenizer.save_pretrained(pieces_only)  # a tokenizer.json is what the base's authors say, whatever it is
    warn_of_other_tokens(tokenizer, [tokenizer(TEXTS[0]).input_ids])
    assert caplog.text == ""
