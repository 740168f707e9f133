"""Each template's text against the published one written out by hand, and what makes a template unfit."""

import pytest
from transformers import AutoTokenizer

from sft_recipes.encoding.chat_template import prepare_tokenizer
from sft_recipes.encoding.rendering import render_template, special_tokens
from sft_recipes.errors import ConfigError
from support.paths import TEMPLATES

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye."},
]
EOS = "<|endoftext|>"  # of the NeoX tokenizer, which wants no BOS
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
    "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:"
)
TEXTS = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nBye.<|im_end|>\n",
    "alpaca": f"Be brief.\n\n### Instruction:\nHi\n\n### Response:Hello!{EOS}\n\n### Instruction:\nBye\n\n### Response:Bye.{EOS}\n\n",
    "alpaca_short": f"Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!{EOS}\n\n"
    f"### Instruction:\nBye\n\n### Response:\nBye.{EOS}\n\n",
    "alpaca_long": f"Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!{EOS}\n\n"
    f"### Instruction:\nBye\n\n### Response:\nBye.{EOS}",
    "mistral": f" [INST] Be brief.\n\nHi [/INST] Hello!{EOS} [INST] Bye [/INST] Bye.{EOS}",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nBye.<|im_end|>\n",
    "vicuna": f"Be brief. USER: Hi ASSISTANT:Hello!{EOS}USER: Bye ASSISTANT:Bye.{EOS}",
    "llama2": f"[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]Hello!{EOS}[INST] Bye [/INST]Bye.{EOS}",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nBye.<|eot_id|>",
    "zephyr": f"<|system|>\nBe brief.{EOS}\n<|user|>\nHi{EOS}\n<|assistant|>\nHello!{EOS}\n<|user|>\nBye{EOS}\n"
    f"<|assistant|>\nBye.{EOS}\n",
    "gemma": "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nBye.<end_of_turn>\n",
    "tulu": f"<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello!{EOS}\n<|user|>\nBye\n<|assistant|>\nBye.{EOS}\n",
}


def test_every_template_on_disk_has_its_text_here():
    assert sorted(TEXTS) == TEMPLATES


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_text_is_the_published_one(chat_tokenizer, template):
    tokenizer, marked, _ = chat_tokenizer("neox", template)
    assert render_template(tokenizer, marked, TALK)[0] == TEXTS[template]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["tiny", "llama2", "llama3", "real llama2"])
def test_the_saved_tokenizer_has_the_same_text_without_markers(chat_tokenizer, tmp_path, kind, template):
    tokenizer, marked, _ = chat_tokenizer(kind, template)
    tokenizer.save_pretrained(tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path)
    assert "generation %}" not in served.chat_template
    assert served.apply_chat_template(TALK, tokenize=False) == render_template(tokenizer, marked, TALK)[0]
    assert prepare_tokenizer(served)[0] == marked  # and training can go on from it


def test_alpaca_asks_as_stanford_did_with_and_without_input(chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("neox", "alpaca")
    message = {"role": "user", "content": "Add.\n\n1 + 1", "instruction": "Add.", "input": "1 + 1"}
    ask = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template([message], **ask) == ALPACA_INPUT
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Add."}], **ask) == ALPACA


def test_alpaca_long_is_alpaca_lora_s_prompt_and_its_text_ends_with_the_answer(chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("neox", "alpaca_long")
    asked = [{"role": "user", "content": "Add.\n\n1 + 1", "instruction": "Add.", "input": "1 + 1"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == ALPACA_INPUT + "\n"
    answered = [*asked, {"role": "assistant", "content": "2"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"{prompt}2{EOS}"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("llama2", f"[INST] <<SYS>>\n a \n<</SYS>>\n\n b [/INST]c{EOS}"),
        ("llama3", "<|start_header_id|>system<|end_header_id|>\n\na<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nb"
                   "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nc<|eot_id|>"),
        ("gemma", "<start_of_turn>user\n a \n\nb<end_of_turn>\n<start_of_turn>model\nc<end_of_turn>\n"),
    ],
)  # fmt: skip
def test_whitespace_is_cut_where_the_published_template_cuts_it(chat_tokenizer, template, text):
    tokenizer, marked, _ = chat_tokenizer("neox", template)
    talk = [
        {"role": role, "content": f" {letter} "}
        for role, letter in zip(("system", "user", "assistant"), "abc", strict=True)
    ]
    assert render_template(tokenizer, marked, talk)[0] == text


def test_vicuna_opens_with_its_own_system_prompt(chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("neox", "vicuna")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == f"{VICUNA} USER: Hi ASSISTANT:"


def test_control_tokens_of_a_base_model_become_single_special_ids(chat_tokenizer):
    tokenizer, _, new = chat_tokenizer("neox", "chatml")
    assert tokenizer.convert_ids_to_tokens(new) == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer("<|im_start|><|im_end|>").input_ids == new
    assert {"<|im_start|>", "<|im_end|>"} <= set(special_tokens(tokenizer))


def test_control_tokens_that_are_there_are_not_added_again(chat_tokenizer):
    assert chat_tokenizer("llama3", "llama3")[2] == []


def test_a_missing_pad_token_is_set(chat_tokenizer):
    assert chat_tokenizer("neox", "chatml")[0].pad_token == "<|padding|>"
    assert chat_tokenizer("llama2", "chatml")[0].pad_token == "<unk>"


@pytest.mark.parametrize(
    ("kind", "bos", "opening"),
    [("llama2", "auto", "<s>"), ("llama2", "never", ""), ("neox", "auto", ""), ("neox", "always", "<|endoftext|>")],
)
def test_a_bos_opens_training_and_serving_as_the_tokenizer_or_the_recipe_says(tokenizer_folder, kind, bos, opening):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(kind))
    marked, _ = prepare_tokenizer(tokenizer, "tulu", bos=bos)
    served = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert (
        served
        == render_template(tokenizer, marked, [{"role": "user", "content": "Hi"}])[0]
        == f"{opening}<|user|>\nHi\n"
    )


def test_no_bos_from_a_template_that_writes_one_is_refused(tokenizer_folder, tmp_path):
    (tmp_path / "mine.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("llama2"))
    with pytest.raises(ConfigError, match="model.bos=never, but model.chat_template writes a BOS itself"):
        prepare_tokenizer(tokenizer, str(tmp_path / "mine.jinja"), bos="never")


UNFIT = {
    "{{ messages[0].content }}": "leaves out what the assistant says",
    "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}": "does not write 'assistant' before an answer when",
    "{% for m in messages %}{{ m.content }}{% endfor %}": "ends an answer with ''",
    "{{ messages.content.name }}": "cannot write a question and its answer: the chat template refuses it",
    "{{ strftime_now(day) + messages[-1].content + eos_token }}": "in a format that it computes",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}": "behind the {% generation %} block",
    "<|user|>{% generation %}{{ messages[-1].content }}{{ eos_token }}{% endgeneration %}": "Name those to be added",
}


def test_a_newline_behind_the_stop_token_may_stand_within_the_markers(tokenizer_folder, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token + '\n' }}"
        "{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("llama3"))
    assert prepare_tokenizer(tokenizer, str(path)) == (path.read_text(), [])


@pytest.mark.parametrize("text", UNFIT)
def test_an_unfit_template_is_refused_with_what_to_do(tokenizer_folder, tmp_path, text):
    path = tmp_path / "mine.jinja"
    path.write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("llama3"))
    with pytest.raises(ConfigError, match=UNFIT[text].replace("{", r"\{").replace("?", r"\?")):
        prepare_tokenizer(tokenizer, str(path))


def test_an_unknown_template_name_is_refused_with_the_closest(tokenizer_folder):
    with pytest.raises(ConfigError, match="Did you mean chatml?"):
        prepare_tokenizer(AutoTokenizer.from_pretrained(tokenizer_folder("llama3")), "chatmll")


def test_null_without_a_template_of_its_own_is_refused(tokenizer_folder):
    with pytest.raises(ConfigError, match="Write model.chat_template=chatml"):
        prepare_tokenizer(AutoTokenizer.from_pretrained(tokenizer_folder("llama3")))


def test_null_takes_the_tokenizer_s_own_template_with_its_markers_where_it_is_one_of_ours(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("llama3"))
    marked, _ = prepare_tokenizer(tokenizer, "llama3")
    assert "{%- generation" in marked and "generation %}" not in tokenizer.chat_template
    assert prepare_tokenizer(tokenizer) == (marked, [])


TALKS = "{% for m in messages %}{{ m.content }}{% if m.role != 'user' %}{{ eos_token }}{% endif %}{% endfor %}"


def test_a_date_in_a_template_is_the_run_s_in_training_and_the_server_s_own_in_serving(tokenizer_folder, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + TALKS)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("llama3"))
    trained, _ = prepare_tokenizer(tokenizer, str(tmp_path / "mine.jinja"), day="2026-11-03")
    assert render_template(tokenizer, trained, [{"role": "user", "content": "Hi"}])[0] == "03 Nov 2026Hi"
    assert tokenizer.chat_template == "{{ strftime_now('%d %b %Y') }}" + TALKS


def test_settings_of_the_template_hold_for_whoever_serves_it_and_can_still_be_changed(tokenizer_folder, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ 'loud' if loud is defined and loud else 'calm' }}" + TALKS)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("llama3"))
    asked = [{"role": "user", "content": "Hi"}]
    prepare_tokenizer(tokenizer, str(tmp_path / "mine.jinja"), settings={"loud": True})
    tokenizer.save_pretrained(tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path)
    assert served.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == "loudHi"
    assert served.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, loud=False) == "calmHi"


def test_a_setting_that_the_template_does_not_read_is_refused(tokenizer_folder, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ loud }}" + TALKS)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder("llama3"))
    with pytest.raises(ConfigError, match="model.chat_template_kwargs.lod: .* does not read lod. Did you mean loud"):
        prepare_tokenizer(tokenizer, str(tmp_path / "mine.jinja"), settings={"lod": True})
