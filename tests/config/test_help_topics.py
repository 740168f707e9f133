"""`--help trainer` lists the fields of the library's own classes, and --help the verbs."""

import re

import pytest
from peft import LoraConfig
from trl import SFTConfig

from sft_recipes.config.command_line import VERBS


def listed(printed: str) -> dict[str, str]:
    return dict(line.strip().split(" = ", 1) for line in printed.splitlines() if " = " in line and line[:4].strip())


def test_the_trainers_fields_are_trls_with_the_defaults_that_hold_here(command):
    code, printed, _ = command("--help", "trainer")
    fields = listed(printed)
    assert code == 0 and SFTConfig.max_grad_norm == 1.0 and fields["trainer.max_grad_norm"] == "1.0"
    assert fields["trainer.learning_rate"] == "2e-05" and fields["trainer.effective_batch_size"] == "null"
    assert "trainer.output_dir" not in fields  # not used here
    assert "      refuse a run that will not fit" in printed.splitlines()  # of ours, from the comment beside it


def test_loras_fields_are_pefts_with_the_defaults_of_adapter_lora(command):
    fields = listed(command("--help", "lora")[1])
    assert LoraConfig().r == 8 and (fields["adapter.lora.r"], fields["adapter.lora.lora_alpha"]) == ("16", "32")
    assert fields["adapter.lora.use_dora"] == "false"


@pytest.mark.parametrize(
    "topic",
    ["model", "data", "source", "data_checks", "adapter", "quantization", "evaluate", "judge", "generate", "endpoint"],
)
def test_every_topic_lists_its_fields(command, topic):
    code, printed, said = command("--help", topic)
    assert (code, said) == (0, "") and len(listed(printed)) >= 3


def test_a_default_that_another_key_gives_is_shown_with_the_whole_name_of_that_key(command):
    assert "\n  evaluate.batch_size = ${trainer.per_device_eval_batch_size}\n" in command("--help", "evaluate")[1]


def test_a_topic_that_is_not_there_is_one_line(command):
    assert command("--help", "trainr") == (2, "", "--help trainr: there is no such topic. Did you mean trainer?\n")


def test_help_is_folded_at_the_terminals_width(command, monkeypatch):
    for columns in (60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        choices = command("--help")[1].partition("  adapter=")[2].partition("Keys:")[0].splitlines()
        notes = [line for line in command("--help", "trainer")[1].splitlines() if line.startswith(" " * 6)]
        for lines in (choices, notes):
            assert columns - 30 < max(map(len, lines)) <= columns


def test_help_names_every_verb_and_every_verb_has_a_help(command):
    printed = command("--help")[1]
    for verb in VERBS:
        assert verb in re.findall(r"\w+", printed)
        assert (
            f"usage: python -m sft_recipes{' ' if verb in ('init', 'schema') else '.'}{verb}"
            in command(verb, "--help")[1]
        )
