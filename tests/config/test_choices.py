"""A choice that the recipe overrides is said, and a dataset that was not chosen is not added in silence."""

import logging

import pytest

from sft_recipes import compose
from support.configs import error_of


@pytest.mark.parametrize(
    ("recipe", "overrides", "lines"),
    [
        ("lima", ["adapter=lora"],
         ["adapter=lora: the recipe's own trainer.learning_rate=1e-05 holds, not 0.0002. To change it, write trainer.learning_rate=0.0002."]),
        ("lima", ["trainer=small"],
         ["trainer=small: the recipe's own trainer.per_device_train_batch_size=4 holds, not 8. To change it, write trainer.per_device_train_batch_size=8.",
          "trainer=small: the recipe's own trainer.effective_batch_size=64 holds, not 16. To change it, write trainer.effective_batch_size=16."]),
        ("lima", ["adapter=lora", "trainer.learning_rate=1e-4"], []),
        ("lima", ["adapter=none", "data=lima"], []),
        ("lima", [], []),
        (None, ["model=tiny", "data=tiny", "adapter=lora", "trainer=small"], []),
    ],
)  # fmt: skip
def test_the_keys_of_a_choice_that_the_recipe_overrides_are_said(caplog, recipe, overrides, lines):
    with caplog.at_level(logging.WARNING):
        compose(recipe, *overrides)
    assert [record.getMessage() for record in caplog.records if "holds" in record.getMessage()] == lines


def test_the_config_that_is_shown_says_it_too(command, caplog):
    code, printed, _ = command("+recipe=lima", "adapter=lora", "--cfg", "job")
    assert code == 0 and "learning_rate: 1.0e-05" in printed
    assert caplog.messages == [
        "adapter=lora: the recipe's own trainer.learning_rate=1e-05 holds, not 0.0002. "
        "To change it, write trainer.learning_rate=0.0002."
    ]


def test_a_config_with_a_key_that_there_is_not_is_not_shown(command):
    code, printed, said = command("+recip=lima", "--cfg", "job")
    assert (code, printed, said) == (2, "", "recip is not a field of the config. Did you mean +recipe?\n")


def test_each_job_of_a_sweep_over_adapters_says_it(command, monkeypatch, tmp_path):
    monkeypatch.setattr("sft_recipes.train.main", lambda *_: 0.0)
    command("-m", "+recipe=tiny", "adapter=none,qlora", "hydra.sweep.dir=sweep")
    logs = [(tmp_path / f"sweep/{job}/sft_recipes.log").read_text() for job in (0, 1)]
    assert ["trainer.learning_rate=0.0025 holds, not 0.0002" in log for log in logs] == [False, True]


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("lima", "data.file would be added to data=lima. Write data=file to train on it alone, or 'data=[lima,file]' to train on both."),
        ("tiny", "data.file would be added to data=tiny. Write data=file to train on it alone, or 'data=[tiny,file]' to train on both."),
    ],
)  # fmt: skip
def test_a_file_without_its_choice_is_refused_with_what_to_write(recipe, line):
    assert error_of(compose, recipe, "data.file.data_files=my.jsonl") == line


def test_two_choices_that_bring_one_source_are_refused():
    line = "data=tiny and data=prose both bring a source called prose. Choose one of them."
    assert error_of(compose, "tiny", "data=[tiny,prose]") == line


def test_a_choice_of_ones_own_may_build_on_one_of_ours(command, tmp_path):
    (tmp_path / "my/data").mkdir(parents=True)
    (tmp_path / "my/data/mine.yaml").write_text("defaults: [dolly, _self_]\ndolly: {split: 'train[:50]'}\n")
    code, shown, _ = command("-cd", "my", "data=mine", "--cfg", "job", "-p", "data.dolly")
    assert code == 0 and "split: train[:50]" in shown


def test_sources_that_a_choice_or_a_file_names_can_be_changed(tmp_path):
    assert list(compose("lima", "data=file", "data.file.data_files=my.jsonl").sources) == ["file"]
    assert set(compose("lima", "data=[lima,file]", "data.file.data_files=my.jsonl").sources) == {"lima", "file"}
    assert compose("tiny", "data.prose.share=0.3").sources["prose"].share == 0.3
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults:\n  - override /model: tiny\n  - override /data: [dolly]\ndata: {file: {data_files: a.jsonl}}\n"
    )
    assert compose(str(file), "data.file.data_files=b.jsonl").sources["file"].data_files == "b.jsonl"


def test_a_source_of_ones_own_name_is_added_and_said(caplog):
    with caplog.at_level(logging.INFO):
        assert set(compose("lima", "data.mine.data_files=my.jsonl").sources) == {"lima", "mine"}
    assert "data.mine is trained on beside data=lima." in caplog.messages


def test_python_names_a_choice_that_there_is_not_as_the_command_does():
    assert error_of(compose, "limaa") == "There is no recipe=limaa. Did you mean lima?"
