"""Every recipe on disk: it composes, says where it comes from, reaches its source's batch, and trains."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hydra.core.global_hydra import GlobalHydra

from sft_recipes import recipes
from sft_recipes.__main__ import main
from sft_recipes.config.schema import Config
from sft_recipes.errors import ConfigError
from sft_recipes.reporting.provenance import compare_with_source
from sft_recipes.training.arguments import accumulation_steps
from support.configs import composed
from support.paths import ROOT

RECIPES = sorted(path.stem for path in ROOT.glob("recipes/recipe/*.yaml"))
ROWS = ROOT / "tests" / "rows"
HUB_ID = r"[\w-]+/[\w.-]+"


def found(config: Config, key: str):
    """The value that a dotted key has in a run, with the defaults of a source, or None."""
    group, *path = ("trainer.effective_batch_size" if key == "effective_batch_size" else key).split(".")
    value = config.composed[group]
    if group == "data":
        value = value | {name: vars(source) for name, source in config.sources.items()}
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


def test_the_list_has_a_row_a_recipe_with_its_name_source_model_data_adapter_and_memory(capsys):
    recipes.main([])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["recipe", "source", "model", "data", "adapter", "memory"]
    assert [row[0] for row in rows[2:]] == RECIPES
    guanaco = next(row for row in rows if row[0] == "guanaco_7b")
    assert guanaco[1:5] == ["github.com/artidoro/qlora", "meta-llama/Llama-2-7b-hf", "oasst1_guanaco", "QLoRA r=64"]


def test_the_readme_of_the_recipes_has_the_source_and_the_memory_of_each():
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    lines = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    for name in RECIPES:
        provenance = composed(f"+recipe={name}").provenance
        memory = re.search(r"\| ([\d.]+ [GM]iB) \|", text[text.index(f"| `{name}` |") :])[1]
        assert name in lines and f"{memory}, estimated" == provenance.needs
        assert provenance.source.split(",")[0].split(" ")[-1] in text


def test_one_recipe_is_shown_beside_its_source_with_what_departs(capsys):
    recipes.main(["dolly_v2"])
    lines = capsys.readouterr().out.splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in lines if "|" in line
    }
    assert cells["trainer.learning_rate"] == ["5e-06", "5e-06"]
    assert cells["effective_batch_size"] == ["48", "48"]
    assert cells["tokens a step, at most"] == ["", "49,152"]  # 48 × 1,024
    assert any(line.startswith("Departs in template: the source ends an answer with a new token") for line in lines)


def test_a_run_that_changes_a_value_shows_it_beside_the_sources():
    config = composed("+recipe=alpaca_7b", "trainer.learning_rate=1e-4", "trainer.effective_batch_size=64")
    rows = {row[0]: row[1:] for row in compare_with_source(config.composed)}
    assert rows["trainer.learning_rate"] == ["2e-05", "0.0001", "departs, without a reason given"]
    assert rows["effective_batch_size"] == ["128", "64", "departs, without a reason given"]
    assert rows["tokens a step, at most"] == ["65,536", "32,768", ""]  # batch × trainer.max_length
    assert rows["data.held_out"] == ["0", "0.02", "departs: 2 % are held out, so that the run can be judged"]
    assert rows["trainer.weight_decay"] == ["0.0", "0.0", ""]


def test_a_recipe_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit) as raised:
        recipes.main(["lim"])
    assert (raised.value.code, capsys.readouterr().err) == (2, "There is no recipe=lim. Did you mean lima?\n")


def test_the_list_does_without_torch(tmp_path):
    code = (
        "import sys; from sft_recipes import recipes; recipes.main(['lima']); print(*({!r} & sys.modules.keys()), '.')"
    )
    heavy = {"torch", "transformers", "trl", "datasets", "peft"}
    found = subprocess.run([sys.executable, "-c", code.format(heavy)], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.splitlines()[-1].strip() == "."


@pytest.mark.parametrize(
    ("effective", "rows", "processes", "steps"), [(128, 8, 1, 16), (128, 4, 8, 4), (128, 16, 8, 1), (None, 8, 4, None)]
)
def test_the_effective_batch_is_rows_times_processes_times_accumulated_steps(effective, rows, processes, steps):
    found = accumulation_steps(effective, {"per_device_train_batch_size": rows}, processes)
    assert found.get("gradient_accumulation_steps") == steps


@pytest.mark.parametrize(
    ("effective", "rows", "processes", "line"),
    [
        (100, 8, 1, "is no multiple of 8 rows on 1 process. Write trainer.per_device_train_batch_size=5."),
        (128, 32, 8, "is no multiple of 32 rows on 8 processes. Write trainer.per_device_train_batch_size=16."),
        (100, 8, 8, "is no multiple of 8 rows on 8 processes. Write trainer.effective_batch_size=96."),
        (2, 8, 8, "is no multiple of 8 rows on 8 processes. Write trainer.effective_batch_size=8."),
    ],
)
def test_an_effective_batch_that_does_not_divide_is_refused_with_one_that_does(effective, rows, processes, line):
    with pytest.raises(ConfigError) as raised:
        accumulation_steps(effective, {"per_device_train_batch_size": rows}, processes)
    assert str(raised.value) == f"trainer.effective_batch_size={effective} {line}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_comes_from_before_it_says_what_runs(name):
    text = (ROOT / "recipes" / "recipe" / f"{name}.yaml").read_text(encoding="utf-8")
    provenance = composed(f"+recipe={name}").provenance
    assert set(provenance.data) == {"id", "licence", "rows"}
    assert "devices" in " ".join(provenance.unknown) or provenance.devices is not None
    assert text.index("\nprovenance:") < text.index("\ntrainer:") if "\ntrainer:" in text else True


@pytest.mark.parametrize("name", RECIPES)
def test_a_value_is_the_sources_or_a_departure_that_says_why(name):
    config = composed(f"+recipe={name}")
    values, departures = config.provenance.values, config.provenance.departures
    departing = {key for key, value in values.items() if found(config, key) != value}
    assert departing == set(departures) & set(values)
    assert all(isinstance(why, str) and len(why) > 10 for why in departures.values())


@pytest.mark.parametrize("name", RECIPES)
def test_with_the_devices_of_its_source_a_recipe_has_the_batch_of_its_source(name):
    config = composed(f"+recipe={name}")
    devices = config.provenance.devices or 1
    trainer = config.trainer.fields
    trainer = trainer | accumulation_steps(config.trainer.effective_batch_size, trainer, devices)
    made = trainer["per_device_train_batch_size"] * devices * trainer["gradient_accumulation_steps"]
    assert made == config.provenance.values.get("effective_batch_size", made)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "tiny"])
def test_models_and_datasets_are_names_of_the_hub_and_have_rows_here_to_test_with(name):
    config = composed(f"+recipe={name}")
    assert re.fullmatch(HUB_ID, config.model.id)
    for source in config.sources.values():
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
        "data_checks.in_held_out=keep",
    ]  # the test split is the same three rows
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sft_recipes.data.sources.load_dataset", three_rows)
    monkeypatch.setattr("sys.argv", ["sft_recipes", f"hydra.run.dir={tmp_path}", *overrides])
    GlobalHydra.instance().clear()
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, capsys.readouterr().err[-2000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert metrics["steps"] == 2 and len(losses) == 2 and min(losses) > 0
