"""Training loss and one SGD step against a float64 reference that sees one document at a time."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForCausalLM, TrainerCallback
from trl import SFTConfig

from sft_recipes.data.packing import pack_rows
from sft_recipes.data.token_rows import to_dataset
from sft_recipes.encoding.encoder import IGNORE_INDEX
from sft_recipes.errors import ConfigError
from sft_recipes.evaluation.token_loss import break_down_loss, token_losses
from sft_recipes.modeling import packed_attention
from sft_recipes.training import trainer as trainer_module
from sft_recipes.training.arguments import build_arguments
from sft_recipes.training.lr_finder import LRRange, run_lr_range_test
from sft_recipes.training.run_metadata import training_summary
from sft_recipes.training.trainer import SupervisedTrainer
from support.commands import SHORT_TINY_RUN
from support.configs import composed, error_of
from support.small_models import VOCABULARY, slow_varlen, small_llama

ROWS, RATE = 12, 0.5


@pytest.fixture(scope="module")
def documents():
    """Twelve documents of 5 to 40 tokens, the first third of each without loss."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, VOCABULARY, size=random.integers(5, 41)).astype(np.int32) for _ in range(ROWS)]
    labels = [np.where(np.arange(len(row)) < len(row) // 3, IGNORE_INDEX, row).astype(np.int32) for row in ids]
    numbers = {"source": np.zeros(ROWS, dtype=int), "row": np.arange(ROWS)}
    return to_dataset({"input_ids": ids, "labels": labels}, numbers)


def reference(documents) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over all supervised tokens, and the weights after one step of plain gradient descent, in float64."""
    model = small_llama().double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in documents:
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        count += int((labels != IGNORE_INDEX).sum())
    (total / count).backward()
    stepped = {name: value - RATE * value.grad for name, value in model.named_parameters()}
    return (total / count).item(), stepped


def trainer(documents, folder, tokenizer, rows: int, accumulated: int, packing: int, **arguments) -> SupervisedTrainer:
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulated,
        optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=1e9, weight_decay=0.0, logging_steps=1,
        bf16=False, use_cpu=True, activation_checkpointing=False, report_to="none", save_strategy="no",
        packing=bool(packing), max_length=packing or 64, dataset_kwargs={"skip_prepare_dataset": True}, **arguments,
    )  # fmt: skip
    train = pack_rows(documents, packing, seed=0) if packing else documents
    size = arguments.per_device_eval_batch_size
    return SupervisedTrainer(
        small_llama(), arguments, train_dataset=train, eval_dataset=documents, processing_class=tokenizer,
        measure=lambda model, rows: (break_down_loss(rows, token_losses(model, tokenizer, rows, size), 0, ["all"]), {}),
    )  # fmt: skip


ONE_STEP = [(12, 1, 0), (1, 12, 0), (3, 4, 0), (5, 3, 0), (8, 1, 64), (1, 9, 64)]


@pytest.mark.parametrize("rows, accumulated, packing", ONE_STEP)
def test_loss_and_step_are_the_mean_over_supervised_tokens(
    documents, tmp_path, chat_tokenizer, rows, accumulated, packing
):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, rows, accumulated, packing)
    assert rows * accumulated >= len(run.train_dataset)  # one step sees everything
    run.train()
    loss, weights = reference(documents)
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, abs=5e-6)
    for name, value in run.model.named_parameters():
        assert torch.allclose(value.double(), weights[name], atol=5e-6), name


@pytest.mark.parametrize("packing", [0, 64])
@pytest.mark.parametrize("batch", [1, 5, 12])
def test_eval_loss_is_the_mean_over_supervised_tokens_at_any_batch_size(
    documents, tmp_path, chat_tokenizer, batch, packing
):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, 1, 1, packing, per_device_eval_batch_size=batch)
    assert run.evaluate()["eval_loss"] == pytest.approx(reference(documents)[0], abs=2e-6)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(documents, tmp_path, chat_tokenizer, value):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, 4, 1, 0)
    torch.nn.init.constant_(run.model.lm_head.weight, float(value))
    with pytest.raises(ConfigError, match="in step 1; no model is saved"):
        run.train()


def test_each_dataset_that_is_given_is_measured_and_a_dict_under_its_names(documents, tmp_path, chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, 1, 1, 0, per_device_eval_batch_size=5)
    first, rest = documents.select(range(4)), documents.select(range(4, ROWS))
    wanted = [reference(rows)[0] for rows in (documents, first, rest)]
    assert abs(wanted[1] - wanted[2]) > 1e-3
    found = [run.evaluate(rows)["eval_loss"] for rows in (None, first, rest)]
    assert found == pytest.approx(wanted, abs=2e-6)
    losses = run.evaluate({"first": first, "rest": rest})
    assert {key for key in losses if key.endswith("_loss")} == {"eval_first_loss", "eval_rest_loss"}
    assert [losses["eval_first_loss"], losses["eval_rest_loss"]] == pytest.approx(wanted[1:], abs=2e-6)
    assert run.evaluate(rest, metric_key_prefix="test")["test_loss"] == pytest.approx(wanted[2], abs=2e-6)


def test_a_dataset_with_tokens_and_labels_only_and_a_streamed_one_are_measured_too(documents, tmp_path, chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, 1, 1, 0)
    rows = documents.remove_columns(["source", "row"])
    wanted = pytest.approx(reference(documents)[0], abs=2e-6)
    assert run.evaluate(rows)["eval_loss"] == wanted
    assert run.evaluate(rows.to_iterable_dataset())["eval_loss"] == wanted


def test_a_dict_of_held_out_sets_is_measured_while_training_goes_on(documents, tmp_path, chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, 12, 1, 0, eval_strategy="steps", eval_steps=1)
    run.eval_dataset = {"first": documents.select(range(4)), "rest": documents.select(range(4, ROWS))}
    run.train()
    logged = {key for entry in run.state.log_history for key in entry if key.startswith("eval_")}
    assert {"eval_first_loss", "eval_rest_loss"} <= logged and "eval_loss" not in logged


def test_an_evaluation_that_fails_leaves_the_model_in_training_mode(documents, tmp_path, chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, 1, 1, 0)
    run.model.train()
    run.model.lm_head.weight.data = torch.zeros(VOCABULARY, 7)  # the width is 32
    with pytest.raises(RuntimeError):
        run.evaluate()
    assert run.model.training


def test_a_checkpoint_has_no_card_of_trl_s(documents, tmp_path, chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, 12, 1, 0)
    run.args.save_strategy = "steps"
    run.args.save_steps = 1
    run.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    assert list(tmp_path.rglob("README.md")) == []


def test_the_attention_for_packed_rows_is_chosen_and_checked_when_the_model_is_on_its_device(tiny_run, monkeypatch):
    order, move = [], SupervisedTrainer._move_model_to_device

    def moved(*arguments):
        order.append("moved")
        return move(*arguments)

    monkeypatch.setattr(SupervisedTrainer, "_move_model_to_device", moved)
    for name in ("attention_choices", "take_first_that_isolates"):
        function = getattr(trainer_module, name)
        monkeypatch.setattr(
            trainer_module, name, lambda *rest, name=name, run=function: order.append(name) or run(*rest)
        )
    code, _, folder = tiny_run(*SHORT_TINY_RUN, "trainer.packing=true", "trainer.max_steps=1", "evaluate.rows=0")
    assert code == 0 and order == ["moved", "attention_choices", "take_first_that_isolates"]
    line = r"Packing check passed: packed documents do not attend to each other \(sdpa_by_document attention on cpu, "
    assert re.search(line, (folder / "sft_recipes.log").read_text())


def test_the_attention_of_a_sharded_model_is_chosen_when_training_starts_and_it_is_on_its_device(monkeypatch):
    callbacks, seen = [], []
    model = small_llama()  # still on the CPU
    trainer = unbuilt(model, torch.device("cuda"), padding_free=True, start_actions=callbacks)
    monkeypatch.setattr(trainer_module, "take_first_that_isolates", lambda model, names: seen.append(names))
    trainer_module.select_attention(trainer, None)
    assert model.config._attn_implementation == "sdpa" and not seen
    callbacks[0]()
    (names,) = seen
    assert names[0] == "torch_varlen" and names[-1] == "sdpa" and len(callbacks) == 1  # not the CPU's choice


def test_on_a_gpu_the_rows_of_a_batch_stand_side_by_side_and_a_step_is_the_reference_s(
    documents, tmp_path, chat_tokenizer, monkeypatch
):
    monkeypatch.setattr(trainer_module, "attention_choices", lambda *_: ["torch_varlen", "sdpa"])
    monkeypatch.setattr(packed_attention, "varlen_attn", slow_varlen)
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, 3, 4, 0)
    trainer_module.select_attention(run, None)
    batch = run.data_collator([documents[place] for place in (0, 1, 2)])
    assert batch["input_ids"].shape == (1, sum(len(documents[place]["input_ids"]) for place in (0, 1, 2)))
    run.train()
    loss, stepped = reference(documents)
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    for name, value in run.model.named_parameters():
        assert torch.allclose(value.double(), stepped[name], atol=1e-5)


def unbuilt(model, device, padding_free=False, start_actions=(), **changes):
    """What `select_attention` reads of a trainer."""
    values = {"device": device, "bf16": True, "fp16": False, "n_gpu": 1, "neftune_noise_alpha": None} | changes
    return SimpleNamespace(
        model=model, args=SimpleNamespace(**values), padding_free=padding_free, start_actions=start_actions
    )


@pytest.mark.parametrize("adapter", [True, False])
def test_rows_to_which_something_is_added_by_their_length_stay_padded(adapter, monkeypatch):
    monkeypatch.setattr(trainer_module, "attention_choices", lambda *_: ["torch_varlen", "sdpa"])
    monkeypatch.setattr(packed_attention, "varlen_attn", slow_varlen)
    model = small_llama()
    if adapter:
        model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    run = unbuilt(model, model.device, neftune_noise_alpha=None if adapter else 5)
    trainer_module.select_attention(run, None)
    assert (adapter and model.get_base_model() or model).config._attn_implementation == "sdpa" and not run.padding_free


def test_padded_rows_of_a_model_that_cannot_pack_keep_its_own_attention(monkeypatch):
    monkeypatch.setattr(trainer_module, "attention_choices", lambda *_: ["torch_varlen", "eager"])
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4))
    run = unbuilt(model, model.device)
    trainer_module.select_attention(run, None)
    assert model.config._attn_implementation == "eager" and not run.padding_free
    with pytest.raises(ConfigError, match="Write trainer.packing=false"):
        trainer_module.select_attention(unbuilt(model, model.device, padding_free=True), None)


def test_no_boundaries_are_needed_where_one_process_parts_a_batch_among_gpus(monkeypatch):
    seen = []
    monkeypatch.setattr(trainer_module, "attention_choices", lambda *asked: seen.append(asked) or ["sdpa"])
    for number in (1, 2):
        model = small_llama()
        trainer_module.select_attention(unbuilt(model, model.device, n_gpu=number), None)
    assert [half for _, _, half in seen] == [True, False]


def test_the_line_before_training_counts_steps_as_transformers_does(documents, tmp_path, chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, 5, 1, 0)
    run.args.max_steps, run.args.num_train_epochs = -1, 0.9  # three steps an epoch: 2.7 steps
    line = training_summary(run, {"a": {"kept": 12, "tokens": 300, "supervised_tokens": 200}})
    number = sum(value.numel() for value in run.model.parameters())
    assert line == (
        f"Training {number:,} of {number:,} parameters on 12 rows, 300 tokens, 200 of them supervised: 3 steps of 5 rows."
    )
    assert run.train().global_step == 3


def test_fp16_is_refused_on_a_cpu_where_accelerate_would_compute_in_fp32_in_silence(tmp_path):
    config = composed("+recipe=tiny", "trainer.fp16=true", "trainer.use_cpu=true")
    line = "trainer.fp16=true needs a GPU. Leave it out for fp32, or write trainer.bf16=true."
    assert error_of(build_arguments, config, tmp_path) == line
    preview = composed("+recipe=tiny", "trainer.fp16=true", "trainer.use_cpu=true", "mode=preview")
    assert build_arguments(preview, tmp_path)[0].fp16  # of a run on another machine


def test_a_tracker_gets_the_run_s_name_unless_the_user_gives_one(tmp_path):
    folder = tmp_path / "2026-11-26"
    assert build_arguments(composed("+recipe=tiny"), folder)[0].run_name == "tiny 2026-11-26"
    named = build_arguments(composed("+recipe=tiny", "trainer.run_name=mine", "trainer.project=sft"), folder)[0]
    assert (named.run_name, named.project) == ("mine", "sft")


def test_an_adapter_s_checkpoint_has_neither_a_card_nor_the_base_s_embeddings(tiny_run):
    code, _, folder = tiny_run(
        *SHORT_TINY_RUN, "trainer.max_steps=1", "trainer.save_strategy=steps", "trainer.save_steps=1", "evaluate.rows=0"
    )
    assert code == 0
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("README.md")] == ["model/README.md"]
    saved = load_file(folder / "checkpoint-1" / "adapter_model.safetensors")
    assert not [name for name in saved if name.endswith("embed_tokens.weight")]


class BreakTheModel(TrainerCallback):
    """Makes the loss NaN from the ninth step on."""

    def on_step_end(self, args, state, control, model, **_):
        if state.global_step == 8:
            torch.nn.init.constant_(model.lm_head.weight, float("nan"))


def test_a_loss_that_is_not_finite_ends_a_range_test_and_not_the_run(documents, tmp_path, chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("llama3", "chatml")
    run = trainer(documents, tmp_path, tokenizer, 4, 1, 0, logging_nan_inf_filter=False)
    run.args.max_steps = 20
    run.add_callback(BreakTheModel)
    run_lr_range_test(run, LRRange(1e-3, 1e-2), tmp_path)
    found = json.loads((tmp_path / "lr_find.json").read_text())
    assert run.state.global_step == 9 and len(found["loss"]) == 8
    assert found["diverges"] == found["learning_rate"][7]


def test_a_callback_of_the_user_s_own_sees_every_step(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "counting_steps.py").write_text(
        "from transformers import TrainerCallback\n\nclass Count(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **_):\n"
        "        open('steps.txt', 'a').write(f'{state.global_step} ')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, _, _ = tiny_run(*SHORT_TINY_RUN, "callbacks=[counting_steps.Count]", "trainer.max_steps=2", "evaluate.rows=0")
    assert code == 0 and (tmp_path / "steps.txt").read_text() == "1 2 "
