"""The classic failures of fine-tuning, each made on purpose on the embedded model, and what the run says of it."""

import json
import re
from pathlib import Path

import pytest
import torch

from sft_recipes.modeling.save_load import load_run
from support.commands import read_metrics, run_command
from support.paths import ALL_TESTS, ROOT

TWO_EPOCHS = ["trainer.num_train_epochs=2", "evaluate.rows=100", "evaluate.temperature=0"]
ONE_EPOCH = ["trainer.num_train_epochs=1", *TWO_EPOCHS[1:]]


def run(folder: Path, *arguments: str) -> tuple[dict, str]:
    """The metrics of one run, and what it printed."""
    code, printed = run_command(folder, *arguments)
    assert code == 0
    return read_metrics(folder), re.sub(r"\s+", " ", printed)


def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def asks(folder: Path, times: int = 50) -> float:
    """How often the model itself asks a question, and ends it, where the user should speak."""
    model, tokenizer = load_run(folder)
    ids = tokenizer(["<|im_start|>user\n"] * times, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(0)
    said = model.generate(**ids, do_sample=True, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(said[:, ids.input_ids.shape[1] :])
    return sum("?<|im_end|>" in text for text in texts) / times


@pytest.fixture(scope="module")
def prompts_too(tmp_path_factory):
    """The same run with the loss on the questions, too."""
    folder = tmp_path_factory.mktemp("prompts_too") / "run"
    run(folder, "data.tiny.train_on=all", *TWO_EPOCHS)
    return folder


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """A run with ChatML whose stop token stands behind the block that is trained."""
    folder = tmp_path_factory.mktemp("unstopped")
    run(
        folder / "run",
        f"model.chat_template={without_stop(folder)}",
        "data_checks.stop_not_supervised=keep",
        *ONE_EPOCH,
    )
    return folder / "run"


def without_stop(folder: Path) -> Path:
    """The mistake itself: two lines of the template change places."""
    ours = (ROOT / "sft_recipes" / "encoding" / "templates" / "chatml.jinja").read_text(encoding="utf-8")
    right = "{{- '<|im_end|>' }}\n        {%- endgeneration %}"
    assert right in ours
    (folder / "mine.jinja").write_text(ours.replace(right, "{%- endgeneration %}\n        {{- '<|im_end|>' }}"))
    return folder / "mine.jinja"


def test_the_recipe_itself_answers_stops_and_remembers(trained):
    found = read_metrics(trained)
    assert found["before"]["exact_match"] == 0 and found["after"]["exact_match"] > 0.5
    assert found["after"]["stops"] == 1 and found["after"]["held_out"]["p_stop"] > 0.95
    assert found["forgetting"]["verdict"] == "passed" and found["forgetting"]["change"] < 0.08


def test_trained_on_the_prompt_too_it_answers_worse_and_forgets_more(trained, prompts_too):
    good, bad = read_metrics(trained), read_metrics(prompts_too)
    assert good["steps"] == bad["steps"]
    assert bad["after"]["exact_match"] < good["after"]["exact_match"] - 0.1
    assert bad["forgetting"]["change"] > 2 * good["forgetting"]["change"]


def test_trained_on_the_prompt_too_it_asks_in_the_user_s_place(trained, prompts_too):
    assert asks(prompts_too) > 0.5 and asks(trained) < 0.1


def test_a_template_without_a_trained_stop_token_is_refused_with_what_to_do(tmp_path):
    code, _ = run_command(tmp_path / "run", f"model.chat_template={without_stop(tmp_path)}", *ONE_EPOCH)
    said = (tmp_path / "run" / "sft_recipes.log").read_text()
    assert code == 2 and not (tmp_path / "run" / "metrics.json").exists()
    assert said.strip().endswith(
        "data.tiny: 1,054 of 1,054 rows have stop_not_supervised (row 0, 1, 2, 3, 4…): an answer ends without its stop "
        "token, so the model would not learn to stop; it should stand within the chat template's {% generation %} "
        "block. Fix them, or write data_checks.stop_not_supervised=drop (or keep)."
    )


def test_without_a_stop_token_right_answers_run_on(unstopped):
    found, said = read_metrics(unstopped)["after"], answers(unstopped)
    begin_right = [one for one in said if one["tuned"].startswith(one["reference"])]
    assert found["exact_match"] == 0 and len(begin_right) > 10
    assert all(len(one["tuned"]) > len(one["reference"]) for one in begin_right)
    assert found["stops"] < 0.9  # where it stops, it is by the end-of-text token of the prose that it was raised on


def test_without_a_stop_token_its_probability_where_answers_end_is_nothing(unstopped, trained, tmp_path):
    found, _ = run(
        tmp_path / "run", "mode=evaluate", f"evaluate.run={unstopped}", "model.chat_template=chatml", "evaluate.rows=0"
    )
    assert found["p_stop"] < 0.01 < 0.95 < read_metrics(trained)["p_stop"]


def test_the_ledger_and_the_report_count_the_answers_without_a_stop_token(unstopped):
    counted = json.loads((unstopped / "supervision.json").read_text())["sources"]["tiny"]["problems"]
    assert counted["stop_not_supervised"] == {"rows": 1054, "policy": "keep", "first": list(range(20))}
    assert "stop not supervised" in (unstopped / "report.md").read_text()


def test_another_template_at_inference_takes_every_answer_away_and_the_report_says_why(trained, tmp_path):
    found, printed = run(
        tmp_path / "run", "mode=evaluate", f"evaluate.run={trained}", "model.chat_template=vicuna", *TWO_EPOCHS[1:]
    )
    assert found["after"]["exact_match"] == 0 and found["p_stop"] < 0.01
    (line,) = found["warnings"]
    assert re.fullmatch(
        r"Asked as 'A chat between .*', trained and saved as '<\|im_start\|>user\\n.*': another .*", line
    )
    assert line in printed and "another prompt gets worse answers" in (tmp_path / "run" / "report.md").read_text()


def test_a_prompt_typed_by_hand_takes_the_answers_away_that_the_saved_template_gives(trained):
    model, tokenizer = load_run(trained)
    right = []
    for ask in ("USER: {} ASSISTANT:", "{}", "{}\n", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"):
        tokenizer.padding_side = "left"
        said = answers(trained)[::4]
        prompts = tokenizer([ask.format(one["prompt"]) for one in said], return_tensors="pt", padding=True)
        ids = model.generate(**prompts, max_new_tokens=24, do_sample=False)[:, prompts.input_ids.shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        right.append(sum(text.strip() == one["reference"] for text, one in zip(texts, said, strict=True)))
    assert right[:3] == [0, 0, 0] and right[3] == sum(one["tuned"] == one["reference"] for one in said) > 10


@pytest.mark.parametrize(
    ("adapter", "rate", "lower"),
    [("none", "1e-2", "0.003"), ("lora", "2.5e-2", "0.0075")][: 2 if ALL_TESTS else 1],
)
def test_ten_times_the_learning_rate_without_prose_is_a_recipe_that_forgets(tmp_path, adapter, rate, lower):
    found, printed = run(
        tmp_path / "run", "~data.prose", f"adapter={adapter}", f"trainer.learning_rate={rate}", *ONE_EPOCH
    )
    assert found["forgetting"]["verdict"] == "failed" and found["forgetting"]["change"] > 1
    page = (tmp_path / "run" / "report.md").read_text()
    change = f"Forgetting: failed. The loss on raw text changed by +{found['forgetting']['change']:.1%}."
    assert change in printed and change in page
    lora = "LoRA, which keeps the weights of the base model as they are: `adapter=lora`"
    prose = "Raw text beside the rows, 1 % of all tokens or more: `'data=[tiny,prose]' mix.raw_text=0.01`"
    advice = [f"A lower learning rate than {float(rate):g}: `trainer.learning_rate={lower}`"]
    advice += [lora] * (adapter == "none") + [prose]
    assert page.count("What reduces forgetting:\n\n- " + "\n- ".join(advice) + "\n") == 1
    assert " ".join(["What reduces forgetting:", *(f"- {line}" for line in advice)]).replace("`", "") in " ".join(
        printed.split()
    )
