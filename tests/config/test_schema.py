"""Every file of conf/ and recipes/, found on disk, and how values from YAML are checked."""

import inspect
import re
from typing import Literal

import pytest
from omegaconf import OmegaConf
from peft import LoraConfig
from transformers import BitsAndBytesConfig, EarlyStoppingCallback
from trl import SFTConfig

from sft_recipes.config.compose import compose
from sft_recipes.config.endpoint_options import GenerateOptions
from sft_recipes.config.options import DataOptions, EvaluateOptions, MixOptions, ModelOptions, Source, TrainerOptions
from sft_recipes.config.renamed_options import RENAMED_OPTIONS, UNSUPPORTED_OPTIONS
from sft_recipes.config.validation import call_validated, matches_type, validate_kwargs
from sft_recipes.data.formatters import FORMATTERS
from sft_recipes.data.sources import find_formatter
from sft_recipes.errors import did_you_mean
from sft_recipes.modeling.adapters import build_peft_config, build_quantization_config
from support.configs import composed, error_of
from support.paths import ROOT

OPTIONS = [f"{path.parent.name}={path.stem}" for path in sorted(ROOT.glob("conf/*/*.yaml"))]
ADDITIONS = [f"+{path.parent.name}={path.stem}" for path in sorted(ROOT.glob("recipes/*/*.yaml"))]
RECIPES = sorted(path.stem for path in ROOT.glob("recipes/recipe/*.yaml"))
FILE = ["data=file", "data.file.data_files=rows.jsonl"]
NEEDS = {"model=local": ["model.id=a/b"], "data=file": FILE[1:]}
NEEDS |= {choice: FILE for choice in OPTIONS if choice.startswith("formatter=")}


def test_every_option_and_recipe_on_disk_was_found():
    assert {"model=tiny", "data=file", "adapter=qlora", "trainer=default", "formatter=auto"} <= set(OPTIONS)
    assert {"+recipe=tiny", "+recipe=lima", "+sweep=lr_epochs", "+debug=smoke"} <= set(ADDITIONS)


@pytest.mark.parametrize("choice", OPTIONS + ADDITIONS)
def test_it_composes_and_every_class_accepts_what_it_says(choice):
    if choice == "+where=slurm":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    base = [] if choice.startswith("+recipe") else ["+recipe=tiny"]
    config = composed(*base, choice, *NEEDS.get(choice, []))
    validate_kwargs(SFTConfig, config.trainer.fields, "trainer")
    assert (build_peft_config(config.adapter) is None) == (config.adapter.type == "none")
    assert (build_quantization_config(config.adapter) is None) == (config.adapter.quantization is None)
    for name, source in config.sources.items():
        find_formatter(name, source, {"name": "alpaca"}, [])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_name_of_its_file_and_opens_with_its_command(name):
    text = (ROOT / "recipes" / "recipe" / f"{name}.yaml").read_text(encoding="utf-8")
    comments = text.partition("\ndefaults:")[0]
    assert composed(f"+recipe={name}").name == name
    assert comments.startswith("# @package _global_\n# ")
    assert f"# python -m sft_recipes{'' if name == 'tiny' else f' +recipe={name}'}" in comments.splitlines()


@pytest.mark.parametrize("choice", [choice for choice in OPTIONS if choice.startswith(("model=", "data="))])
def test_a_model_or_a_dataset_is_a_name_of_the_hub_or_ships_with_the_package(choice):
    config = composed("+recipe=tiny", choice, *NEEDS.get(choice, []))
    for source in config.sources.values():
        assert source.path in (None, "json") or re.fullmatch(r"[\w-]+/[\w.-]+", source.path)
    ours = config.model.id == str(ROOT / "sft_recipes" / "tiny" / "model")
    assert ours or re.fullmatch(r"[\w-]+/[\w.-]+", config.model.id)


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("conf/formatter/*.yaml")))
def test_a_formatter_option_names_itself_and_there_is_one_for_each_formatter(name):
    assert OmegaConf.load(ROOT / "conf" / "formatter" / f"{name}.yaml").name == name
    assert name == "auto" or name in FORMATTERS
    assert all(f"formatter={formatter}" in OPTIONS for formatter in FORMATTERS)


def test_a_mixture_is_a_list_of_sources_with_shares():
    config = composed("+recipe=tiny", "data=[lima,dolly]", "data.dolly.share=0.3")
    assert list(config.sources) == ["lima", "dolly"]
    assert config.sources["dolly"].share == 0.3


def test_a_field_of_a_class_needs_no_plus():
    config = composed("+recipe=tiny", "trainer.weight_decay=0.1", "adapter.lora.use_rslora=true", "model.dtype=float32")
    assert config.trainer.fields["weight_decay"] == 0.1
    assert config.adapter.settings["use_rslora"] is True
    assert config.model.dtype == "float32"


# What is written instead of a retired name is checked against the signatures of today.
PLACES = {
    "trainer": {
        name
        for part in (SFTConfig, EarlyStoppingCallback, TrainerOptions)
        for name in inspect.signature(part).parameters
    },
    "model": set(inspect.signature(ModelOptions).parameters),
    "adapter.lora": set(inspect.signature(LoraConfig).parameters),
    "data": set(inspect.signature(DataOptions).parameters),
    "evaluate": set(inspect.signature(EvaluateOptions).parameters),
    "mix": set(inspect.signature(MixOptions).parameters),
    "data.NAME": set(inspect.signature(Source).parameters),
    "generate": set(inspect.signature(GenerateOptions).parameters),
}


@pytest.mark.parametrize("name", RENAMED_OPTIONS)
def test_what_is_written_instead_of_a_retired_name_exists(name):
    instead = re.split(r"[ =]", RENAMED_OPTIONS[name])[0]
    place, _, field = instead.rpartition(".")
    assert instead in ("hydra.run.dir", "nothing:", "adapter", "data_checks", "python") or field in PLACES[place]


def test_a_retired_name_of_the_trainer_is_no_field_of_it_today():
    fields = set(inspect.signature(SFTConfig).parameters)
    moved = {name for name in set(RENAMED_OPTIONS) & fields if RENAMED_OPTIONS[name] == f"trainer.{name}"}
    kept = {"output_dir", "gradient_checkpointing"}  # fields still: the run sets the one, the other has a successor
    assert set(RENAMED_OPTIONS) & fields == moved | kept


def test_what_the_run_sets_itself_is_a_field_of_the_trainer_and_no_yaml_sets_it():
    assert set(UNSUPPORTED_OPTIONS) <= set(inspect.signature(SFTConfig).parameters)


def alpaca_like(row: dict, /, output: str = "output", turns: int = 1, strict: bool = False, share: float = 1.0,
                length: int | None = None, policy: Literal["drop", "keep"] = "drop", names: list[str] | None = None,
                more: dict | None = None):  # fmt: skip
    return (row, output, turns, strict, share, length, policy, names, more)


def needs_id(id: str, revision: str | None = None) -> str:
    return f"{id}@{revision}"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"strict": "no"}, "data.x.strict should be true or false, not 'no'."),
        ({"strict": 1}, "data.x.strict should be true or false, not 1."),
        ({"turns": True}, "data.x.turns should be a whole number, not true."),
        ({"turns": 1.5}, "data.x.turns should be a whole number, not 1.5."),
        ({"share": "1e-5x"}, "data.x.share should be a number, not '1e-5x'."),
        ({"share": None}, "data.x.share should be a number, not null."),
        ({"length": "long"}, "data.x.length should be a whole number or null, not 'long'."),
        ({"output": 3}, "data.x.output should be text, not 3."),
        ({"names": "a"}, "data.x.names should be a list or null, not 'a'."),
        ({"names": ["a", 1]}, "data.x.names[1] should be text, not 1."),
        ({"more": [1]}, "data.x.more should be a mapping or null, not [1]."),
        ({"policy": "kep"}, "data.x.policy cannot be 'kep'. Did you mean keep?"),
        ({"policy": False}, 'data.x.policy should be "drop", "keep", not false.'),
        ({"outputt": "a"}, "data.x.outputt is not a field of alpaca_like. Did you mean output?"),
        ({"lr": 1}, "data.x.lr is not a field of alpaca_like. Write trainer.learning_rate."),
        (
            {"row": 1},
            "data.x.row is not a field of alpaca_like. "
            "Choices: length, more, names, output, policy, share, strict, turns.",
        ),
    ],
)
def test_check_names_the_place_what_was_found_and_what_to_write(values, line):
    assert error_of(validate_kwargs, alpaca_like, values, "data.x") == line


def test_a_filter_that_is_no_mapping_is_named():
    line = "curation.filters.refusal should be a mapping or null, not 3."
    assert error_of(compose, "tiny", "curation.filters.refusal=3") == line


def test_check_accepts_what_the_signature_accepts():
    validate_kwargs(
        alpaca_like, {"turns": 2, "share": 1, "length": None, "policy": "keep", "names": ["a"], "more": {}}, "data.x"
    )


def test_a_missing_value_is_named():
    assert error_of(validate_kwargs, needs_id, {}, "model") == "model.id is missing. Write model.id=…"


def test_at_the_root_of_the_config_a_key_stands_alone():
    assert error_of(validate_kwargs, needs_id, {"id": 3}, "") == "id should be text, not 3."


def test_call_gives_back_what_the_function_gives_back():
    assert call_validated(needs_id, {"id": "a", "revision": "b"}, "model") == "a@b"


def test_what_a_class_itself_refuses_becomes_one_line():
    line = error_of(call_validated, SFTConfig, {"output_dir": "x", "logging_steps": 0, "use_cpu": True}, "trainer")
    assert line == "trainer: logging strategy IntervalStrategy.STEPS requires non-zero --logging_steps"


@pytest.mark.parametrize(
    ("target", "values", "line"),
    [
        (SFTConfig, {"learning_ratee": 1}, "x.learning_ratee is not a field of SFTConfig. Did you mean learning_rate?"),
        (SFTConfig, {"lr_scheduler_type": "cosin"}, "x.lr_scheduler_type cannot be 'cosin'. Did you mean cosine?"),
        (SFTConfig, {"eval_strategy": False}, 'x.eval_strategy should be "no", "steps", "epoch", not false.'),
        (SFTConfig, {"report_to": 3}, "x.report_to should be null or text or a list, not 3."),
        (LoraConfig, {"bias": "some"}, "x.bias cannot be 'some'. Choices: all, lora_only, none."),
        (LoraConfig, {"rr": 8}, "x.rr is not a field of LoraConfig. Did you mean r?"),
        (BitsAndBytesConfig, {"load_in_4bits": True},
         "x.load_in_4bits is not a field of BitsAndBytesConfig. Did you mean load_in_4bit?"),
        (ModelOptions, {"id": "a", "idd": 1}, "x.idd is not a field of x. Did you mean id?"),
    ],
)  # fmt: skip
def test_the_classes_of_trl_peft_and_transformers_are_checked_by_their_own_hints(target, values, line):
    assert error_of(validate_kwargs, target, values, "x") == line


def test_a_pattern_among_literals_takes_any_text():
    validate_kwargs(LoraConfig, {"init_lora_weights": "pissa_niter_4"}, "adapter.lora")


def test_a_hint_that_names_what_is_not_imported_is_passed_over():
    def formatter(row, column: str = "a"): ...

    formatter.__annotations__["row"] = "Nowhere"
    validate_kwargs(formatter, {"row": {}, "column": 3}, "formatter")


@pytest.mark.parametrize(
    ("value", "hint", "fitting"),
    [
        ("no", bool, False),
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (None, int | None, True),
        ("auto", int | str, True),
        (["a"], list[str], True),
        ([1], list[str], False),
        ({"a": [None]}, dict[str, list[int]], False),
        ({}, dict | str | None, True),
        ("a", dict, False),
    ],
)
def test_fits_tells_yaml_types_apart(value, hint, fitting):
    assert matches_type(value, hint) is fitting


def test_did_you_mean_offers_the_one_close_name_or_the_few_there_are():
    assert did_you_mean("learning_ratee", ["learning_rate", "padding_free"]) == " Did you mean learning_rate?"
    assert did_you_mean("lim", ["lima", "alpaca"]) == " Did you mean lima?"
    assert did_you_mean("nosuch", ["lima", "alpaca"]) == " Choices: alpaca, lima."
    assert did_you_mean("nosuch", [str(number) for number in range(70)]) == ""
    assert did_you_mean("nosuch", []) == ""


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trainer.num_train_epochs=0", "trainer.num_train_epochs should be above 0, not 0."),
        ("trainer.num_train_epochs=-1", "trainer.num_train_epochs should be above 0, not -1."),
        ("trainer.weight_decay=-1", "trainer.weight_decay should be at least 0, not -1."),
        ("trainer.learning_rate=nan", "trainer.learning_rate should be above 0, not nan."),
        ("data.held_out=-1", "data.held_out should be at least 0, not -1."),
        ("data.tiny.share=1.5", "data.tiny.share should be above 0 and at most 1, not 1.5."),
        ("adapter.lora.lora_dropout=1", "adapter.lora.lora_dropout should be at least 0 and below 1, not 1."),
        ("adapter.lora.lora_alpha=0", "adapter.lora.lora_alpha should be above 0, not 0."),
        ("adapter.loraplus_lr_ratio=0", "adapter.loraplus_lr_ratio should be above 0, not 0."),
        ("evaluate.top_p=0", "evaluate.top_p should be above 0 and at most 1, not 0."),
        ("evaluate.judge={url:'http://x/v1',model:m,rows:0}", "evaluate.judge.rows should be at least 1, not 0."),
        ("seed=-1", "seed should be at least 0 and at most 4294967295, not -1."),
    ],
)
def test_a_number_out_of_its_range_is_refused(override, line):
    assert error_of(composed, "+recipe=tiny", override) == line


def test_a_share_of_exactly_one_is_not_a_row_count():
    line = error_of(composed, "+recipe=tiny", "data.held_out=1.0")
    assert line == "data.held_out=1.0 is neither a share below 1 nor a whole number of rows. Write 1 for one row."


def test_a_source_holds_out_rows_of_its_own_number_or_those_of_all_sources():
    config = composed("+recipe=tiny", "data=[file,tiny]", "data.file.data_files=rows.jsonl")
    assert {name: source.held_out for name, source in config.sources.items()} == {
        "file": 0.02,
        "tiny": 0.02,
        "prose": 0,
    }
    line = error_of(composed, "+recipe=tiny", "data.prose.held_out=1.0")
    assert line.startswith("data.prose.held_out=1.0 is neither")


def test_own_rows_take_the_place_of_a_recipe_s_dataset():
    config = composed("+recipe=lima", "data=file", "data.file.data_files=rows.jsonl")
    assert list(config.sources) == ["file"] and config.trainer.fields["learning_rate"] == 1e-5
