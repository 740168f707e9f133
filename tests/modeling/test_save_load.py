"""What comes after: a finished run as start and reference of TRL's DPO trainer."""

import math

import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from sft_recipes.merge import merge
from sft_recipes.modeling.save_load import load_run
from sft_recipes.modeling.workarounds import complete_reference

PAIR = {
    "prompt": [{"role": "user", "content": "Say hi."}],
    "chosen": [{"role": "assistant", "content": "Hi there."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


def first_step(model, tokenizer, folder) -> tuple[float, set[str]]:
    """The loss of one DPO step, before which policy and reference are the same; what the step moved."""
    arguments = DPOConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=1, logging_steps=1, learning_rate=1e-3,
        report_to="none", save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list([PAIR]), processing_class=tokenizer)
    if isinstance(trainer.model, PeftModel):
        complete_reference(trainer.model)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    moved = {
        name for name, value in trainer.model.named_parameters() if name in before and (value != before[name]).any()
    }
    return trainer.state.log_history[0]["loss"], moved


def test_a_merged_run_is_start_and_reference_of_dpo(tuned, tmp_path):
    merge(tuned("Llama, tied", "LoRA").run, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    loss, moved = first_step(str(tmp_path / "merged"), tokenizer, tmp_path / "dpo")
    assert loss == pytest.approx(math.log(2), abs=1e-4)  # equation 7 of arXiv 2305.18290 where both are the same
    assert "model.layers.0.self_attn.q_proj.weight" in moved


@pytest.mark.parametrize("spare", ["Llama, tied", "Llama, untied, spare rows"])
def test_an_adapter_run_is_start_and_reference_of_dpo(tuned, tmp_path, spare):
    loss, moved = first_step(*load_run(tuned(spare, "LoRA").run), tmp_path / "dpo")
    assert loss == pytest.approx(math.log(2), abs=1e-4)
    assert any("lora_B.default" in name for name in moved) and not any(".ref" in name for name in moved)
