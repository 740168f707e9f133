"""What a command is laid over: the demo, a recipe file, an own primary config; and how a run is repeated."""

import shlex
from pathlib import Path

import pytest
import yaml

from sft_recipes.config.hydra_plugin import config_folder

OWN_PRIMARY = "defaults:\n  - config\n  - override model: tiny\n  - override data: tiny\n  - _self_\nname: mine\n"


@pytest.fixture
def started(command, monkeypatch):
    """`started("+recipe=lima")` is the config with which the command would train; nothing is trained."""
    configs = []
    monkeypatch.setattr("sft_recipes.train.main", lambda config, folder: configs.append(config) or 0.0)

    def start(*arguments: str):
        code, _, said = command(*arguments)
        assert code == 0, said
        return configs.pop()

    return start


@pytest.fixture
def own_primary(tmp_path):
    """my/mine.yaml, a primary config of the user's."""
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "mine.yaml").write_text(OWN_PRIMARY)


def test_the_bare_command_runs_the_demo_and_a_chosen_model_does_not(started):
    assert started("trainer.max_steps=5").name == "tiny"
    assert started("+debug=smoke").trainer.fields["learning_rate"] == 2.5e-3
    other = started("model=tiny", "data=tiny")
    assert (other.name, other.adapter.type, other.trainer.fields["learning_rate"]) == ("sft", "none", 2e-5)


def test_an_own_primary_config_gets_nothing_of_the_demo(started, own_primary):
    config = started("-cd", "my", "-cn", "mine")
    assert (config.name, config.adapter.type, config.trainer.fields["learning_rate"]) == ("mine", "none", 2e-5)


def test_an_own_primary_config_may_name_the_group_recipe(started, tmp_path):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "mine.yaml").write_text("defaults:\n  - config\n  - recipe: lima\n  - _self_\n")
    assert started("-cd", "my", "-cn", "mine", "recipe=tiny").name == "tiny"


@pytest.fixture
def own_groups(tmp_path):
    """my/speed/fast.yaml, a group of the user's, and my/model/own model.yaml, a choice with a space."""
    for file, text in [
        ("speed/fast", "# @package trainer\nmax_steps: 3\n"),
        ("model/own model", "defaults: [tiny]\n"),
        ("recipe/mine", "# @package _global_\ndefaults: [/recipe/tiny]\n"),
    ]:
        (tmp_path / "my" / f"{file}.yaml").parent.mkdir(parents=True)
        (tmp_path / "my" / f"{file}.yaml").write_text(text)


@pytest.mark.parametrize(
    ("typed", "field", "value"),
    [
        (["model=tiny", "data=${oc.env:NOT_SET,tiny}", "trainer.max_steps=3"], "max_steps", 3),
        (["+recipe=tiny", "trainer={max_steps: 3}"], "max_steps", 3),
        (["+recipe=tiny", "hydra.searchpath=[my]", "+speed=fast"], "max_steps", 3),
        (["-cd", "my", "data=tiny", "model='own model'", "+speed=[fast]"], "max_steps", 3),
        (["-m", "-cd", "my", "+recipe=glob(m*)"], "learning_rate", 2.5e-3),
        (["-m", "+recipe=tiny", "trainer=choice({max_steps: 3})"], "max_steps", 3),
    ],
)
def test_what_hydra_reads_as_a_choice_or_as_a_mapping_is_not_refused_before_it(
    started, own_groups, typed, field, value
):
    assert started(*typed).trainer.fields[field] == value


def test_a_saved_config_is_run_from_its_own_folder(started, tmp_path):
    started("+recipe=tiny", "seed=7", "hydra.run.dir=first")
    again = started("-cp", "first/.hydra", "-cn", "config")
    assert again.seed == 7 and again.composed == started("+recipe=tiny", "seed=7").composed
    assert set(started("-cp", "first/.hydra", "-cn", "config", "+data=prose").sources) == {"tiny", "prose"}


def test_a_group_that_an_own_primary_config_does_not_have_keeps_hydras_hint(command, started):
    started("+recipe=tiny", "hydra.run.dir=first")
    line = "There is no data. To append to your default list use +data=prose\n"
    assert command("-cp", "first/.hydra", "-cn", "config", "data=prose") == (2, "", line)


def test_a_primary_config_without_ours_is_one_line(command, tmp_path):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "bare.yaml").write_text("name: bare\n")
    code, printed, _ = command("-cd", "my", "-cn", "bare")  # Hydra's own logging is on stdout
    assert code == 2 and printed.endswith(
        " - data is missing. Write data=…, or begin the file's defaults with - config.\n"
    )


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("--hydra-help", "== Configuration groups =="),
        ("--info defaults", "recipe/tiny"),
        ("--cfg job", "\nname: tiny\n"),
    ],
)
def test_what_hydra_shows_of_itself_is_shown(command, typed, text):
    code, printed, said = command(*typed.split())
    assert code == 0 and text in printed + said and "There is no" not in said


@pytest.mark.parametrize(
    ("typed", "again"),
    [
        ("", ""),
        ("seed=7", "seed=7"),
        ("+recipe=tiny hydra.run.dir=run seed=7", "+recipe=tiny seed=7 hydra.run.dir=run"),
        ("-cd my -cn mine hydra.job.name=x", "-cd {here}/my -cn mine hydra.job.name=x"),
        ("-cp my -cn mine", "-cp {here}/my -cn mine"),
        ("mine.yaml seed=7", "mine.yaml seed=7"),
        ("hydra/job_logging=none", "hydra/job_logging=none"),
    ],
)
def test_a_run_is_repeated_as_it_was_typed(started, own_primary, tmp_path, typed, again):
    (tmp_path / "mine.yaml").write_text("defaults:\n  - override /model: tiny\n  - override /data: tiny\n")
    config = started(*typed.split())
    assert shlex.split(config.command) == ["python", "-m", "sft_recipes", *again.format(here=tmp_path).split()]
    repeated = started(*shlex.split(config.command)[3:])
    assert repeated.composed == config.composed


def test_a_run_that_a_recipe_s_code_took_trust_for_is_repeated_with_it(started, command, tmp_path):
    (tmp_path / "mine.yaml").write_text("hydra: {job: {env_set: {MINE: '1'}}}")
    config = started("mine.yaml", "model=tiny", "data=tiny", "--trust-recipe")
    assert config.command == "python -m sft_recipes --trust-recipe mine.yaml model=tiny data=tiny"
    assert started("model=tiny", "data=tiny", "--trust-recipe").command == "python -m sft_recipes model=tiny data=tiny"


def test_a_job_of_a_sweep_is_repeated_alone(command, own_primary, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr("sft_recipes.train.main", lambda config, folder: commands.append(config.command) or 0.0)
    launcher = ["hydra/launcher=basic", "hydra.sweep.dir=sweep", "hydra.sweeper.max_batch_size=1"]
    command("-m", "-cd", "my", "-cn", "mine", "seed=1,2", "hydra.job.name=x", *launcher)
    start = f"python -m sft_recipes -cd {tmp_path}/my -cn mine"
    assert commands == [f"{start} seed=1 hydra.job.name=x", f"{start} seed=2 hydra.job.name=x"]


def test_a_recipe_file_anywhere_is_a_recipe_without_the_package_line(started, tmp_path):
    (tmp_path / "some").mkdir()
    text = "defaults:\n  - lima\n  - override /model: tiny\nname: mine\ntrainer:\n  weight_decay: 0.3\n"
    (tmp_path / "some" / "mine.yaml").write_text(text)
    config = started("some/mine.yaml", "trainer.learning_rate=3e-5")
    assert (config.name, *config.sources) == ("mine", "lima")
    fields = config.trainer.fields
    assert (fields["weight_decay"], fields["learning_rate"], fields["num_train_epochs"]) == (0.3, 3e-5, 15)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("lima.yaml", "name: x\n", f"recipe=lima is in two files, {config_folder('recipes')}/recipe/lima.yaml and lima.yaml. Rename yours."),
        ("list.yaml", "- 1\n", "list.yaml should hold a mapping, as `python -m sft_recipes init` writes one."),
        ("typo.yaml", "trainr: {}\ndefaults:\n  - override /model: tiny\n  - override /data: tiny\n",
         "trainr is not a field of the config. Did you mean trainer?"),
        ("broken.yaml", "trainer: {a\n", "{here}/broken.yaml, line 2: expected ',' or '}}', but got '<stream end>'."),
    ],
)  # fmt: skip
def test_a_recipe_file_that_cannot_be_used_is_one_line(command, tmp_path, name, text, line):
    (tmp_path / name).write_text(text)
    code, printed, said = command(name)
    assert (code, printed, said) == (2, "", line.format(here=tmp_path) + "\n")


def test_a_recipe_file_that_is_not_there_is_one_line(command):
    line = "There is no file mine.yaml. `python -m sft_recipes init mine.yaml` writes one.\n"
    assert command("mine.yaml") == (2, "", line)


@pytest.mark.parametrize("typed", ["mine", "mine.ymal", "mien.yaml", "./mine.yml", "other/../mine.yml"])
def test_a_recipe_file_of_another_name_is_named(command, tmp_path, typed):
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "other").mkdir()
    meant = f"{'other/../' if 'other' in typed else ''}mine.yaml"
    assert command(typed) == (2, "", f"There is no file {typed}. Did you mean {meant}?\n")


def test_init_writes_a_file_that_runs_and_writes_over_none(command, started, tmp_path):
    assert command("init") == (0, "my.yaml is written. Change it, then run: python -m sft_recipes my.yaml\n", "")
    text = (tmp_path / "my.yaml").read_text()
    assert all("#" in line for line in text.splitlines() if line and line[0] != " " and line != "data:")
    config = started("my.yaml", "model=tiny")
    assert config.sources["file"].data_files == "my.jsonl" and config.adapter.type == "lora"
    line = "my.yaml exists already. Write python -m sft_recipes init NAME.yaml.\n"
    assert command("init") == (2, "", line) and (tmp_path / "my.yaml").read_text() == text
    assert command("init", "other.yaml")[0] == 0 and "sft_recipes other.yaml" in Path("other.yaml").read_text()
    assert command("init", "no/such.yaml") == (2, "", "no/such.yaml cannot be written: No such file or directory.\n")


@pytest.mark.parametrize("name", ["größe 1.yaml", "1e-5.yaml", "null.yaml"])
def test_a_recipe_file_may_have_any_name(command, started, name):
    code, printed, _ = command("init", name)
    assert code == 0 and shlex.split(printed)[-1] == name and printed.endswith(f" {shlex.quote(name)}\n")
    assert started(name, "model=tiny").adapter.type == "lora"


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("hydra.job.env_set.FOO=1",
         "There is no hydra.job.env_set.FOO. To append to your config use +hydra.job.env_set.FOO=1"),
        ("trainer.lr_scheduler_kwargs={'min_lr':0.1}",
         "trainer.lr_scheduler_kwargs={'min_lr':0.1} cannot be read: keys of a mapping have no quotes. "
         "Write 'trainer.lr_scheduler_kwargs={min_lr:0.1}'"),
        ("preview.row=3", "preview.row is not a field of preview. Did you mean rows?"),
    ],
)  # fmt: skip
def test_what_hydra_would_say_better_is_kept(command, typed, line):
    assert command("+recipe=tiny", typed) == (2, "", f"{line}\n")


def test_verbose_is_for_what_we_say_and_not_for_fonts(command, monkeypatch):
    import logging

    def say(*_) -> float:
        for name in ("matplotlib.font_manager", "PIL.PngImagePlugin", "sft_recipes.train"):
            logging.getLogger(name).debug("from %s", name)
        return 0.0

    monkeypatch.setattr("sft_recipes.train.main", say)
    said = command("+recipe=tiny", "hydra.verbose=true")[2]
    logging.getLogger().setLevel(logging.WARNING)
    assert [line for line in said.splitlines() if line.startswith("from ")] == ["from sft_recipes.train"]


def test_a_finished_run_ends_with_where_its_results_are_and_what_to_type_next(command, monkeypatch):
    def train(config, folder: Path) -> float:
        (folder / "model").mkdir()
        (folder / "model" / "adapter_config.json").touch()
        (folder / "report.html").touch()
        return 0.0

    monkeypatch.setattr("sft_recipes.train.main", train)
    assert command("hydra.run.dir=a/run")[1].splitlines() == [
        "",
        "Report:   a/run/report.html",
        "Model:    a/run/model",
        "Chat:     python -m sft_recipes chat a/run",
        "Evaluate: python -m sft_recipes mode=evaluate evaluate.run=a/run",
        "Merge:    python -m sft_recipes merge a/run --out run-merged",
    ]


def test_overrides_are_filed_as_they_were_typed(started, tmp_path):
    started("seed=7", "hydra.run.dir=run")
    assert yaml.safe_load((tmp_path / "run/.hydra/overrides.yaml").read_text()) == ["seed=7"]
