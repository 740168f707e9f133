"""Options of trainer, adapters and model, one or two at a time: each trains, or is one line before the weights load.

Their names are SFTConfig's fields, PEFT's types and what TRL's own SFT tests combine, the values ours. The suite takes
those that are refused and a few that train, `make test-all` all of them.
"""

import shlex

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from sft_recipes import train as train_module
from sft_recipes.errors import ConfigError, DataError
from sft_recipes.training.setup import set_up_run
from support.configs import composed
from support.option_cases import REFUSED, TRAINS
from support.paths import ALL_TESTS
from support.stopped_runs import STEPS, write_rows

SHORT = ["trainer.max_steps=2", "trainer.save_strategy=no", "evaluate.rows=0", "trainer.use_cpu=true"]
BASE = dict(option.split("=", 1) for option in [*STEPS, *SHORT] if not option.startswith("adapter"))
KINDS = [kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
EITHER = [f"{start}adapter.type={kind}" for start in ("", "adapter=qlora ") for kind in KINDS]


@pytest.fixture(autouse=True)
def rows(tmp_path, monkeypatch):
    """A folder with rows.jsonl, where the run is."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)


def try_run(case: str, folder, monkeypatch) -> str | None:
    """The line with which these options are refused before the weights load, else None once they have trained and saved."""
    loaded, load = [], train_module.load_model
    monkeypatch.setattr(train_module, "load_model", lambda *rest: loaded.append(True) or load(*rest))
    options = shlex.split(case)
    given = {option.partition("=")[0] for option in options}
    rest = [f"{key}={value}" for key, value in BASE.items() if key not in given]
    try:
        setup = set_up_run(composed(*rest, *options), folder)
        trainer = train_module.start_trainer(setup)
        result = trainer.train()
    except (ConfigError, DataError) as error:
        assert not loaded, f"refused when the weights were loaded: {error}"
        assert "\n" not in str(error)
        return str(error)
    assert result.global_step > 0 and result.training_loss > 0
    trainer.save_model(str(folder / "model"))
    return None


@pytest.mark.parametrize("case", TRAINS.split("\n")[1:-1][:: 1 if ALL_TESTS else 12])
def test_options_that_work_train_and_save(case, tmp_path, monkeypatch):
    assert try_run(case, tmp_path, monkeypatch) is None


@pytest.mark.parametrize("case", REFUSED.split("\n")[1:-1])
def test_options_that_cannot_work_are_one_line_before_the_weights_load(case, tmp_path, monkeypatch):
    assert try_run(case, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", EITHER[:: 1 if ALL_TESTS else 9])
def test_every_type_of_adapter_trains_or_is_one_line_before_the_weights_load(case, tmp_path, monkeypatch):
    try_run(case, tmp_path, monkeypatch)
