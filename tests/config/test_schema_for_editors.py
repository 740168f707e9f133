"""The JSON schema for editors takes every file of ours and finds a user's mistakes."""

import contextlib
import io
import json

import pytest
from jsonschema import Draft202012Validator
from omegaconf import OmegaConf

from sft_recipes.config.own_configs import STARTER
from sft_recipes.config.reference import main
from support.paths import ROOT


@pytest.fixture(scope="module")
def validator():
    """Checks a config by what the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([])
    schema = json.loads(printed.getvalue())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_every_file_of_ours_fits(validator):
    files = [*(ROOT / "recipes").glob("*/*.yaml"), *(ROOT / "conf").glob("*.yaml"), STARTER]
    wrong = {file.name: [error.message for error in validator.iter_errors(read(file))] for file in files}
    assert len(files) > 40 and not any(wrong.values()), wrong


@pytest.mark.parametrize("fields", [{"per_device_train_batch_size": "auto"}, {"activation_checkpointing": "auto"}])
def test_a_field_of_trl_s_that_takes_more_here_does_so_in_an_editor(fields, validator):
    assert not [error.message for error in validator.iter_errors({"trainer": fields})]


def read(file):
    """A file's keys and values as they stand, ${…} and ??? included."""
    return OmegaConf.to_container(OmegaConf.load(file))


@pytest.mark.parametrize(
    ("mistake", "path"),
    [
        ({"trainer": {"learning_ratee": 1}}, ["trainer"]),
        ({"trainer": {"learning_rate": "fast"}}, ["trainer", "learning_rate"]),
        ({"data": {"mine": {"share": 1.5}}}, ["data", "mine", "share"]),
        ({"data": {"mine": {"train_on": "answers"}}}, ["data", "mine", "train_on"]),
        ({"adapter": {"lora": {"rank": 8}}}, ["adapter", "lora"]),
        ({"mode": "training"}, ["mode"]),
        ({"modle": "tiny"}, []),
    ],
)
def test_a_mistake_is_found_where_it_stands(validator, mistake, path):
    assert [list(error.absolute_path) for error in validator.iter_errors(mistake)] == [path]
