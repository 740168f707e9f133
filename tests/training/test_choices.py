"""What is left to the hardware follows from its memory, and changes no result."""

from dataclasses import replace

import pytest

from sft_recipes.errors import ConfigError
from sft_recipes.training import choices
from sft_recipes.training.arguments import build_arguments
from sft_recipes.training.choices import choose_step
from sft_recipes.training.memory import describe_step, estimate_memory
from support.configs import composed

LENGTH = 64
STEP = ("+recipe=tiny", "adapter=none", "trainer.effective_batch_size=12")


def run_with(memory, monkeypatch, tmp_path, *overrides):
    """The arguments of a run on a machine with so many bytes, after its choices."""
    monkeypatch.setattr(choices, "available_memory", lambda: memory)
    config = composed(*STEP, *overrides)
    arguments, _ = build_arguments(config, tmp_path)
    choose_step(config, arguments, LENGTH)
    return arguments


def bytes_of(tmp_path, rows, again):
    """What a step of so many rows takes, by the estimate, of which a run takes at most four fifths of the memory."""
    arguments, _ = build_arguments(composed(*STEP, "trainer.per_device_train_batch_size=1"), tmp_path)
    step = describe_step(composed("+recipe=tiny", "adapter=none"), arguments, LENGTH)
    step = replace(step, rows=rows, accumulation_steps=12 // rows, activation_checkpointing=again)
    return int(estimate_memory(step).total / 0.8) + 2


@pytest.mark.parametrize(("rows", "again"), [(12, False), (4, False), (1, False), (12, True)])
def test_a_micro_batch_is_the_largest_part_of_a_step_that_fits_with_its_activations_if_one_row_does(
    rows, again, monkeypatch, tmp_path
):
    memory = bytes_of(tmp_path, rows, again)
    if again:  # keeping even one row's takes more
        memory = bytes_of(tmp_path, 1, False) - 4
        rows = max(size for size in (1, 2, 3, 4, 6, 12) if bytes_of(tmp_path, size, True) <= memory)
    auto = ("trainer.per_device_train_batch_size=auto", "trainer.activation_checkpointing=auto")
    found = run_with(memory, monkeypatch, tmp_path, *auto)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (rows, 12 // rows)
    assert found.activation_checkpointing is again


def test_a_resumed_run_keeps_the_rows_of_its_micro_batch_whatever_the_memory_now(monkeypatch, tmp_path):
    auto = "trainer.per_device_train_batch_size=auto"
    for step, state in ((2, '{"train_batch_size": 3}'), (4, "not whole")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    for resume in ("trainer.resume_from_checkpoint=true", f"trainer.resume_from_checkpoint={tmp_path}/checkpoint-2"):
        found = run_with(2**50, monkeypatch, tmp_path, auto, resume)
        assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (3, 4)
    assert run_with(2**50, monkeypatch, tmp_path, auto).per_device_train_batch_size == 12


def test_a_run_whose_memory_cannot_be_estimated_takes_one_row(tiny_run):
    code, _, folder = tiny_run(
        "trainer.per_device_train_batch_size=auto", "trainer.effective_batch_size=12", "data.tiny.rows=64",
        "adapter.type=boft", "~adapter.lora", "trainer.max_steps=1", "evaluate.rows=0",
    )  # fmt: skip
    log = (folder / "sft_recipes.log").read_text()
    assert code == 0, log
    assert "A micro-batch has 1 of a step's 12 rows on a device." in log


def test_named_values_stand_whatever_the_memory(monkeypatch, tmp_path):
    for again in (True, False):
        named = ("trainer.per_device_train_batch_size=3", f"trainer.activation_checkpointing={again}")
        found = run_with(2**50 if again else 1, monkeypatch, tmp_path, *named)
        assert (found.per_device_train_batch_size, found.activation_checkpointing) == (3, again)
        sharded = composed("+recipe=tiny", "trainer=fsdp", f"trainer.activation_checkpointing={again}", "mode=preview")
        assert build_arguments(sharded, tmp_path)[0].activation_checkpointing is again  # of an adapter


def test_several_processes_on_a_cpu_do_not_choose_each_for_itself(monkeypatch, tmp_path):
    config = composed("+recipe=tiny", "trainer.activation_checkpointing=auto")
    arguments, _ = build_arguments(config, tmp_path)
    monkeypatch.setattr(type(arguments), "world_size", 2)
    choose_step(config, arguments, LENGTH)
    assert arguments.activation_checkpointing is True


def test_auto_without_the_rows_of_a_step_says_what_to_write(tmp_path):
    with pytest.raises(ConfigError, match="needs the rows of a step: write trainer.effective_batch_size=128"):
        build_arguments(composed("+recipe=tiny", "trainer.per_device_train_batch_size=auto"), tmp_path)


def test_activations_that_are_computed_again_give_the_same_weights_to_the_bit(tiny_run, monkeypatch):
    weights = []
    for memory in (2**50, 0):
        monkeypatch.setattr(choices, "available_memory", lambda memory=memory: memory)
        code, _, folder = tiny_run(
            "trainer.activation_checkpointing=auto", "trainer.max_steps=3", "adapter.lora.lora_dropout=0.1",
            "evaluate.rows=0", "evaluate.raw_text=null", "data.held_out=0", "data.tiny.rows=64",
        )  # fmt: skip
        assert code == 0
        log = (folder / "sft_recipes.log").read_text()
        assert ("Activations are kept, they fit" in log) is (memory > 0)
        weights.append((folder / "model" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
