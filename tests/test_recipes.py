"""Every recipe on disk: it composes, says where it comes from, reaches its source's batch, and trains."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from datasets import Dataset
from hydra.core.global_hydra import GlobalHydra
from test_config import composed

from sft_recipes.__main__ import main
from sft_recipes.arguments import accumulation
from sft_recipes.config import Config
from sft_recipes.sources import sources

RECIPES = sorted(path.stem for path in ROOT.glob("recipes/recipe/*.yaml"))
ROWS = ROOT / "tests" / "rows"
HUB_ID = r"[\w-]+/[\w.-]+"


def found(config: Config, key: str):
    """The value that a dotted key has in a run, or None."""
    group, *path = ("trainer.effective_batch_size" if key == "effective_batch_size" else key).split(".")
    value = getattr(config, group, None)
    if group == "data":
        value = value | {name: vars(source) for name, source in sources(config).items()}
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def row_file(path: str) -> Path:
    """The file of three rows for a dataset of the hub."""
    return ROWS / f"{path.partition('/')[2]}.jsonl"


def test_the_recipes_that_everybody_knows_are_there():
    famous = (
        "alpaca_7b alpaca_13b alpaca_lora lima_65b lima vicuna dolly_v2 guanaco_7b guanaco_65b oasst_pythia zephyr_sft"
    )
    famous += (
        " zephyr_sft_qlora tulu2 tulu2_qlora tulu3_8b tulu3_70b olmo2 smollm2_1_7b smollm2_135m smollm3 llama2_chat"
    )
    famous += " instructgpt flan openhermes self_instruct scale_1b_1k scale_7b_50k scale_70b_500k continual_pretraining"
    famous += " single_gpu_24gb domain_expert balanced_mix tiny"
    assert set(famous.split()) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_comes_from_before_it_says_what_runs(name):
    text = (ROOT / "recipes" / "recipe" / f"{name}.yaml").read_text(encoding="utf-8")
    provenance = composed(f"+recipe={name}").provenance
    assert set(provenance["data"]) == {"id", "licence", "rows"}
    assert "devices" in " ".join(provenance["unknown"]) or provenance["devices"] is not None
    assert text.index("\nprovenance:") < text.index("\ntrainer:") if "\ntrainer:" in text else True


@pytest.mark.parametrize("name", RECIPES)
def test_a_value_is_the_sources_or_a_departure_that_says_why(name):
    config = composed(f"+recipe={name}")
    values, departures = config.provenance["values"], config.provenance["departures"]
    departing = {key for key, value in values.items() if found(config, key) != value}
    assert departing == set(departures) & set(values)
    assert all(isinstance(why, str) and len(why) > 10 for why in departures.values())


@pytest.mark.parametrize("name", RECIPES)
def test_with_the_devices_of_its_source_a_recipe_has_the_batch_of_its_source(name):
    config = composed(f"+recipe={name}")
    devices = config.provenance["devices"] or 1
    trainer = config.trainer | accumulation(config.trainer["effective_batch_size"], config.trainer, devices)
    made = trainer["per_device_train_batch_size"] * devices * trainer["gradient_accumulation_steps"]
    assert made == config.provenance["values"].get("effective_batch_size", made)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "tiny"])
def test_models_and_datasets_are_names_of_the_hub_and_have_rows_here_to_test_with(name):
    config = composed(f"+recipe={name}")
    assert re.fullmatch(HUB_ID, config.model["id"])
    for source in sources(config).values():
        assert re.fullmatch(HUB_ID, source.path)
        assert len(three_rows(source.path)) == 3


def three_rows(path: str, **_) -> Dataset:
    """What stands here for a dataset of the hub: three rows of ours with its columns."""
    return Dataset.from_list([json.loads(line) for line in row_file(path).read_text(encoding="utf-8").splitlines()])


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "tiny"])
def test_a_recipe_trains_two_steps_on_rows_in_the_shape_of_its_data(name, tmp_path, monkeypatch, capsys):
    overrides = [f"+recipe={name}", "+debug=smoke", "model=tiny", "data.held_out=0"]
    overrides += ["trainer.max_steps=2", "trainer.logging_steps=1", "evaluate.rows=0"]
    overrides += ["smoke=false"]  # two steps are too few to see the loss fall
    overrides += [
        "data.max_length_policy=keep",
        "supervision.in_held_out=keep",
    ]  # the test split is the same three rows
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sft_recipes.sources.load_dataset", three_rows)
    monkeypatch.setattr("sys.argv", ["sft_recipes", f"hydra.run.dir={tmp_path}", *overrides])
    GlobalHydra.instance().clear()
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, capsys.readouterr().err[-2000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert metrics["steps"] == 2 and len(losses) == 2 and min(losses) > 0
