"""What other tools make of a run's adapter folder: those that fail fail as the model card says, and its snippet works."""

import pytest
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from sft_recipes.merge import merge
from sft_recipes.modeling.save_load import load_run
from support.tuned import ADAPTERS, ROW, make_base, tune

ADDED, SPARE = "Llama, tied", "Llama, untied, spare rows"  # ChatML's tokens need new rows in one base, not in the other


@pytest.fixture(scope="module")
def ends_with_eos(tmp_path_factory):
    """The adapter folder of a run whose answers end with the base's own end of text."""
    root = tmp_path_factory.mktemp("eos")
    tune(make_base(ADDED, root / "base"), ADAPTERS["LoRA"], root / "run", template="tulu")
    return str(root / "run" / "model")


def ask(folder: str, config: GenerationConfig | None = None) -> str:
    """What AutoPeft's generate says to the row's question, at most twelve tokens."""
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(ROW[:1], add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, generation_config=config, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :])


def test_plain_peft_runs_past_a_stop_token_that_the_base_does_not_know(tuned, ends_with_eos):
    folder = str(tuned(SPARE, "LoRA").run / "model")
    assert ask(folder).startswith("Hi there.<|im_end|><|im_end|>")
    assert ask(folder, GenerationConfig.from_pretrained(folder)) == "Hi there.<|im_end|>"
    assert ask(ends_with_eos) == "Hi there.<|endoftext|>"


def test_pipeline_needs_the_folder_s_tokenizer_and_a_base_with_enough_rows(tuned, ends_with_eos):
    def answer(folder: str, **options) -> str:
        chat = pipeline("text-generation", folder, **options)
        return chat(ROW[:1], max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]

    with pytest.raises(ValueError, match="tokenizer.chat_template is not set"):  # it takes the base's
        answer(ends_with_eos)
    assert answer(ends_with_eos, tokenizer=ends_with_eos) == "Hi there."
    added = str(tuned(ADDED, "LoRA").run / "model")
    with pytest.raises(IndexError, match="out of bounds"):
        answer(added, tokenizer=added)


def test_lm_eval_fails_on_trained_rows_of_a_tied_base_and_takes_the_merged_folder(tuned, ends_with_eos, tmp_path):
    def load(base, folder) -> HFLM:
        return HFLM(pretrained=str(base), peft=str(folder), tokenizer=str(folder), device="cpu")

    added, spare = tuned(ADDED, "LoRA"), tuned(SPARE, "LoRA")
    with pytest.raises(AttributeError, match="neither a parameter"):
        load(added.base, added.run / "model")
    assert isinstance(load(spare.base, spare.run / "model").model, PeftModel)
    merge(added.run, tmp_path / "merged")
    assert HFLM(pretrained=str(tmp_path / "merged"), device="cpu").model.get_input_embeddings().num_embeddings == 402


def test_dpo_trainer_takes_no_adapter_folder_by_name(ends_with_eos, tmp_path):
    arguments = DPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False)
    pair = {"prompt": ROW[:1], "chosen": ROW[1:], "rejected": [{"role": "assistant", "content": "No."}]}
    with pytest.raises(
        ValueError, match="Unrecognized model"
    ):  # a merged folder it does: tests/modeling/test_save_load.py
        DPOTrainer(ends_with_eos, args=arguments, train_dataset=Dataset.from_list([pair]))


@pytest.mark.parametrize("way", ["path", "name"])
def test_trl_s_assistant_only_loss_takes_the_saved_template_with_markers_and_masks_as_we_do(tuned, tmp_path, way):
    made = tuned(SPARE, "LoRA")
    tokenizer = AutoTokenizer.from_pretrained(made.run / "model")
    path = made.run / "model" / "additional_chat_templates" / "training.jinja"
    if way == "name":
        tokenizer.chat_template = tokenizer.chat_template["training"]
    arguments = SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, report_to="none", bf16=False,
        chat_template_path=str(path) if way == "path" else None,
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(made.base), args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"messages": ROW}]),
    )  # fmt: skip
    batch, ours = next(iter(trainer.get_train_dataloader())), made.trainer.train_dataset[0]
    assert (batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) == (ours["input_ids"], ours["labels"])


def test_the_served_template_stays_the_one_without_markers(tuned):
    run = tuned(SPARE, "LoRA").run
    served = load_run(run)[1].chat_template
    assert served == (run / "model" / "chat_template.jinja").read_text() and "generation %}" not in served
