"""What is left to the hardware follows from its memory, and changes no result."""

from dataclasses import replace

import pytest
from safetensors import safe_open

from sft_recipes.errors import ConfigError
from sft_recipes.training import choices
from sft_recipes.training.arguments import build_arguments
from sft_recipes.training.choices import choose_step
from sft_recipes.training.memory import describe_step, estimate_memory
from support.commands import read_metrics
from support.configs import composed, error_of
from support.shapes import WIDE, WIDE_PARAMETERS

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


def as_on_a_gpu(monkeypatch, memory, gpu=True):
    """Lets the choices see a GPU, or none, so many bytes, and a model whose weights take most of them."""
    monkeypatch.setattr(choices, "available_memory", lambda: memory)
    monkeypatch.setattr(choices, "describe_step", lambda *run: replace(describe_step(*run), gpu=gpu, model_config=WIDE))


def weights_of(tmp_path, *overrides):
    """The dtype, None for fp32, and the optimizer of a run after its choices."""
    typed = ["trainer.per_device_train_batch_size=2", "trainer.activation_checkpointing=true", *BF16_AUTOCAST]
    config = composed("+recipe=tiny", "adapter=none", "mode=preview", *typed, *overrides)
    arguments, _ = build_arguments(config, tmp_path)
    return choose_step(config, arguments, LENGTH).model.dtype, arguments.optim.value


BF16_AUTOCAST = ["trainer.bf16=true", "trainer.use_cpu=true"]  # as on a GPU that has it
FP32, BF16 = (None, "adamw_torch_fused"), ("bfloat16", "stable_adamw")


@pytest.mark.parametrize(
    ("bytes_each", "taken", "mode"),
    [(40, FP32, "preview"), (14, BF16, "preview"), (14, BF16, "train"), (9, FP32, "preview")],
)
def test_weights_are_bf16_where_16_bytes_a_parameter_leave_a_gpu_no_room_for_a_row_and_10_do(
    bytes_each, taken, mode, monkeypatch, tmp_path, caplog
):
    """Where not even 10 do, a run is refused in fp32."""
    as_on_a_gpu(monkeypatch, bytes_each * WIDE_PARAMETERS)
    with caplog.at_level("INFO"):
        assert weights_of(tmp_path, f"mode={mode}") == taken
    lines = [line for line in caplog.messages if line.startswith("Trained weights are bf16 instead")]
    assert len(lines) == (taken == BF16)
    assert all("10 bytes a parameter instead of 16: fp32 ones would need an estimated " in line for line in lines)


@pytest.mark.parametrize(
    "named",
    [
        "model.dtype=float32", "trainer.optim=adamw_torch_fused", "trainer.optim_args=''", "trainer.check_memory=false",
        "trainer.bf16=false", "adapter=lora",
    ],
)  # fmt: skip
def test_a_named_dtype_or_optimizer_stands_and_so_do_runs_whose_weights_bf16_is_not_for(named, monkeypatch, tmp_path):
    as_on_a_gpu(monkeypatch, 14 * WIDE_PARAMETERS)
    assert weights_of(tmp_path, named) == (("float32", FP32[1]) if named == "model.dtype=float32" else FP32)


def test_bf16_is_not_chosen_without_a_gpu_or_the_library(monkeypatch, tmp_path):
    as_on_a_gpu(monkeypatch, 14 * WIDE_PARAMETERS)
    monkeypatch.setattr(choices, "is_torch_optimi_available", lambda: False)
    assert weights_of(tmp_path) == FP32
    monkeypatch.undo()
    as_on_a_gpu(monkeypatch, 14 * WIDE_PARAMETERS, gpu=False)
    assert weights_of(tmp_path) == FP32


@pytest.mark.parametrize(("dtype", "memory", "taken"), [("bfloat16", 99, BF16), ("float32", 14, FP32)])
def test_a_resumed_run_keeps_the_dtype_of_its_weights_whatever_the_memory_now(
    dtype, memory, taken, monkeypatch, tmp_path
):
    as_on_a_gpu(monkeypatch, memory * WIDE_PARAMETERS)
    for step, text in ((2, f'{{"dtype": "{dtype}"}}'), (4, "not whole")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text(text)
    assert weights_of(tmp_path, "trainer.resume_from_checkpoint=true") == taken
    if taken == BF16:
        monkeypatch.setattr(choices, "is_torch_optimi_available", lambda: False)
        line = error_of(weights_of, tmp_path, "trainer.resume_from_checkpoint=true")
        assert line == "The checkpoint's bf16 weights need torch-optimi. Try pip install 'sft-recipes[bf16]'."


def test_a_run_that_took_bf16_says_so_saves_it_and_is_resumed_in_it(tiny_run, monkeypatch):
    typed = ["adapter=none", *BF16_AUTOCAST, "trainer.logging_steps=1", "trainer.save_strategy=steps",
             "trainer.save_steps=1", "data.tiny.rows=64", "data.held_out=0", "evaluate.rows=0", "evaluate.raw_text=null"]  # fmt: skip
    with monkeypatch.context() as faked:
        as_on_a_gpu(faked, 14 * WIDE_PARAMETERS)
        code, _, folder = tiny_run(*typed, "trainer.max_steps=1")
    assert code == 0, (folder / "sft_recipes.log").read_text()
    code, _, folder = tiny_run(*typed, "trainer.max_steps=2", "trainer.resume_from_checkpoint=true", "overwrite=false")
    assert code == 0, (folder / "sft_recipes.log").read_text()
    metrics = read_metrics(folder)
    chosen = {key: metrics["choices"][key] for key in ("trained weights", "optimizer")}
    assert (metrics["steps"], chosen) == (2, {"trained weights": "bfloat16", "optimizer": "stable_adamw"})
    with safe_open(folder / "model" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in sorted(weights.keys())} == {"BF16"}
        assert "10 bytes a parameter instead of 16: as in the checkpoint." in (folder / "sft_recipes.log").read_text()


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
