"""`make compare`: what is typed for each recipe keeps what it should and scales what it says, and runs."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import compare
import pytest
from compare import TEXT, overrides

from sft_recipes.recipes import recipe_names
from support.configs import composed
from support.paths import ALL_TESTS, ROOT


@pytest.mark.parametrize(
    ("name", "rate", "batch", "epochs", "train_on"),
    [
        ("alpaca_7b", 2e-4, 16, 3, None),  # 2e-5, 128 rows
        ("lima", 1e-4, 8, 15, None),  # 1e-5, 64 rows
        ("alpaca_lora", 3e-3, 16, 3, "all"),  # 3e-4, 128 rows, prompts included
        ("flan", 3e-4, 1, 3, None),  # 3e-5, 4 packed rows: half a row is one
    ],
)
def test_the_learning_rate_is_ten_times_the_recipes_and_the_batch_an_eighth(name, rate, batch, epochs, train_on):
    config = composed(*overrides(name))
    assert config.trainer.fields["learning_rate"] == pytest.approx(rate)
    assert config.trainer.effective_batch_size == config.trainer.per_device_train_batch_size == batch
    assert config.trainer.fields["num_train_epochs"] == epochs
    assert list(config.sources) == ["tiny"]
    assert config.composed["data"]["tiny"].get("train_on") == train_on


def test_all_are_trained_on_as_many_questions():
    splits = {
        composed(*overrides(name)).sources["tiny"].split
        for name in recipe_names()[:: 1 if ALL_TESTS else 8]
        if name not in TEXT
    }
    assert splits == {"train[:700]"}


def test_the_template_is_the_recipes_and_steps_become_epochs():
    assert composed(*overrides("scale_7b_50k")).model.chat_template == "zephyr"  # which its model's file says
    assert composed(*overrides("flan")).trainer.fields["max_steps"] == -1  # 30,000 would be 240 epochs


def test_a_schedule_keeps_its_shape():
    lima = composed(*overrides("lima")).trainer.fields
    assert lima["lr_scheduler_kwargs"] == {"power": 1.0, "lr_end": 1e-5}  # a tenth of the rate, as in the source
    assert composed(*overrides("dolly_v2")).trainer.fields["warmup_steps"] == 0.03  # 50 steps would be a fifth of these


def test_raw_text_is_the_worlds_prose_all_of_it():
    sources = composed(*overrides("continual_pretraining")).sources
    assert {name: source.share for name, source in sources.items()} == {"prose": None}


def test_two_recipes_run_side_by_side_and_one_that_fails_says_so(tmp_path, monkeypatch, capfd):
    here = SimpleNamespace(submit=lambda function, *values: SimpleNamespace(result=partial(function, *values)))
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda *_, **__: nullcontext(here))
    command = ["compare.py", "--only", "zephyr_sft_qlora,lima", "--out", str(tmp_path), "--more", "trainer.max_steps=2"]
    short = ["trainer.lr_scheduler_type=linear", "evaluate.rows=2", "trainer.check_memory=false"]
    monkeypatch.setattr("sys.argv", [*command, *short])
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):  # which it sets for its processes
        monkeypatch.setenv(name, "1")
    compare.main()
    printed, said = capfd.readouterr()
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in printed.splitlines() if "|" in line}
    assert [cell.strip() for cell in lines["zephyr_sft_qlora"]][:6] == [
        "QLoRA r=16",
        "0.002",
        "1",
        "1",
        "all tokens",
        "2",
    ]
    assert lines["lima"][0].strip() == "failed"  # a straight line has no power
    assert "it has no field lr_end, power" in said


def test_the_readme_of_the_recipes_shows_a_row_for_each():
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8").partition("## Side by side")[2]
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert set(recipe_names()) <= set(rows)
