"""Benchmarks through lm-eval, offline: local tasks against scores that plain transformers gives, and names checked first."""

import copy
import random
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sft_recipes.config.options import ModelOptions
from sft_recipes.errors import ConfigError
from sft_recipes.evaluation import benchmarks
from sft_recipes.evaluation.benchmarks import check_tasks, run_lm_eval, score_change
from sft_recipes.modeling.adapters import train_new_tokens
from sft_recipes.modeling.loading import load_tokenizer
from support.benchmark_tasks import CHOICE, world_questions
from support.paths import TINY_MODEL

TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def tiny():
    """The embedded model, with a tokenizer that has a chat template."""
    tokenizer, _, new = load_tokenizer(ModelOptions(str(TINY_MODEL), "chatml"))
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    return model, tokenizer, new


@torch.no_grad()
def log_probability(model, tokenizer, question: str, answer: str) -> float:
    """The sum over the answer's tokens of their log-probabilities after the question, one row at a time."""
    start, ids = tokenizer(question).input_ids, tokenizer(f"{question} {answer}").input_ids
    assert ids[: len(start)] == start
    scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(scores[place - 1, ids[place]].item() for place in range(len(start), len(ids)))


def test_a_local_choice_task_is_scored_by_the_answers_log_probabilities(tiny, task):
    model, tokenizer, _ = tiny
    rows, right, right_by_length = world_questions(), 0, 0
    for row in rows:
        scores = [log_probability(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        lengths = [len(choice) for choice in row["choices"]]
        right += max(range(4), key=lambda place: scores[place]) == 1
        right_by_length += max(range(4), key=lambda place: scores[place] / lengths[place]) == 1
    assert right != right_by_length and 0 < right < 24  # else the test would not tell the metrics apart
    one, two = [{"metric": "acc"}], [{"metric": "acc"}, {"metric": "acc_norm"}]
    tasks = [task("plain", rows, **CHOICE, metric_list=one), task("by_length", rows, **CHOICE, metric_list=two)]
    assert run_lm_eval(model, tokenizer, tasks) == {"plain": right / 24, "by_length": right_by_length / 24}


@pytest.mark.parametrize("chat", [True, False])
def test_a_local_written_task_is_asked_in_the_chat_template_where_there_is_one(tiny, task, chat):
    model, tokenizer, _ = tiny
    rows = world_questions(8)
    for place, row in enumerate(rows):
        asked = [{"role": "user", "content": row["question"]}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([ids if chat else tokenizer(row["question"]).input_ids])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        row["answer"] = text.split(".")[0] if place % 4 else "something else"
    assert len({row["answer"] for row in rows}) > 3
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    right, wrong = (tokenizer, plain) if chat else (plain, tokenizer)
    assert run_lm_eval(model, right, [task("written", rows, **WRITTEN)]) == {"written": 0.75}
    assert run_lm_eval(model, wrong, [task("written", rows, **WRITTEN)])["written"] < 0.75


def test_limit_is_the_number_of_rows_that_are_asked(tiny, task):
    model, tokenizer, _ = tiny
    rows = [{"question": "", "choices": ["the", "zzzzzzzzzzzzzzzz"], "answer": place < 3} for place in range(6)]
    rows = [row | {"answer": int(row["answer"])} for row in rows]
    path = task("limited", rows, **CHOICE, metric_list=[{"metric": "acc"}])
    assert run_lm_eval(model, tokenizer, [path]) == {"limited": 0.5}
    assert run_lm_eval(model, tokenizer, [path], limit=3) == {"limited": 0.0}


@pytest.mark.parametrize(
    "metrics, found",
    [(None, {"one": 1.0, "other": 0.0}), ([{"metric": "acc", "weight_by_size": True}], {"both": 0.25})],
)
def test_a_group_gives_its_own_metric_or_its_tasks(tiny, task, tmp_path, monkeypatch, metrics, found):
    rows = [{"question": "", "choices": ["the", "zzzzzzzzzzzzzzzz"], "answer": 0}]
    task("one", rows, **CHOICE, metric_list=[{"metric": "acc"}])
    task("other", [row | {"answer": 1} for row in rows * 3], **CHOICE, metric_list=[{"metric": "acc"}])
    group = {"group": "both", "task": ["one", "other"]} | ({"aggregate_metric_list": metrics} if metrics else {})
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    index = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(benchmarks, "task_manager", lambda everything: index)
    assert run_lm_eval(*tiny[:2], ["both"]) == found


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_is_scored_as_it_is_and_the_model_is_left_as_it_was(tiny, task, tied):
    model, tokenizer, new = tiny
    model = copy.deepcopy(model)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    torch.manual_seed(0)  # of the adapter's weights
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    train_new_tokens(config, model, new)
    peft = get_peft_model(model, config).train()
    peft.config.use_cache = False
    path = task("adapted", world_questions(), **CHOICE, metric_list=[{"metric": "acc"}])
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    expected = random.random(), numpy.random.rand(), torch.rand(()).item()
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = peft.eval()(ids).logits
        peft.train()
    tuned = run_lm_eval(peft, tokenizer, [path])
    assert (random.random(), numpy.random.rand(), torch.rand(()).item()) == expected
    assert all(module.training for module in peft.modules()) and peft.config.use_cache is False
    with torch.no_grad():
        assert torch.equal(peft.eval()(ids).logits, before)
    with peft.disable_adapter():
        base = run_lm_eval(peft, tokenizer, [path])
    assert base == run_lm_eval(tiny[0], tokenizer, [path])
    assert base != tuned


def test_checking_a_task_leaves_the_random_numbers_of_the_run_alone(task):
    path = task("mine", world_questions(2), **CHOICE)
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    expected = random.random(), numpy.random.rand(), torch.rand(()).item()
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    check_tasks([path])
    assert (random.random(), numpy.random.rand(), torch.rand(()).item()) == expected


def test_names_are_checked_against_lm_evals_own():
    check_tasks(["mmlu", "hellaswag", "truthfulqa_mc2", "ifeval", "gsm8k"])
    with pytest.raises(ConfigError) as caught:
        check_tasks(["hellaswagg"])
    assert str(caught.value) == "evaluate.lm_eval=hellaswagg is not a task of lm-eval. Did you mean hellaswag?"


def test_local_tasks_need_no_index_of_names(task, monkeypatch):
    nothing = TaskManager(include_defaults=False)
    monkeypatch.setattr(
        benchmarks, "task_manager", lambda everything: pytest.fail("the index was read") if everything else nothing
    )
    check_tasks([task("mine", world_questions(2), **CHOICE)])


def test_without_lm_eval_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        check_tasks(["mmlu"])
    assert str(caught.value) == "evaluate.lm_eval needs lm-eval. Run: pip install 'sft-recipes[eval]'"


@pytest.mark.parametrize(
    "text",
    [None, "dataset_path: json", "task: [a, b", "group: mine\ntask: [mmlu]", "include: other.yaml", "- 1"],
)
def test_a_task_file_that_is_none_gets_a_line(tmp_path, text):
    if text:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"mine.yaml cannot be loaded\. .*A file should hold one task") as caught:
        check_tasks([str(tmp_path / "mine.yaml")])
    assert "\n" not in str(caught.value)


def test_rows_that_are_not_there_get_a_line(tiny, task):
    path = task("mine", [], **CHOICE)
    Path(path).with_suffix(".jsonl").unlink()
    with pytest.raises(
        ConfigError, match=r"mine.yaml cannot be loaded. FileNotFoundError: Unable to find .*mine.jsonl"
    ):
        check_tasks([path])


def test_a_metric_that_is_no_share_is_refused(tiny, task):
    rows = [{"text": "The willowtoad is orange."}]
    fields = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    path = task("prose", rows, **fields, metric_list=[{"metric": "word_perplexity"}])
    with pytest.raises(ConfigError, match="prose measures word_perplexity=.*, which is no share of right answers"):
        run_lm_eval(*tiny[:2], [path])


def test_the_worst_task_gives_the_verdict():
    before = {"mmlu": 0.5, "hellaswag": 0.6}
    assert score_change(before, {"mmlu": 0.48, "hellaswag": 0.7})["verdict"] == "passed"  # 2.0 points
    assert score_change(before, {"mmlu": 0.47, "hellaswag": 0.7})["verdict"] == "warning"
    assert score_change(before, {"mmlu": 0.45, "hellaswag": 0.6})["verdict"] == "warning"  # 5.0 points
    assert score_change(before, {"mmlu": 0.51, "hellaswag": 0.54}) == {
        "points": {"mmlu": -1.0, "hellaswag": 6.0}, "worst": 6.0, "task": "hellaswag", "verdict": "failed",
    }  # fmt: skip
