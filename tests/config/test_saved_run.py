"""A finished run's own config as the start of another command, and from Python."""

import pytest

from sft_recipes import compose
from support.commands import SHORT_ROWS_RUN
from support.configs import error_of


@pytest.fixture
def own_run(command, monkeypatch):
    """The folder `run` of a run on rows.jsonl, as Hydra leaves it, and `evaluated`: the configs of mode=evaluate."""
    configs = []
    monkeypatch.setattr("sft_recipes.train.main", lambda config, folder: 0.0)
    monkeypatch.setattr("sft_recipes.evaluate.main", lambda config, folder: configs.append(config) or 0.0)
    rest = ["formatter=alpaca", "name=mine", "trainer.weight_decay=0.3", "data.held_out=2", "overwrite=true"]
    assert command(*SHORT_ROWS_RUN, *rest, "hydra.run.dir=run")[0] == 0

    def evaluate(*typed: str):
        code, _, said = command("mode=evaluate", *typed)
        assert code == 0, said
        return configs.pop()

    return evaluate


def test_an_evaluation_without_a_recipe_starts_from_the_runs_own_config(own_run):
    config = own_run("evaluate.run=run")
    assert {name: source.data_files for name, source in config.sources.items()} == {"file": "rows.jsonl"}
    assert (config.name, config.mode, config.evaluate.run, config.data.held_out) == ("mine", "evaluate", "run", 2)
    assert config.trainer.fields["weight_decay"] == 0.3 and config.formatter == {"name": "alpaca"}
    assert not config.overwrite  # that was for the run's own folder


def test_what_is_typed_wins_over_the_runs_config(own_run):
    config = own_run("evaluate.run=run", "data=[tiny,dolly]", "formatter=auto", "evaluate.rows=5", "adapter=lora")
    assert set(config.sources) == {"tiny", "prose", "dolly"} and config.data.held_out == 2
    assert (config.evaluate.rows, config.adapter.type, config.trainer.fields["learning_rate"]) == (5, "lora", 2e-4)
    assert own_run("evaluate.run=run", "data.file.data_files=other.jsonl").sources["file"].data_files == "other.jsonl"


def test_the_folder_of_the_runs_model_names_the_run(own_run, tmp_path):
    (tmp_path / "run" / "model").mkdir()
    assert own_run("evaluate.run=run/model").name == "mine"


def test_a_chosen_recipe_is_not_replaced_by_the_runs_config(own_run):
    assert own_run("evaluate.run=run", "+recipe=tiny").name == "tiny"


def test_keys_that_an_older_run_did_not_have_can_be_set(own_run, tmp_path):
    file = tmp_path / "run" / ".hydra" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.startswith(("overwrite:", "callbacks:"))))
    assert own_run("evaluate.run=run", "overwrite=true").overwrite


def test_a_folder_without_a_config_is_one_line_with_what_to_write(own_run, command):
    line = "nosuch is no folder here. Name the folder of a run."
    assert command("mode=evaluate", "evaluate.run=nosuch") == (2, "", f"{line}\n")
    assert error_of(lambda: compose(run="nosuch")) == line
    assert own_run("evaluate.run=nosuch", "model=tiny", "data=tiny").name == "sft"  # a model's folder is no run


def test_a_sweep_over_runs_is_refused_since_each_has_a_config_of_its_own(own_run, command):
    line = "evaluate.run is one run, whose own config is used. Write a command for each, without -m.\n"
    assert command("-m", "mode=evaluate", "evaluate.run=run,other") == (2, "", line)


def test_a_runs_folder_may_have_any_name(own_run, tmp_path):
    (tmp_path / "run").rename(tmp_path / 'it\'s ü, "mine"')
    assert compose(run='it\'s ü, "mine"').evaluate.run == 'it\'s ü, "mine"'


def test_from_python_a_config_starts_from_a_run_too(own_run):
    config = compose(None, "trainer.weight_decay=0.1", run="run", data={"mine": {"data_files": "my.jsonl"}})
    assert list(config.sources) == ["mine"] and config.data.held_out == 2
    assert (config.evaluate.run, config.trainer.fields["weight_decay"], config.name) == ("run", 0.1, "mine")
    assert set(compose(None, "data=[tiny]", run="run").sources) == {"tiny", "prose"}


def test_from_python_what_overrides_say_of_a_source_of_the_same_name_stays():
    config = compose("tiny", "data=file", "data.file.on_error=drop", data={"file": {"data_files": "my.jsonl"}})
    assert {name: (each.data_files, each.on_error) for name, each in config.sources.items()} == {
        "file": ("my.jsonl", "drop")
    }


@pytest.mark.parametrize(
    ("group", "value", "line"),
    [
        ("data", [1], "data should be a mapping, not [1]."),
        ("trainer", None, "trainer should be a mapping, not null."),
        ("hydra", {"x": 1}, "hydra is not a field of the config. Choices: +debug, "),
    ],
)
def test_from_python_values_that_no_config_has_are_refused(group, value, line):
    assert error_of(lambda: compose("lima", **{group: value})).startswith(line)
