"""Two processes over gloo with FSDP2 or ZeRO-3 train what one process trains, save it whole, and write everything once."""

import pytest
import torch
from safetensors.torch import load_file
from trl import SFTConfig

from sft_recipes import load_run
from sft_recipes.errors import ConfigError, exit_on_user_error
from sft_recipes.evaluation.base_cache import measure_base
from sft_recipes.training.arguments import build_arguments
from sft_recipes.training.memory import describe_step, trains_in_bf16
from sft_recipes.training.setup import set_up_run
from support.commands import read_metrics, run_command
from support.configs import composed, error_of
from support.paths import ROOT
from support.processes import run_ranks
from support.stopped_runs import FINDS_US, KILLABLE, checkpoints

RUN = ["model=tiny", "data=tiny", "model.chat_template=alpaca_short", "trainer.max_length=256", "trainer.max_steps=3",
       "trainer.warmup_steps=0", "trainer.learning_rate=1e-3", "trainer.use_cpu=true", "trainer.logging_steps=1",
       "trainer.save_strategy=no", "evaluate.rows=3", "evaluate.max_new_tokens=6", "evaluate.raw_text=null"]  # fmt: skip
FULL_PACKED = ["trainer.packing=true", "trainer.per_device_train_batch_size=1", "trainer.effective_batch_size=4"]
SHARDED = ROOT / "tests" / "support" / "fsdp_on_cpu.py"
LORA = ["adapter=lora", "trainer.per_device_train_batch_size=4", "trainer.effective_batch_size=8"]


@pytest.mark.parametrize("trainer", ["fsdp", "zero3"])
@pytest.mark.parametrize("what", [FULL_PACKED, LORA], ids=["full_packed", "lora"])
def test_two_processes_that_share_the_model_train_measure_and_save_what_one_does(tmp_path, what, trainer):
    if trainer == "zero3":
        pytest.importorskip("deepspeed")
    assert run_command(tmp_path / "one", *RUN, *what)[0] == 0
    how = {"script": SHARDED} if trainer == "fsdp" else {"DS_ACCELERATOR": "cpu"}
    two = run_ranks(tmp_path, "hydra.run.dir=two", f"trainer={trainer}", *RUN, *what, **how)
    assert [rank.returncode for rank in two] == [0, 0], two[0].stderr[-3000:]
    alone, together = (read_metrics(tmp_path / name) for name in ("one", "two"))
    losses = [[entry["loss"] for entry in run["history"] if "loss" in entry] for run in (alone, together)]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    for when in ("before", "after"):  # the base, too, is measured in its shards
        measured = [run[when]["held_out"]["loss"] for run in (alone, together)]
        assert measured[1] == pytest.approx(measured[0], abs=1e-5)
    answers = [(tmp_path / name / "answers.jsonl").read_text(encoding="utf-8") for name in ("one", "two")]
    assert answers[1] == answers[0] and answers[0].count("\n") == 3
    assert all(together[key] == alone[key] for key in ("train_tokens", "parameters", "trainable_parameters"))
    assert "weight_change" not in together
    models = [dict(load_run(tmp_path / name)[0].named_parameters()) for name in ("one", "two")]
    assert models[0].keys() == models[1].keys()
    # a tenth of an update, for which DeepSpeed sums small gradients in another order
    apart = {"fsdp": 1e-5, "zero3": 1e-4}[trainer]
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, atol=apart, rtol=1e-4)
    if "adapter=lora" in what:
        assert len(load_file(tmp_path / "two" / "model" / "adapter_model.safetensors")) == 42  # 3 layers × 7 × 2
    for printed in (two[0].stdout + two[1].stdout, (tmp_path / "two" / "sft_recipes.log").read_text(encoding="utf-8")):
        lines = [line for line in printed.splitlines() if line.startswith(("| held-out loss", "The model is sharded"))]
        assert len(lines) == 1


def test_an_adapter_with_rows_of_tied_embeddings_goes_on_after_a_signal_to_both_processes(tmp_path):
    rows = [*RUN, *LORA, "model.chat_template=chatml", "trainer.max_steps=2"]
    assert run_command(tmp_path / "one", *rows)[0] == 0
    stop = {
        "STOP_AT": "sft_recipes.training.callbacks.FiniteLossCheck.on_pre_optimizer_step:1:before",
        "STOP_WITH": "SIGTERM",
    }
    stopped = run_ranks(
        tmp_path, "hydra.run.dir=two", "trainer=fsdp", *rows, KILLABLE, script=SHARDED, **FINDS_US | stop
    )
    assert [rank.returncode for rank in stopped] == [143, 143] and checkpoints(tmp_path / "two") == {"checkpoint-1"}
    assert "python -m sft_recipes resume" in stopped[0].stderr
    resumed = run_ranks(tmp_path, "resume", "two", script=SHARDED, **FINDS_US)
    assert [rank.returncode for rank in resumed] == [0, 0], resumed[0].stderr[-3000:]
    alone, together = (
        [entry["loss"] for entry in read_metrics(tmp_path / name)["history"] if "loss" in entry]
        for name in ("one", "two")
    )
    assert len(alone) == 2 and together == pytest.approx(alone, abs=1e-5)
    weights = [load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("one", "two")]
    assert len(weights[0]) == 43 and weights[0].keys() == weights[1].keys()  # 3 layers × 7 × 2, and the rows
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-4)


@pytest.fixture
def two_processes(monkeypatch):
    """As if torchrun had started this process and another."""
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    return lambda *overrides: composed("model=tiny", "data=tiny", "trainer=fsdp", "trainer.use_cpu=true", *overrides)


def test_fsdp_checkpoints_activations_itself_but_for_an_adapter_of_which_nothing_would_be_saved(
    two_processes, tmp_path
):
    for adapter, own in (("none", True), ("lora", False)):
        arguments, _ = build_arguments(two_processes(f"adapter={adapter}"), tmp_path)
        assert arguments.fsdp is True and arguments.fsdp_plugin_args["fsdp_version"] == 2
        assert arguments.fsdp_plugin_args["activation_checkpointing"] is own
        assert arguments.activation_checkpointing is not own
        assert describe_step(two_processes(), arguments, 8).activation_checkpointing and arguments.world_size == 2


@pytest.mark.parametrize(("bf16", "kept"), [("false", True), ("true", False)])
def test_bf16_weights_are_fp32_where_fsdp_shards_them_and_bf16_is_computed_in(two_processes, tmp_path, bf16, kept):
    """accelerate casts them: tests/modeling/test_workarounds.py."""
    config = two_processes("model.dtype=bfloat16", "trainer.optim=stable_adamw", f"trainer.bf16={bf16}")
    assert trains_in_bf16(config, build_arguments(config, tmp_path)[0]) is kept


def test_fsdp_of_one_process_says_how_several_are_started(tmp_path):
    config = composed("model=tiny", "data=tiny", "trainer=fsdp", "trainer.use_cpu=true")
    assert error_of(build_arguments, config, tmp_path).endswith("Start them with torchrun --nproc-per-node N.")


def test_a_run_by_deepspeed_is_evaluated_by_one_process_without_it(tmp_path):
    config = composed("model=tiny", "data=tiny", "trainer=zero3", "trainer.use_cpu=true", "mode=evaluate")
    assert build_arguments(config, tmp_path)[0].deepspeed is None


@pytest.mark.parametrize("way", ["deepspeed", "fsdp 1"])
def test_rows_of_new_tokens_are_refused_where_deepspeed_or_fsdp_1_shards_the_model(monkeypatch, tmp_path, way):
    config = composed("model=tiny", "data=tiny", "model.chat_template=chatml", "trainer.use_cpu=true", "adapter=lora")
    arguments, callbacks = build_arguments(config, tmp_path)
    if way == "deepspeed":
        arguments.deepspeed = {"zero_optimization": {"stage": 3}}
    else:  # what accelerate launch --use_fsdp means without a version
        monkeypatch.setattr(SFTConfig, "world_size", 2)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setattr("sft_recipes.training.setup.build_arguments", lambda *_: (arguments, callbacks))
    assert "Write trainer=fsdp (accelerate launch: --fsdp_version 2); trainer" in error_of(set_up_run, config, tmp_path)


def test_a_base_that_was_sharded_is_read_from_the_run_s_folder_and_never_measured_with_trained_weights(
    monkeypatch, tmp_path
):
    """A sharded model that is resumed has the weights of its checkpoint when it could be measured."""
    measured, cache = {"held_out": {"loss": 2.0}}, "sft_recipes.evaluation.base_cache."
    monkeypatch.setattr(f"{cache}base_identity", lambda *_: "0")
    monkeypatch.setattr(f"{cache}measured_metrics", lambda _: ["eval_loss"])
    monkeypatch.setattr(f"{cache}measure_model", lambda *_, **__: measured)
    config = composed("model=tiny", "data=tiny", "evaluate.cache=false")
    line = error_of(lambda: measure_base(None, None, None, config, tmp_path, trained=True))
    assert (
        line == f"{tmp_path} has no base-0.json: a sharded base is measured before training. Leave evaluate as it was."
    )
    assert measure_base(None, None, None, config, tmp_path) == measured
    monkeypatch.delattr(f"{cache}measure_model")
    assert measure_base(None, None, None, config, tmp_path, trained=True) == measured


def test_of_several_processes_the_first_says_a_mistake_and_the_others_leave_it_the_time(monkeypatch, capsys):
    """torchrun ends the others as soon as the first has ended."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank, seconds in (("0", []), ("1", [30])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"), exit_on_user_error():
            raise ConfigError("It is wrong.")
        assert waited == seconds and capsys.readouterr().err == "It is wrong.\n"
