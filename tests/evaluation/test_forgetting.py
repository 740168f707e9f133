"""What is said of a model that forgot, and the prose that it is measured on."""

import pytest

from sft_recipes.evaluation.forgetting import forgetting_advice
from support.paths import ROOT

FULL = {"learning_rate": 2e-5, "num_train_epochs": 3}
MINE = {"held_out": 0.02, "mine": {"path": "json", "formatter": "alpaca"}}


def test_all_three_defences_are_named_with_their_config():
    assert forgetting_advice(FULL, {"type": "none"}, MINE) == [
        "A lower learning rate: trainer.learning_rate=6e-06",
        "Fewer epochs: trainer.num_train_epochs=1",
        "Low-rank updates, from which the base model can always be had back: adapter=lora",
        "2 to 10 % of raw text in the mixture: 'data=[mine,prose]' data.prose.share=0.05",
    ]


@pytest.mark.parametrize("formatter", ["text", {"name": "text", "text": "body"}])
def test_what_is_on_already_is_left_out(formatter):
    data = MINE | {"books": {"formatter": formatter, "share": 0.1}}
    assert len(forgetting_advice(FULL | {"max_steps": 100}, {"type": "lora", "lora": {"r": 8}}, data)) == 1


def test_the_prose_is_a_paragraph_a_line():
    lines = (ROOT / "sft_recipes" / "evaluation" / "prose.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 10
    assert all(line == line.strip() and 80 < len(line.split()) < 250 and line.isascii() for line in lines)
