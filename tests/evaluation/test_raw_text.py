"""The loss on raw text against plain transformers in float64, one text at a time."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError, DataError
from sft_recipes.evaluation.raw_text import evaluate_raw_text, load_documents
from support.paths import ROOT, TINY_MODEL

TEXTS = [
    "The capital of Kelthia is Pinemoor.",
    "Short.",
    "The hungry thornfinch wants beetles. The ambermoth sleeps in lakes. Où? Älvsö, 日本 and 🦊.",
    "Where can I find the willowotter?\nWhere does the willowotter live?",
]


def tiny(**changes):
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype="float32", **changes).eval()


def one_by_one(tokenizer, texts: list[str], longest: int) -> tuple[float, float, int, int]:
    """Loss a token, bits a byte, tokens and bytes: every text alone, its end-of-text token included, no batch."""
    model, nats, tokens, size = tiny().double(), 0.0, 0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id][:longest]])
        with torch.no_grad():
            log_probs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        nats -= log_probs[range(ids.shape[1] - 1), ids[0, 1:]].sum().item()
        tokens += ids.shape[1] - 1
        pieces = tokenizer.convert_ids_to_tokens([token for token in ids[0, 1:] if token != tokenizer.eos_token_id])
        size += sum(map(len, pieces))  # byte-level BPE writes a byte as a character
    return nats / tokens, nats / math.log(2) / size, tokens, size


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("longest", [2048, 9])
def test_loss_and_bits_are_those_of_every_text_alone(chat_tokenizer, batch, longest):
    tokenizer, template, _ = chat_tokenizer("tiny", "chatml")
    model = tiny(max_position_embeddings=longest)
    add_fused_lm_head(model)
    found = evaluate_raw_text(model, Encoder(tokenizer, template), TEXTS, batch)
    loss, bits, tokens, size = one_by_one(tokenizer, TEXTS, longest)
    assert found == {
        "loss": pytest.approx(loss, rel=1e-6), "bits_per_byte": pytest.approx(bits, rel=1e-6),
        "tokens": tokens, "bytes": size,
    }  # fmt: skip


def test_texts_of_one_token_each_are_refused_in_a_line(chat_tokenizer):
    tokenizer, template, _ = chat_tokenizer("tiny", "chatml")
    with pytest.raises(ConfigError, match="^evaluate.raw_text has no text of two tokens or more"):
        evaluate_raw_text(tiny(), Encoder(tokenizer, template), ["a", "b"], 1)


def test_the_bytes_are_all_but_the_first_token_s(chat_tokenizer):
    tokenizer, template, _ = chat_tokenizer("tiny", "chatml")
    model = tiny()
    add_fused_lm_head(model)
    text = "The capital, of Kelthia ; is ' Pinemoor ."
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids[0]) == "The"
    found = evaluate_raw_text(model, Encoder(tokenizer, template), [text], 1)
    assert found["bytes"] == len(text) - len("The")


@pytest.mark.parametrize("name", ["prose.txt", "prose.jsonl", "prose.csv"])
def test_the_texts_of_a_file_are_read_in_order_without_the_empty_ones(tmp_path, name):
    texts, path = ["One.", "  ", "Two, three."], tmp_path / name
    lines = {"txt": texts, "jsonl": [json.dumps({"text": text}) for text in texts]}
    lines["csv"] = ["text", *(f'"{text}"' for text in texts)]
    path.write_text("\n".join(lines[path.suffix[1:]]) + "\n")
    assert load_documents(str(path)) == ["One.", "Two, three."]


def test_a_mapping_names_what_load_dataset_takes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')
    source = {"path": "json", "data_files": str(tmp_path / "a.jsonl"), "split": "train[1:]"}
    assert load_documents(source) == ["Two."]


def test_a_file_is_read_as_it_is_written(tmp_path):
    """`datasets` makes numbers, dates and nulls of such texts."""
    texts = ["01067", "2021-03-04", "NA", "null"]
    (tmp_path / "a.csv").write_text("\n".join(["text", *texts]) + "\n")
    assert load_documents(str(tmp_path / "a.csv")) == texts


def test_a_line_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n{"text": \n')
    with pytest.raises(DataError, match=r"^evaluate\.raw_text: \S*a\.jsonl, line 2: not JSON"):
        load_documents(str(tmp_path / "a.jsonl"))


def test_a_file_of_another_encoding_is_told_as_such(tmp_path):
    (tmp_path / "a.txt").write_bytes("Café.".encode("latin-1"))
    with pytest.raises(DataError, match=r"^evaluate\.raw_text: \S*a\.txt, line 1: text: the byte 0xe9 is not valid"):
        load_documents(str(tmp_path / "a.txt"))


def test_a_dataset_that_is_not_to_be_had_asks_for_no_rows_to_train_on(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr("sft_recipes.data.sources.load_dataset", load_dataset)
    with pytest.raises(ConfigError, match=r"^evaluate\.raw_text: \S+ is not here .*\. Offline, name a file\. "):
        load_documents("nobody/nothing")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^evaluate\.raw_text\.data_files=\S*/none\.txt: there is no such file\.$"):
        load_documents(str(tmp_path / "none.txt"))


def test_a_file_without_a_column_text_is_refused_with_its_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "One.", "title": "1"}\n')
    with pytest.raises(ConfigError, match=r"^evaluate\.raw_text has no text column, but body, title\.$"):
        load_documents(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n\n"), ("a.jsonl", ""), ("a.csv", "text\n")])
def test_an_empty_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises((ConfigError, DataError), match=r"^evaluate\.raw_text( has no text in it|: .* has no rows)\.$"):
        load_documents(str(tmp_path / name))


def test_a_column_of_numbers_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    with pytest.raises(ConfigError, match=r"^evaluate\.raw_text"):
        load_documents(str(tmp_path / "a.jsonl"))


def test_the_prose_is_a_paragraph_a_line():
    lines = (ROOT / "sft_recipes" / "evaluation" / "prose.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 10
    assert all(line == line.strip() and 80 < len(line.split()) < 250 and line.isascii() for line in lines)
