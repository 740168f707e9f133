"""The estimate of a training's time and price before it runs."""

import time

from sft_recipes.config.options import PreviewOptions
from sft_recipes.training.memory import MemoryEstimate
from sft_recipes.training.run_metadata import describe_time, measure_rate, training_operations


def estimate(parameters: float, trainable: float) -> MemoryEstimate:
    return MemoryEstimate(int(parameters), int(trainable), 0, 0, 0, 0)


def test_a_billion_weights_and_a_million_tokens_take_six_times_as_many_operations():
    assert training_operations(1e6, estimate(1e9, 1e9), activation_checkpointing=False) == 6e15
    assert training_operations(1e6, estimate(1e9, 1e9), activation_checkpointing=True) == 8e15
    assert training_operations(1e6, estimate(1e9, 0), activation_checkpointing=False) == 4e15  # frozen, but for LoRA's


def test_time_and_price_follow_from_a_stated_rate():
    options = PreviewOptions(tflops=100, price_per_hour=3.6)
    line = describe_time(1e6, estimate(1e9, 1e9), options, again=False, devices=1)
    assert line.startswith("About 2 min of training, 0.15 at 3.6 an hour, by 1,000,000 tokens and 40% of 100 TFLOP/s")
    both = describe_time(1e6, estimate(1e9, 1e9), PreviewOptions(tflops=100), again=False, devices=2)
    assert both.startswith("About 75 s of training, by 1,000,000 tokens")


def test_the_rate_that_is_measured_here_is_that_of_a_matrix_product():
    start = time.perf_counter()
    rate = measure_rate(seconds=0.05)
    assert 1e8 < rate < 1e15 and time.perf_counter() - start < 30


def test_preview_says_how_long_training_takes_and_what_it_costs(tiny_run):
    code, printed, _ = tiny_run("mode=preview", "+recipe=tiny", "preview.tflops=1", "preview.price_per_hour=2")
    shown = " ".join(printed.split())
    assert code == 0 and "of training, 0.00 at 2 an hour, by" in shown and "as preview.tflops says" in shown
