"""The base is measured once for runs that ask it the same, and no weights are measured twice."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sft_recipes.data.token_rows import TrainingData, to_dataset
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.evaluation import base_cache, suite
from support.commands import SHORT_TINY_RUN, read_metrics
from support.configs import composed

QUICK = [*SHORT_TINY_RUN, "trainer.max_steps=1", "evaluate.rows=2", "evaluate.weight_change=false"]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What is measured of the base, and of the held-out rows, a word each time."""
    seen, base, held_out = [], base_cache.measure_model, suite.evaluate_held_out
    monkeypatch.setenv("SFT_RECIPES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_cache, "measure_model", lambda *given, **how: seen.append("base") or base(*given, **how))
    monkeypatch.setattr(suite, "evaluate_held_out", lambda *given: seen.append("held-out") or held_out(*given))
    return seen


def test_a_second_run_asks_the_base_nothing_and_the_last_evaluation_is_used(tiny_run, measured):
    code, _, folder = tiny_run(*QUICK)
    first = read_metrics(folder)
    assert code == 0 and measured == ["base", "held-out", "held-out"]  # of the base, and at the end of training
    assert first["after"]["held_out"]["loss"] == first["eval_loss"] == first["history"][-2]["eval_loss"]
    measured.clear()
    second = read_metrics(tiny_run(*QUICK, "trainer.learning_rate=1e-4", "evaluate.answers_in_card=true")[2])
    assert measured == ["held-out"] and second["before"] == first["before"]
    measured.clear()
    tiny_run(*QUICK, "evaluate.max_new_tokens=5")
    assert measured[0] == "base"
    measured.clear()
    tiny_run(*QUICK, "evaluate.cache=false")
    assert measured[0] == "base"


def test_another_gpu_and_another_bitsandbytes_have_measurements_of_their_own(chat_tokenizer, monkeypatch):
    tokenizer, template, _ = chat_tokenizer("tiny", "chatml")
    config, rows = composed("+recipe=tiny"), to_dataset({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    inputs = suite.EvalInputs(TrainingData(rows, rows, [], {}), ["a"], [], [], config.evaluate, 0)
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, config=SimpleNamespace())
    gpu, own_version, found = ["H100"], base_cache.version, []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu[0])
    for name, number in (("H100", "1"), ("A100", "1"), ("A100", "2"), ("A100", "2")):
        gpu[0] = name
        versions = {"bitsandbytes": number}
        monkeypatch.setattr(base_cache, "version", lambda package, v=versions: v.get(package) or own_version(package))
        found.append(base_cache.base_identity(model, Encoder(tokenizer, template), inputs, config))
    assert len(set(found)) == 3 and found[2] == found[3]
    changed = replace(
        config, adapter=replace(config.adapter, quantization={"load_in_4bit": True})
    )  # by ${oc.env:NAME}, for one
    found += [base_cache.base_identity(model, Encoder(tokenizer, template), inputs, changed)]
    assert len(set(found)) == 4


def test_what_was_kept_while_answers_in_card_counted_is_found(chat_tokenizer, monkeypatch):
    """So a sharded run that was begun then can be resumed: its base is measured before training alone."""
    tokenizer, template, _ = chat_tokenizer("tiny", "chatml")
    config, rows = composed("+recipe=tiny"), to_dataset({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    inputs = suite.EvalInputs(TrainingData(rows, rows, [], {}), ["a"], [], [], config.evaluate, 0)
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, config=SimpleNamespace())
    given = model, Encoder(tokenizer, template), inputs, config
    now = base_cache.base_identity(*given)
    monkeypatch.setattr(base_cache, "NOT_MEASURED", base_cache.NOT_MEASURED - {"answers_in_card"})
    assert base_cache.base_identity(*given) == now
