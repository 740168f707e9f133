"""What a run says of its cost, against sums by hand and what the system itself counts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from sft_recipes.errors import ConfigError
from sft_recipes.training.run_metadata import (
    measure_padding,
    peak_memory_gib,
    smoke_result,
    training_cost,
)


def finished(*history: dict, **arguments):
    """What is left of a trainer after a run: a layer of 3 × 2 weights that were trained and 2 biases that were not."""
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    state = SimpleNamespace(log_history=list(history), global_step=20)
    return SimpleNamespace(model=model, state=state, args=SimpleNamespace(bf16=False, fp16=False, **arguments))


def test_tokens_a_second_are_the_tokens_read_by_the_seconds_taken():
    trainer = finished({"num_tokens": 400.0}, {"eval_loss": 1.0}, {"num_tokens": 1000.0})
    found = training_cost(trainer, SimpleNamespace(metrics={"train_runtime": 8.0}))
    assert found["train_seconds"] == 8.0 and found["train_tokens"] == 1000
    assert found["tokens_per_second"] == 125
    assert (found["parameters"], found["trainable_parameters"], found["mfu"]) == (8, 6, None)


def test_the_peak_of_a_process_is_what_the_system_says_it_is():
    status = Path("/proc/self/status")
    if not status.is_file() or torch.cuda.is_available():
        pytest.skip("needs Linux's own count, and no GPU")
    high_water = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    assert peak_memory_gib() == pytest.approx(int(high_water.split()[1]) * 1024 / 2**30, rel=0.02)  # kB there are KiB


@pytest.mark.parametrize(
    ("batch", "packing", "share"),
    [
        (2, False, 2 / 8),  # one batch of 2 and 4 tokens, the shorter padded to 4
        (1, False, 0),
        (2, True, 0),
    ],
)
def test_padding_is_its_share_of_what_the_model_reads(tmp_path, batch, packing, share):
    rows = Dataset.from_dict({"input_ids": [[1] * 2, [1] * 4], "labels": [[1] * 2, [1] * 4]})
    arguments = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=batch, packing=packing, use_cpu=True, bf16=False
    )
    assert measure_padding(rows, arguments) == pytest.approx(share)


@pytest.mark.parametrize(
    ("losses", "line"),
    [
        ([3.0, 2.5, 2.0, 1.5, 1.0], None),
        ([2.0, 1.0, 1.0, 5.0], "from 2.000 to 2.333"),  # the mean of the last three
        ([2.0, 2.0], "from 2.000 to 2.000"),
        ([2.0, float("nan")], "from 2.000 to nan"),
        ([2.0], "too few steps"),
    ],
)
def test_a_smoke_run_passes_where_the_last_losses_are_below_the_first(losses, line):
    metrics = {"history": [{"loss": loss} for loss in losses], "steps": len(losses), "peak_memory_gib": 1.25}
    if line:
        with pytest.raises(ConfigError, match=line):
            smoke_result(metrics, [])
    else:
        assert smoke_result(metrics, []).endswith("from 3.000 to 1.500 in 5 steps, peak memory 1.2 GiB.")
