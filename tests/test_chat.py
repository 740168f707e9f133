"""A talk with a finished run: what is asked, what the model says, and how it ended."""

import io
import json
import re
import shutil
import sys

import pytest
import torch

from sft_recipes.chat import Chat, main, sampling_options
from sft_recipes.config.options import ModelOptions
from sft_recipes.modeling.loading import load_model
from sft_recipes.modeling.save_load import load_run
from support.paths import TINY_MODEL


@pytest.fixture
def chat(tuned):
    """A talk with a tiny model that says `Hi there.` to everything; its base goes on with something else."""
    model, tokenizer = load_run(tuned("tiny, tied", "VeRA").run)
    return Chat(model, tokenizer, {"do_sample": False, "max_new_tokens": 12})


@pytest.fixture
def prompts(chat, monkeypatch):
    """What the model is given, a text each time that it is asked."""
    given, generate = [], chat.model.generate

    def noted(**options):
        given.append(chat.tokenizer.decode(options["input_ids"][0]))
        return generate(**options)

    monkeypatch.setattr(chat.model, "generate", noted)
    return given


def test_an_answer_is_streamed_and_says_that_it_stopped_by_itself(chat, capsys):
    assert chat.ask("Say hi.") == "■ stopped by itself with <|im_end|> after 6 tokens"
    assert capsys.readouterr().out == "Hi there.\n"
    assert chat.messages == [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi there."}]


def test_an_answer_that_is_cut_says_so(chat, capsys):
    chat.options["max_new_tokens"] = 3
    assert chat.ask("Say hi.") == "… cut after 3 tokens, --max-new-tokens takes more"


def test_the_history_is_in_the_next_prompt_in_the_saved_template(chat, prompts):
    chat.ask("Say hi.")
    chat.ask("Again.")
    assert prompts[-1] == (
        "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\nHi there.<|im_end|>\n"
        "<|im_start|>user\nAgain.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.command("/reset") == "History forgotten."
    chat.ask("Say hi.")
    assert prompts[-1] == "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"


def test_base_answers_the_same_prompt_without_the_adapter_and_leaves_the_history(chat, prompts, capsys):
    assert chat.command("/base") == "Ask something first."
    chat.ask("Say hi.")
    history, tuned_says = list(chat.messages), capsys.readouterr().out
    assert chat.command("/base").startswith("base model: ")
    assert prompts[0] == prompts[1] and chat.messages == history
    said = capsys.readouterr().out.strip()
    base = load_model(ModelOptions(str(TINY_MODEL)), None, True, chat.tokenizer, ["<|im_end|>"], [1700, 1701])
    row = torch.tensor([chat.tokenizer(prompts[0]).input_ids])
    output = base.generate(input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False)
    expected = chat.tokenizer.decode(output[0, row.shape[1] :], skip_special_tokens=True).strip()
    assert said == expected != tuned_says.strip()


def test_a_system_message_stands_first_until_it_is_taken_away(chat, prompts):
    chat.ask("Say hi.")
    assert chat.command("/system Be brief.") == "System message set."
    chat.command("/system Be kind.")
    chat.ask("Say hi.")
    assert prompts[-1].startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nSay")
    assert chat.command("/system") == "There is no system message now."
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_tokens_shows_the_ids(chat):
    chat.ask("Say hi.")
    prompt, answer = chat.command("/tokens").split("\n")
    ids = [int(id) for id in re.findall(r"(\d+):", prompt)]
    assert chat.tokenizer.decode(ids) == "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    assert answer.endswith(f"{chat.tokenizer.convert_tokens_to_ids('<|im_end|>')}:<|im_end|>")


def test_an_interrupted_answer_leaves_no_question_behind(chat, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Say hi.")
    assert chat.messages == []


def test_control_c_while_the_model_is_loaded_leaves_without_a_traceback(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sft_recipes.chat.load_run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert (stopped.value.code, capsys.readouterr().err) == (130, "Interrupted.\n")


def test_a_talk_in_the_terminal_ends_with_the_input(tuned, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say hi.\n/rest\n/help\n\n/system Be brief.\n"))
    main([str(tuned("tiny, tied", "VeRA").run), "--max-new-tokens", "12"])
    printed = capsys.readouterr().out
    assert "Hi there.\n■ stopped by itself" in printed and "System message set." in printed
    assert "There is no /rest; /help lists the commands." in printed and "/base " in printed


def test_one_question_prints_its_answer_alone(tuned, capsys):
    main([str(tuned("tiny, tied", "VeRA").run), "--prompt", "Say hi."])
    said = capsys.readouterr()
    assert said.out == "Hi there.\n" and said.err.endswith("■ stopped by itself with <|im_end|> after 6 tokens\n")


def test_sampling_is_the_reports(tmp_path):
    assert sampling_options(tmp_path) == {"temperature": 0.7, "top_p": 0.9}
    values = {"after": {"sampled": {"exact_match": 0.5, "temperature": 0.3, "top_p": 0.8}}}
    (tmp_path / "metrics.json").write_text(json.dumps(values))
    assert sampling_options(tmp_path) == {"temperature": 0.3, "top_p": 0.8}


def test_a_run_whose_template_is_gone_gets_a_line(tuned, tmp_path, capsys):
    shutil.copytree(tuned("Llama, tied", "LoRA").run, tmp_path / "run")
    for file in (tmp_path / "run" / "model").rglob("*.jinja"):
        file.unlink()
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "run"), "--prompt", "Hi"])
    assert stopped.value.code == 2 and "chat_template is not set" in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_no_run_gets_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    line = f"{tmp_path} is not the folder of a finished run: it has no model/ with a tokenizer.\n"
    assert (stopped.value.code, capsys.readouterr().err) == (2, line)
