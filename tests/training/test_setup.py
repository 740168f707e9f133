"""What is settled before weights are loaded: the day that a template writes, and that the model has positions for every row."""

import json
from dataclasses import replace
from datetime import date

import pytest

from sft_recipes.config.options import ModelOptions
from sft_recipes.errors import ConfigError
from sft_recipes.training.setup import fix_template_date, set_up_run
from support.commands import SHORT_ROWS_RUN
from support.configs import composed, error_of
from support.rows import write_jsonl


def day_of(folder, *arguments: str, resumed: bool = False) -> str:
    config = composed("model=tiny", "data=tiny", *arguments)
    fields = config.trainer.fields | ({"resume_from_checkpoint": True} if resumed else {})
    return fix_template_date(
        replace(config, trainer=replace(config.trainer, fields=fields)), folder
    ).model.template_date


def test_a_run_writes_the_day_it_starts_or_the_one_that_is_chosen(tmp_path):
    (tmp_path / "supervision.json").write_text(json.dumps({"template_date": "2025-12-24"}))  # of a run written over
    assert day_of(tmp_path) == f"{date.today()}"
    assert day_of(tmp_path, "model.template_date=2026-01-02") == "2026-01-02"


def test_a_run_that_goes_on_or_is_evaluated_writes_the_day_of_its_start(tmp_path):
    (tmp_path / "supervision.json").write_text(json.dumps({"template_date": "2025-12-24"}))
    assert day_of(tmp_path, resumed=True) == "2025-12-24"
    assert day_of(tmp_path / "other", f"evaluate.run={tmp_path}") == "2025-12-24"


def test_a_day_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="model.template_date should be a day like 2026-11-26, not 3 Nov"):
        ModelOptions("x", template_date="3 Nov")


def test_a_day_for_a_template_that_writes_none_is_said_to_have_no_effect(tmp_path, caplog):
    set_up_run(composed("+recipe=tiny", "model.template_date=2026-01-02"), tmp_path)
    assert "model.template_date has no effect: the chat template does not write today's date." in caplog.text


def test_a_row_longer_than_the_model_s_positions_is_named_before_weights_are_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"text": " ".join(["long"] * 3000)}  # of one token each or more; the tiny model has 2,048 positions
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "Short."}, row])
    config = composed(*SHORT_ROWS_RUN, "model.chat_template=chatml", "trainer.max_length=null")
    line = error_of(set_up_run, config, tmp_path / "run")
    assert line.startswith("The longest row in tokens is ") and ", beyond the 2048 positions of " in line
    assert "Write trainer.max_length=2048 or less, or model.max_position_embeddings=" in line
