"""mode=generate: tasks, answers and raw text, of a server on this machine and of the embedded model."""

import json
import os
import re
from pathlib import Path
from random import Random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from sft_recipes.config.endpoint_options import EndpointOptions
from sft_recipes.data.prepare import load_data
from sft_recipes.encoding.encoder import Encoder
from sft_recipes.errors import ConfigError
from sft_recipes.generate import append_line, generate
from sft_recipes.making.model_replies import LocalModel
from sft_recipes.making.self_instruct import TaskPool, measure_rouge_l, parse_instances, read_seed_tasks
from sft_recipes.modeling.loading import load_tokenizer
from support.configs import composed, error_of
from support.rows import write_jsonl

QUESTIONS = [{"question": f"What is {number} + 1?"} for number in range(6)]


@pytest.fixture
def teacher(judge_server):
    """A server that answers sums, and its `what="answers"`: the call that has six of them answered."""
    judge_server.reply = lambda asked: f"It is {int(re.search(r'[0-9]+', asked)[0]) + 1}."
    return judge_server


def make(where: Path, server, *overrides: str) -> dict:
    """The record of one call, whose rows are in `made.jsonl`."""
    endpoint = [f"generate.endpoint.url={server.url}", "generate.endpoint.model=fake"] if server else []
    data = ["model=tiny", "data=tiny", f"generate.out={where}/made.jsonl"]
    return generate(composed(*data, *endpoint, *overrides), where / f"run{len(list(where.glob('run*')))}")


def answers(where: Path, server, *overrides: str) -> dict:
    """Answers to the questions of six sums."""
    source = write_jsonl(where / "questions.jsonl", QUESTIONS)
    return make(where, server, "generate.what=answers", f"generate.source={source}", *overrides)


def made(where: Path) -> list[dict]:
    """The rows that were made."""
    return [json.loads(line) for line in (where / "made.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_instruction_of_ones_own_gets_its_answer_and_the_cost_is_counted(teacher, tmp_path):
    teacher.usage = {"prompt_tokens": 100, "completion_tokens": 10}
    prices = {"input": 2.0, "output": 8.0}
    record = answers(
        tmp_path, teacher, *(f"generate.endpoint.price_per_million_{of}={price}" for of, price in prices.items())
    )
    said = {row["id"]: [message["content"] for message in row["messages"]] for row in made(tmp_path)}
    assert said == {number: [f"What is {number} + 1?", f"It is {number + 1}."] for number in range(6)}
    assert (record["rows"], record["made"], record["rejected"]) == (6, 6, {})
    assert (record["input_tokens"], record["output_tokens"], record["cost"]) == (
        600,
        60,
        0.00168,
    )  # 600·2/10⁶ + 60·8/10⁶


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "What is 4 + 1?", "system": "Be brief."},
        {"question": "What is 4 + 1?", "system_prompt": "Be brief."},
        {"messages": [{"role": "user", "content": "What is 4 + 1?"}], "system": "Be brief."},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 4 + 1?"}]},
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "What is 4 + 1?"}]},
    ],
)
def test_an_instruction_keeps_its_system_prompt_and_may_be_messages(teacher, tmp_path, row):
    source = write_jsonl(tmp_path / "asked.jsonl", [row])
    make(tmp_path, teacher, "generate.what=answers", f"generate.source={source}")
    assert [[(turn["role"], turn["content"]) for turn in each["messages"]] for each in made(tmp_path)] == [
        [("system", "Be brief."), ("user", "What is 4 + 1?"), ("assistant", "It is 5.")]
    ]


def test_messages_in_which_nobody_asks_are_no_question(teacher, tmp_path):
    source = write_jsonl(tmp_path / "asked.jsonl", [{"messages": [{"role": "assistant", "content": "Hi"}]}])
    line = error_of(make, tmp_path, teacher, "generate.what=answers", f"generate.source={source}")
    assert "no question was found in a row" in line


def test_a_second_call_asks_only_for_what_is_missing(teacher, tmp_path):
    answers(tmp_path, teacher)
    lines = (tmp_path / "made.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [json.loads(line)["id"] for line in lines[:4]]
    (tmp_path / "made.jsonl").write_text("".join(lines[:4]) + lines[4][:20], encoding="utf-8")  # killed in mid-row
    teacher.seen.clear()
    assert (answers(tmp_path, teacher)["made"], len(teacher.seen)) == (2, 2)
    assert [row["id"] for row in made(tmp_path)][:4] == kept
    assert sorted(row["id"] for row in made(tmp_path)) == list(range(6))


def test_a_file_of_other_rows_is_not_continued(teacher, tmp_path):
    answers(tmp_path, teacher)
    other = write_jsonl(tmp_path / "other.jsonl", [{"question": "Why 7?"}])
    with pytest.raises(ConfigError, match="holds answers to other instructions. Write another file.$"):
        make(tmp_path, teacher, "generate.what=answers", f"generate.source={other}")
    with pytest.raises(ConfigError, match="holds other rows than these. Write another file.$"):
        make(tmp_path, teacher, "generate.what=replay")


def test_an_answer_with_a_line_separator_of_its_own_is_one_row_of_the_next_call(teacher, tmp_path):
    teacher.reply = lambda asked: "One.\u2028Two.\x85Three."
    answers(tmp_path, teacher)
    assert (answers(tmp_path, teacher)["rows"], len(teacher.seen)) == (6, 6)


def test_a_file_that_is_none_of_ours_is_left_as_it_is(teacher, tmp_path):
    (tmp_path / "made.jsonl").write_text("My notes, which end without a line break.")
    line = error_of(answers, tmp_path, teacher)
    assert line == f"generate.out={tmp_path}/made.jsonl holds other rows than these. Write another file."
    assert (tmp_path / "made.jsonl").read_text() == "My notes, which end without a line break."


def test_a_busy_server_is_asked_again_and_no_more_at_once_than_was_said(teacher, tmp_path):
    teacher.failures = [(429, {"Retry-After": "7"}), (503, {})]
    assert answers(tmp_path, teacher, "generate.endpoint.concurrency=1")["made"] == 6
    assert teacher.waits[0] == 7 and len(teacher.waits) == 2 and len(teacher.seen) == 8


def test_a_server_that_answers_nothing_ends_the_call_in_one_line_without_the_key(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    teacher.failures = [(401, {})] * 9
    line = error_of(answers, tmp_path, teacher)
    assert line.startswith(f"generate.endpoint: fake at {teacher.url} does not answer: Error code: 401")
    assert line.endswith("Rows made so far are kept, the same command goes on with them.") and "secret-key" not in line
    assert json.loads((tmp_path / "run0" / "generate.json").read_text())["made"] == 0


def test_the_key_goes_to_the_host_alone_and_nothing_else_of_the_environment(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key-1")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Secret: mine")
    teacher.failures = [(307, {"Location": "http://localhost:9/v1/chat/completions"})]
    record = answers(tmp_path, teacher)
    assert record["rejected"] == {"the request failed": 1} and record["made"] == 5  # the redirect is not followed
    for _, headers, _ in teacher.seen:
        headers = {name.lower(): value for name, value in headers.items()}
        assert headers["authorization"] == "Bearer key-1"
        assert not headers.keys() & {"openai-organization", "x-secret"}
    assert os.environ["OPENAI_ORG_ID"] == "org-1"


def test_a_key_of_another_host_s_is_refused(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    line = error_of(EndpointOptions, "http://evil.example/v1", "m")
    assert line.startswith(
        "generate.endpoint would send OPENAI_API_KEY to evil.example. Put that host's key into GENERATE_API_KEY"
    )


def test_a_reply_that_is_cut_off_is_left_out_with_its_reason(teacher, tmp_path):
    teacher.reply = lambda asked: ("It is", "length") if "3" in asked else "Fine."
    assert answers(tmp_path, teacher)["rejected"] == {"the reply is cut off": 1}
    (line,) = (tmp_path / "run0" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {"reason": "the reply is cut off", "reply": "It is"}


def invent(asked: str) -> str:
    """A teacher of Self-Instruct: a list, a yes or no, or an example, as each prompt file asks for it."""
    if "Continue the list" in asked:
        return "9. Say whether the letter is angry.\n10. Draw a house.\n11. Sing\n12. Name a bird that swims well."
    if "Is this a classification" in asked:
        return "Yes" if "angry" in asked.rsplit("Task:")[-1] else "No"
    if "Name the class first" in asked:
        return (
            "Label: angry\nInput: Never again!\n\nLabel: calm\nInput: Kind regards.\n\nLabel: calm\nInput: Never again!"
        )
    return "Input: none\nOutput: A penguin."


def test_self_instruct_makes_tasks_classifies_them_and_filters_both(teacher, tmp_path):
    teacher.reply = invent
    record = make(tmp_path, teacher, "generate.rows=20", "generate.endpoint.concurrency=1")
    angry = {"instruction": "Say whether the letter is angry.", "category": "classification", "model": "fake"}
    assert made(tmp_path) == [
        angry | {"input": "Never again!", "output": "angry"},
        angry | {"input": "Kind regards.", "output": "calm"},
        {"instruction": "Name a bird that swims well.", "input": "", "output": "A penguin.", "category": "generation", "model": "fake"},
    ]  # fmt: skip
    assert record["rejected"]["the example"] == 1  # the same input with two answers
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "run0" / "rejected.jsonl").read_text().splitlines()]
    assert reasons[:2] == [
        "the instruction: it says 'Draw', which is not done in writing alone", "the instruction: it has 1 words",
    ]  # fmt: skip
    assert "the example: its input is there already, with another answer" in reasons
    assert "the instruction: its ROUGE-L to another one is 1.00" in reasons  # the second round says the same once more


def test_a_model_whose_replies_are_all_without_use_ends_the_call_in_one_line_that_names_another(teacher, tmp_path):
    teacher.reply = lambda asked: "I would rather not."
    line = error_of(make, tmp_path, teacher, "generate.rows=20")
    assert line.startswith(
        "generate.what=self_instruct: no reply of fake could be used (no list can be read in the reply), see "
    )
    assert line.endswith("follows instructions: generate.endpoint='{url: https://…/v1, model: M}', or model=NAME.")
    assert json.loads((tmp_path / "run0" / "generate.json").read_text())["requests"] == 20  # five rounds of four


def test_a_seed_task_without_an_instruction_is_none(tmp_path):
    tasks = [*[f"Name a tree of land {number}." for number in range(8)], None]
    write_jsonl(tmp_path / "seeds.jsonl", [{"instruction": task} for task in tasks])
    assert read_seed_tasks(str(tmp_path / "seeds.jsonl")) == tasks[:8]


def test_six_examples_are_seed_tasks_and_two_are_made_ones():
    seeds = read_seed_tasks(None)
    pool = TaskPool(seeds, ["mine 1", "mine 2", "mine 3"], 0.7)
    shown = re.findall(r"^\d\. (.*)$", pool.draw_examples(Random(0)), re.MULTILINE)
    assert len(shown) == 8 and sum(text in seeds for text in shown) == 6


def test_rouge_l_is_that_of_rouge_score():
    draw, scorer = Random(0), RougeScorer(["rougeL"])
    for _ in range(300):
        first, second = (" ".join(draw.choices("a b c d e f g", k=draw.randint(1, 40))) for _ in range(2))
        expected = scorer.score(first, second)["rougeL"].fmeasure
        assert measure_rouge_l(first.split(), second.split()) == pytest.approx(expected)
        assert measure_rouge_l(first.split(), second.split(), 0.7) in (0.0, pytest.approx(expected))


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("Input: none\nOutput: Yes.", [("", "Yes.")]),
        ("**Input:** a: b\nc\n**Output:** d\n\ne", [("a: b\nc", "d\n\ne")]),
        ("Input:\nx\n\nOutput:\n- y", [("x", "- y")]),
        ("Output: only this", []),
        ("I cannot do that.", []),
    ],
)
def test_an_example_is_read_as_it_is_written(reply, found):
    assert parse_instances(reply) == found


def test_replay_is_text_of_the_model_s_own_and_a_run_reads_it(tmp_path):
    record = make(tmp_path, None, "generate.what=replay", "generate.rows=6", "generate.max_new_tokens=24")
    texts = [row["text"] for row in made(tmp_path)]
    assert (record["made"], len(set(texts))) == (6, 6)
    assert sum(bool(re.search(r"[A-Z]\w+( \w+)+[.?]", text)) for text in texts) >= 4  # sentences, of the little world
    config = composed("model=tiny", "data=file", f"data.file.data_files={tmp_path}/made.jsonl", "data.held_out=0")
    tokenizer, template, _ = load_tokenizer(config.model)
    assert len(load_data(config, Encoder(tokenizer, template), 256).train) == 6


def test_the_config_s_model_stops_at_its_template_s_stop_token_and_at_no_letter():
    teacher = LocalModel(composed("model=tiny", "data=tiny", "model.chat_template=chatml"))
    stops = teacher.tokenizer.convert_ids_to_tokens(teacher.model.generation_config.eos_token_id)
    assert set(stops) == {"<|im_end|>", "<|endoftext|>"}


def test_replay_at_an_endpoint_asks_for_completions_of_nothing(teacher, tmp_path):
    texts = iter(["Once there was a fox.", "Once there was a fox.", "Rivers run."])
    teacher.reply = lambda asked: (next(texts), "length")  # raw text may be cut
    make(tmp_path, teacher, "generate.what=replay", "generate.rows=2", "generate.endpoint.concurrency=1")
    assert [row["text"] for row in made(tmp_path)] == ["Once there was a fox.", "Rivers run."]
    assert {(path, request["prompt"]) for path, _, request in teacher.seen} == {("/v1/completions", "")}


def test_the_embedded_model_answers_from_the_command_line_without_data_being_named(command):
    write_jsonl(Path("asked.jsonl"), [{"prompt": "Hi?"}, {"instruction": "Name it.", "input": "a fox"}])
    code, printed, _ = command(
        "mode=generate", "generate.what=answers", "generate.source=asked.jsonl", "generate.temperature=0"
    )
    assert code == 0 and printed.startswith("2 rows are in generated.jsonl, 2 made now.")
    rows = [json.loads(line) for line in Path("generated.jsonl").read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["Hi?", "Name it.\n\na fox"]
    assert all(row["messages"][1]["content"] for row in rows)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["generate.what=answer"], "generate.what cannot be 'answer'. Did you mean answers?"),
        (["generate.what=answers"], "generate.what=answers needs your instructions. Write generate.source=my_questions.jsonl."),
        (["generate.rows=0"], "generate.rows should be at least 1, not 0."),
        (["generate.prompts=nowhere"], "generate.prompts=nowhere: there is no instructions.txt."),
        (["generate.endpoint={url: 'x', model: m}"], "generate.endpoint.url=x should be an address such as https://HOST/v1."),
        (["generate.endpoint={url: 'http://localhost/v1', name: m}"], "generate.endpoint.name is not a field of generate.endpoint."),
        (["generate.out=nowhere/x.jsonl"], "generate.out=nowhere/x.jsonl: there is no folder nowhere."),
        (["generate.out=."], "generate.out=. is a folder. Write generate.out=generated.jsonl."),
        (["generate.source=none.jsonl"], "generate.source=none.jsonl should be a .jsonl with an instruction in each line"),
        (["what=replay"], "what is not a field of the config. Write generate.what."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(command, overrides, line):
    code, printed, said = command("mode=generate", *overrides)
    assert (code, printed) == (2, "") and said.strip().splitlines()[-1].startswith(line)


def test_a_file_that_cannot_be_written_is_one_line():
    line = "/dev/full cannot be written: No space left on device. The rows before it are kept."
    assert error_of(append_line, Path("/dev/full"), {"text": "a"}) == line
