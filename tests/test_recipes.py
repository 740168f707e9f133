"""Every recipe on disk: it composes, says where it comes from, reaches its source's batch, and trains."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from sft_recipes import recipes
from sft_recipes.__main__ import main
from sft_recipes.config.options import Source
from sft_recipes.config.schema import Config
from sft_recipes.data.sources import find_formatter
from sft_recipes.errors import ConfigError, DataError
from sft_recipes.reporting.provenance import compare_with_source, departure_reasons
from sft_recipes.training.choices import accumulation_steps
from support.configs import composed
from support.paths import ALL_TESTS, ROOT
from support.rows import write_jsonl

RECIPES = sorted(path.stem for path in ROOT.glob("recipes/recipe/*.yaml"))
ROWS = ROOT / "tests" / "rows"
HUB_ID = r"[\w-]+/[\w.-]+"
HUB_FILE = r"hf://datasets/([\w-]+/[\w.-]+)/[\w.-]+"
# What conf/trainer/default.yaml, conf/config.yaml and TRL decide where a recipe is silent
DECIDED = [
    "trainer.learning_rate",
    "trainer.lr_scheduler_type",
    "trainer.warmup_steps",
    "trainer.weight_decay",
    "trainer.max_grad_norm",
    "trainer.max_length",
    "trainer.packing",
    "trainer.train_sampling_strategy",
    "data.max_length_policy",
    "effective_batch_size",
]


def found(config: Config, key: str):
    """The value that a dotted key has in a run, with the defaults of a source, or None."""
    group, *path = ("trainer.effective_batch_size" if key == "effective_batch_size" else key).split(".")
    value = config.composed[group]
    if group == "data":
        value = value | {name: vars(source) for name, source in config.sources.items()}
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


@cache
def composed_recipe(name: str) -> Config:
    """What `+recipe=NAME` runs."""
    return composed(f"+recipe={name}")


def dataset_id(source: Source) -> str:
    """The hub's name of a source's dataset, also where one file of it is read."""
    if source.path == "json":
        return re.fullmatch(HUB_FILE, source.data_files["train"])[1]
    return source.path


def row_file(source: Source, folder: str = "") -> Path:
    """The file of rows in the shape of a source's dataset: three tidy ones, in `awkward` such as it really has."""
    return ROWS / folder / f"{dataset_id(source).partition('/')[2]}.jsonl"


def read_rows(path: Path) -> list[dict]:
    """The rows of a file; none where it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def test_the_recipes_that_everybody_knows_are_there():
    famous = (
        "alpaca_7b alpaca_13b alpaca_lora lima_65b lima vicuna dolly_v2 guanaco_7b guanaco_65b oasst_pythia zephyr_sft"
    )
    famous += (
        " zephyr_sft_qlora tulu2 tulu2_qlora tulu3_8b tulu3_70b olmo2 smollm2_1_7b smollm2_135m smollm3 llama2_chat"
    )
    famous += " instructgpt flan openhermes self_instruct scale_1b_1k scale_7b_5k scale_7b_50k scale_70b_500k continual_pretraining"
    famous += " single_gpu_24gb domain_expert balanced_mix tiny s1 limo openthinker_7b openr1_distill_7b magpie_8b"
    famous += " olmo3_7b_instruct olmo2_1b smollm3_mid wizardlm_7b no_robots single_gpu_24gb_llama3_8b"
    famous += " single_gpu_24gb_gemma3_4b"
    assert set(famous.split()) <= set(RECIPES)


def test_the_list_has_a_row_a_recipe_and_as_many_columns_as_the_terminal_holds(capsys, monkeypatch):
    monkeypatch.setattr(recipes, "compose_recipe", composed_recipe)  # the same, once for each

    def listed(width: str) -> list[list[str]]:
        monkeypatch.setenv("COLUMNS", width)
        recipes.main([])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= int(width)
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

    rows = listed("250")
    assert rows[0] == ["recipe", "model", "adapter", "GiB", "data", "source"]
    assert [row[0] for row in rows[2:]] == RECIPES
    source = "github.com/artidoro/qlora/tree/0b46ca80a0bb"
    guanaco = ["guanaco_7b", "Llama-2-7b-hf", "QLoRA r=64", "8.1", "oasst1_guanaco", source]
    assert guanaco in rows
    assert guanaco[:4] in listed("80") and guanaco[:5] in listed("120")


def test_the_readme_of_the_recipes_has_the_source_and_the_memory_of_each():
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    lines = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    for name in RECIPES:
        provenance = composed_recipe(name).provenance
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
    assert cells["tokens per step, at most"] == ["98,304", "98,304"]  # 48 × 2,048
    assert any(
        "| departs: the source ends an answer with a new token" in line for line in lines if "| template " in line
    )


def test_a_run_that_changes_a_value_shows_it_beside_the_sources():
    config = composed("+recipe=alpaca_7b", "trainer.learning_rate=1e-4", "trainer.effective_batch_size=64")
    rows = {row[0]: row[1:] for row in compare_with_source(config.composed)}
    assert rows["trainer.learning_rate"] == ["2e-05", "0.0001", "departs, without a reason given"]
    assert rows["effective_batch_size"] == ["128", "64", "departs, without a reason given"]
    assert rows["tokens per step, at most"] == ["65,536", "32,768", ""]  # batch × trainer.max_length
    assert rows["data.held_out"] == ["0", "0.02", "departs: 2 % are held out, so that the run can be judged"]
    assert rows["trainer.weight_decay"] == ["0.0", "0.0", ""]


def test_a_recipe_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit) as raised:
        recipes.main(["vicun"])
    assert (raised.value.code, capsys.readouterr().err) == (2, "There is no recipe=vicun. Did you mean vicuna?\n")


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
    found = accumulation_steps(effective, rows, processes)
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
        accumulation_steps(effective, rows, processes)
    assert str(raised.value) == f"trainer.effective_batch_size={effective} {line}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_comes_from_before_it_says_what_runs(name):
    text = (ROOT / "recipes" / "recipe" / f"{name}.yaml").read_text(encoding="utf-8")
    provenance = composed_recipe(name).provenance
    assert set(provenance.data) == {"id", "licence", "rows"}
    assert "devices" in " ".join(provenance.unknown) or provenance.devices is not None
    assert text.index("\nprovenance:") < text.index("\ntrainer:") if "\ntrainer:" in text else True


@pytest.mark.parametrize("name", RECIPES)
def test_a_source_on_github_is_named_with_its_commit(name):
    source = composed_recipe(name).provenance.source
    assert "github.com" not in source or re.search(r"github\.com/[\w-]+/[\w.-]+/tree/[0-9a-f]{12},", source)


@pytest.mark.parametrize("name", RECIPES)
def test_a_value_is_the_sources_or_a_departure_that_says_why(name):
    config = composed_recipe(name)
    values, departures = config.provenance.values, departure_reasons(config.composed["provenance"])
    departing = {key for key, value in values.items() if found(config, key) != value}
    assert departing == set(departures) & set(values)
    assert all(isinstance(why, str) and len(why) > 10 for why in departures.values())


def test_what_stands_in_a_recipe_is_its_sources_value():
    values = composed("+recipe=dolly_v2", "trainer.learning_rate=1").provenance.values
    assert values == {
        "model.chat_template": "alpaca", "data.dolly.train_on": "assistant", "data.held_out": 200,
        "data.max_length_policy": "drop", "trainer.learning_rate": 5e-6, "trainer.warmup_steps": 50,
        "trainer.lr_scheduler_type": "constant_with_warmup", "trainer.num_train_epochs": 2, "effective_batch_size": 48,
        "trainer.weight_decay": 0.0, "trainer.max_grad_norm": 1.0, "trainer.packing": False, "trainer.max_length": 2048,
        "trainer.train_sampling_strategy": "random", "seed": 42,
    }  # fmt: skip


def test_a_rule_of_thumb_credits_no_figure_to_a_source():
    thumb = [config.provenance for config in map(composed_recipe, RECIPES) if config.provenance.confidence == "C"]
    assert len(thumb) == 7 and all(not part.values and part.devices is None for part in thumb)


@pytest.mark.parametrize("name", RECIPES)
def test_what_our_defaults_decide_is_the_sources_a_departure_or_unknown(name):
    config = composed_recipe(name)
    provenance = config.provenance
    if provenance.confidence not in ("A", "B"):
        return
    said = [*provenance.values, *provenance.departures, *" ".join(provenance.unknown).replace(",", " ").split()]
    held_out = all(source.held_out_split for source in config.sources.values())
    wanted = [*DECIDED, *(() if held_out else ("data.held_out",))]
    assert [key for key in wanted if key not in said] == []
    assert {"trainer.num_train_epochs", "trainer.max_steps"} & set(said)
    parts = [f"data.{source}.train_on" for source, value in config.sources.items() if value.formatter != "text"]
    assert "data.train_on" in said or [key for key in parts if key not in said] == []


@pytest.mark.parametrize("name", RECIPES)
def test_with_the_devices_of_its_source_a_recipe_has_the_batch_of_its_source(name):
    config = composed_recipe(name)
    devices = config.provenance.devices or 1
    rows = config.trainer.per_device_train_batch_size
    steps = config.trainer.fields | accumulation_steps(config.trainer.effective_batch_size, rows, devices)
    made = rows * devices * steps["gradient_accumulation_steps"]
    assert made == config.provenance.values.get("effective_batch_size", made)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "tiny"])
def test_models_and_datasets_are_names_of_the_hub_and_have_rows_here_to_test_with(name):
    config = composed_recipe(name)
    assert re.fullmatch(HUB_ID, config.model.id)
    for source in config.sources.values():
        assert re.fullmatch(HUB_ID, dataset_id(source))
        assert len(read_rows(row_file(source))) == 3


AWKWARD = sorted((ROWS / "awkward").glob("*.jsonl"))


def test_awkward_rows_are_of_datasets_that_recipes_use():
    used = {row_file(source).name for source in hub_sources()}
    assert {path.name for path in AWKWARD} <= used


UNREADABLE = {  # awkward rows that no formatter takes, and what is wrong with them
    "alpaca": {0: "output is blank."},
    "tulu-v2-sft-mixture": {1: "messages[1].content is blank."},
    "ShareGPT_Vicuna_unfiltered": {
        0: "conversations should be a list of messages, not [].",
        5: "conversations: nothing to train on, no assistant turn.",
    },
    "Dolci-Instruct-SFT": {0: "messages[2].role: unknown role 'environment', known are "},
}


@pytest.mark.parametrize("path", AWKWARD, ids=lambda path: path.stem)
def test_awkward_rows_of_published_sets_are_read_or_say_in_one_line_why_not(path):
    source = next(source for source in hub_sources() if row_file(source).name == path.name)
    lines = {}
    for number, row in enumerate(read_rows(path)):
        try:
            find_formatter("x", source, {"name": "auto"}, list(row))(row)
        except DataError as error:
            lines[number] = str(error)
    wanted = UNREADABLE.get(path.stem, {})
    assert lines.keys() == wanted.keys() and all(lines[number].startswith(wanted[number]) for number in lines)
    assert source.on_error == ("drop" if wanted else "raise")  # a set that is known to have such rows drops them


def hub_sources() -> list[Source]:
    """The sources of every recipe that are datasets of the hub."""
    return [source for name in RECIPES if name != "tiny" for source in composed_recipe(name).sources.values()]


def with_local_rows(config: Config, folder: Path) -> list[str]:
    """Overrides that put rows in the shape of the hub's datasets in their place, tidy and awkward ones."""
    overrides = []
    for name, source in config.sources.items():
        rows = read_rows(row_file(source)) + read_rows(row_file(source, "awkward"))
        path = write_jsonl(folder / f"{dataset_id(source).partition('/')[2]}.jsonl", rows)
        overrides += [f"data.{name}.path=json", f"data.{name}.data_files={path}", f"data.{name}.split=train"]
        unset = ("name", "data_dir", "revision", "held_out_split")
        overrides += [f"data.{name}.{key}=null" for key in unset if getattr(source, key) is not None]
    if (config.trainer.fields.get("optim") or "").startswith("paged"):
        overrides.append("trainer.optim=adamw_torch")  # which pages to a GPU
    return overrides


def run_command(folder: Path, monkeypatch, capsys, overrides: list[str]) -> str:
    """What a command prints that succeeds."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["sft_recipes", f"hydra.run.dir={folder}", *overrides])
    GlobalHydra.instance().clear()
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, capsys.readouterr().err[-2000:]
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "tiny"][:: 1 if ALL_TESTS else 9])
def test_a_recipe_previews_and_trains_two_steps_on_rows_in_the_shape_of_its_data(name, tmp_path, monkeypatch, capsys):
    overrides = [f"+recipe={name}", "+debug=smoke", "model=tiny", "data.held_out=0"]
    overrides += ["trainer.max_steps=2", "trainer.logging_steps=1", "evaluate.rows=0"]
    overrides += ["smoke=false"]  # two steps are too few to see the loss fall
    overrides += ["trainer.check_memory=false", "evaluate.weight_change=false", "evaluate.raw_text=null"]  # for speed
    if composed_recipe(name).trainer.fields.get("load_best_model_at_end"):  # nothing is held out to choose by
        overrides += ["trainer.load_best_model_at_end=false", "trainer.metric_for_best_model=null"]
    overrides += ["data.max_length_policy=keep", *with_local_rows(composed_recipe(name), tmp_path)]
    shown = run_command(tmp_path, monkeypatch, capsys, [*overrides, "mode=preview"])
    assert all(source in shown for source in list(composed_recipe(name).sources)[:1])
    run_command(tmp_path, monkeypatch, capsys, overrides)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert metrics["steps"] == 2 and len(losses) == 2 and min(losses) > 0
    audit = json.loads((tmp_path / "supervision.json").read_text())["sources"]
    for source_name, source in composed_recipe(name).sources.items():
        unread = len(UNREADABLE.get(row_file(source).stem, {}))
        assert audit[source_name]["problems"].get("unusable", {"rows": 0})["rows"] == unread
