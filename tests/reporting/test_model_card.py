"""The card of a trained model is the report with metadata that the hub can read, and names nothing of this machine."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM

from sft_recipes.modeling.save_load import load_run
from sft_recipes.reporting.run_report import write_report


@pytest.fixture
def card(tmp_path, monkeypatch):
    """`card(model="Qwen/Qwen3-0.6B-Base", …)`: the card of a run with these choices."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(model: str, adapter: dict, data: dict, command: str = "python -m sft_recipes +recipe=mine", **metrics):
        folder = tmp_path / "outputs" / "mine" / "2026-11-21_10-00-00"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "README.md").write_text("Fine-tuned version of [None].")
        config = {"name": "mine", "model": {"id": model}, "adapter": adapter, "data": data | {"held_out": 0.02}}
        history = [{"step": 1, "loss": 1.0}]
        (folder / "metrics.json").write_text(json.dumps({"command": command, "history": history} | metrics))
        (folder / "supervision.json").write_text(json.dumps({"config": config}))
        write_report(folder)
        return ModelCard.load(folder / "model" / "README.md")

    return make


LORA = {"type": "lora", "lora": {"r": 8}}
HUB = {"lima": {"path": "GAIR/lima"}, "mine": {"path": "json", "data_files": "/home/me/my.jsonl"}}


def test_an_adapter_s_card_names_its_base_and_the_hub_s_datasets(card):
    found = card("Qwen/Qwen3-0.6B-Base", LORA, HUB).data.to_dict()
    assert found == {
        "base_model": "Qwen/Qwen3-0.6B-Base", "library_name": "peft", "pipeline_tag": "text-generation",
        "datasets": ["GAIR/lima"], "tags": ["sft", "trl", "sft_recipes", "lora"],
    }  # fmt: skip


def test_a_model_of_all_weights_is_of_transformers(card):
    found = card("Qwen/Qwen3-0.6B-Base", {"type": "none"}, {}).data
    assert (found.library_name, found.tags) == ("transformers", ["sft", "trl", "sft_recipes"])


def test_a_quantized_base_is_said_to_be(card):
    assert "qlora" in card("Qwen/Qwen3-0.6B-Base", LORA | {"quantization": {"load_in_4bit": True}}, {}).data.tags


def test_a_base_on_this_machine_is_not_named_as_one_of_the_hub_s(card, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    found = card(str(base), LORA, HUB, command=f"python -m sft_recipes model.id={base}")
    assert found.data.get("base_model") is None
    assert str(tmp_path) not in found.content and "/home/me" not in found.content


def test_the_card_is_the_report_with_its_pictures_and_how_to_use_it(card, tmp_path):
    text = card("Qwen/Qwen3-0.6B-Base", LORA, HUB).text
    assert "Fine-tuned version of [None]" not in text
    for said in (
        "# mine · 2026-11-21_10-00-00",
        "## What was trained",
        "![Training loss",
        "python -m sft_recipes +recipe=mine",
    ):
        assert said in text
    assert "GenerationConfig.from_pretrained(folder, max_new_tokens=256)" in text
    assert len(list(tmp_path.glob("outputs/mine/*/model/loss.png"))) == 1


def test_the_card_says_what_the_base_lacks_for_other_tools(card):
    loading = {"dtype": "bfloat16", "stop": "<|im_end|>", "base_stops": False, "rows": 402, "trained_rows": True}
    text = card("Qwen/Qwen3-0.6B-Base", LORA, HUB, loading=loading).text
    assert 'from_pretrained(folder, dtype="bfloat16")' in text and "does not stop at `<|im_end|>`" in text
    assert "`base.resize_token_embeddings(402)` first" in text and "fails in `tie_weights`" in text


def test_a_run_without_a_model_has_no_card(tmp_path):
    (tmp_path / "metrics.json").write_text('{"mode": "evaluate", "exact_match": 0.5}')
    write_report(tmp_path)
    assert not (tmp_path / "model").exists()


def test_the_card_s_snippet_loads_the_model_that_was_trained_and_gets_the_report_s_answer(trained, capsys):
    """The embedded base lies in bf16, and the run computed in fp32."""
    card = (trained / "model" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(trained / "model"))
    first, values = json.loads((trained / "answers.jsonl").read_text().splitlines()[0]), {}
    exec(code.replace('"Hi!"', json.dumps(first["prompt"])), values)
    assert capsys.readouterr().out.strip() == first["tuned"]
    ours, tokenizer = load_run(trained)
    ids = tokenizer(first["reference"], return_tensors="pt").input_ids
    plain = AutoPeftModelForCausalLM.from_pretrained(trained / "model")
    with torch.no_grad():
        expected, exact, rounded = (model(ids).logits.float() for model in (ours, values["model"], plain))
    assert torch.equal(exact, expected) and (rounded - expected).abs().max() > 0.1
    assert "does not stop at `<|im_end|>`" in card and "`tie_weights`" in card
