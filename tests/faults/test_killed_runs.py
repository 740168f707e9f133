"""Runs that are killed anywhere and resumed: the same weights, losses, curve and answers as of one that was not.

The suite tries a point, `make test-faults` all of them.
"""

import shutil
import signal

import pytest

from support.stopped_runs import KILLABLE, NEEDS_ALL_FAULTS, checkpoints, results, resume, train

# What writes each file of a checkpoint, in the order of their writing, and how an argument of the call ends
CHECKPOINT = "checkpoint-8"  # of the second save
FILES = {
    "adapter_model.safetensors": f"peft.peft_model.safe_save_file:{CHECKPOINT}/adapter_model.safetensors",
    "adapter_config.json": f"peft.config.PeftConfigMixin.save_pretrained:{CHECKPOINT}",
    "the tokenizer's files": f"transformers.PreTrainedTokenizerBase.save_pretrained:{CHECKPOINT}",
    "training_args.bin": f"torch.save:{CHECKPOINT}/training_args.bin",
    "optimizer.pt": f"torch.save:{CHECKPOINT}/optimizer.pt",
    "scheduler.pt": f"torch.save:{CHECKPOINT}/scheduler.pt",
    "rng_state.pth": f"torch.save:{CHECKPOINT}/rng_state.pth",
    "trainer_state.json": f"transformers.trainer_callback.TrainerState.save_to_json:{CHECKPOINT}/trainer_state.json",
    "progress.json": f"Path.write_text:{CHECKPOINT}/progress.json",
    "manifest.json": f"sft_recipes.training.checkpoints.write_json:{CHECKPOINT}/manifest.json",
}
MODEL = {
    "adapter_model.safetensors": "peft.peft_model.safe_save_file:model/adapter_model.safetensors",
    "adapter_config.json": "peft.config.PeftConfigMixin.save_pretrained:run/model",
    "the tokenizer's files": "transformers.PreTrainedTokenizerBase.save_pretrained:run/model",
    "the template with markers": "Path.write_text:training.jinja",
    "answers.jsonl": "sft_recipes.train.write_jsonl:answers.jsonl",
    "metrics.json": "sft_recipes.train.write_json:metrics.json",
}
STEP = "sft_recipes.training.callbacks.FiniteLossCheck.on_pre_optimizer_step"
TRAINER = "sft_recipes.training.resumable_trainer"
ELSEWHERE = [
    f"{STEP}:1:before",  # before the first save: training begins anew
    f"{STEP}:4:before",
    f"{STEP}:5:before",  # the first step after a save
    f"{STEP}:10:after",  # the last of an epoch
    f"{STEP}:11:before",
    f"{STEP}:18:before",
    f"{STEP}:30:before",
    "sft_recipes.training.trainer.SupervisedTrainer.training_step:14:after",  # within a step: the loss is there
    "os.fsync:1:before",  # nothing is on the disk for sure
    "os.fsync:25:before",  # in the second save, with some files on the disk
    f"Path.rename:{CHECKPOINT}:before",  # whole, and not in its place
    f"Path.rename:{CHECKPOINT}:after",  # in its place, which may not be on the disk
    "os.rmdir:2:before",  # the second save's folder aside is empty
    f"{TRAINER}.rotate_checkpoints:3:before",  # three checkpoints are there
    "os.rmdir:4:before",  # the oldest is empty
    f"{TRAINER}.rotate_checkpoints:3:after",
    "sft_recipes.train.measure_model:1:before",  # trained, and neither measured nor saved
    "sft_recipes.train.save_model:1:after",
    "sft_recipes.train.write_report:1:before",  # finished but for its report
    "sft_recipes.train.write_report:1:within",
]  # fmt: skip
POINTS = [f"{call}:{when}" for call in (*FILES.values(), *MODEL.values()) for when in ("before", "within", "after")]
POINTS += ELSEWHERE
SETTINGS = {
    "full": ["adapter=none"],
    "dropout": ["adapter.lora.lora_dropout=0.3"],
    "qlora": ["adapter=qlora"],
    "packed": ["trainer.packing=true", "trainer.save_steps=2"],
    "accumulated": ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=3"],
    "random order": ["trainer.train_sampling_strategy=random"],
    "NEFTune": ["trainer.neftune_noise_alpha=5"],
    "LoRA+": ["adapter.loraplus_lr_ratio=4"],
    "PiSSA": ["adapter.lora.init_lora_weights=pissa"],
    "saved by epoch": ["trainer.save_strategy=epoch"],
    "best epoch kept": ["trainer.early_stopping_patience=2", "trainer.save_total_limit=1"],
    "streamed, three passes": ["data.file.streaming=true", "trainer.max_steps=30"],
}


def how_it_ended(run) -> int:
    """The signal that ended a process; its stderr where none has."""
    assert run.returncode < 0, run.stderr
    return -run.returncode


@NEEDS_ALL_FAULTS
@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_is_killed_goes_on_to_the_same_weights(where, whole, point):
    shutil.rmtree(where / "run", ignore_errors=True)
    killed = train(where, "run", KILLABLE, STOP_AT=point)
    assert how_it_ended(killed) == (signal.SIGXFSZ if point.endswith("within") else signal.SIGKILL)
    resumed = resume(where, "run")
    assert resumed.returncode == 0, resumed.stderr
    assert results(where / "run") == whole
    assert checkpoints(where / "run") == {"checkpoint-28", "checkpoint-30"}
    assert not list((where / "run").glob(".*.[0-9]*"))  # files that were begun
    assert "the same weights, bit for bit, where its config, seed, rows" in (where / "run" / "report.md").read_text()


def test_in_interpreters_of_their_own_they_are_the_same_in_whatever_order_python_hashes(where, whole):
    """No child of a fork server, as in the other tests here, and two seeds of hashing."""
    point = f"torch.save:{CHECKPOINT}/optimizer.pt:before"  # the weights are there, and no optimizer yet
    assert how_it_ended(train(where, "hashed", KILLABLE, STOP_AT=point, PYTHONHASHSEED="7")) == signal.SIGKILL
    resumed = resume(where, "hashed", PYTHONHASHSEED="8")
    assert resumed.returncode == 0, resumed.stderr
    assert results(where / "hashed") == whole


@NEEDS_ALL_FAULTS
@pytest.mark.parametrize("setting", SETTINGS)
def test_whatever_is_trained_in_whatever_order_is_resumed_in_any_epoch(where, setting):
    for run in ("anew", "stopped"):
        shutil.rmtree(where / run, ignore_errors=True)
    anew = train(where, "anew", *SETTINGS[setting])
    assert anew.returncode == 0, anew.stderr
    steps = results(where / "anew")["steps"]
    first = train(where, "stopped", *SETTINGS[setting], KILLABLE, STOP_AT=f"{STEP}:{steps // 4}:before")
    second = resume(where, "stopped", STOP_AT=f"{STEP}:{steps // 2}:before")  # of its own: in another epoch
    assert (how_it_ended(first), how_it_ended(second)) == (signal.SIGKILL, signal.SIGKILL)
    resumed = resume(where, "stopped")
    assert resumed.returncode == 0, resumed.stderr
    assert results(where / "stopped") == results(where / "anew")
