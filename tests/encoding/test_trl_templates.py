"""Every chat template that TRL ships, as a model's own: its masks and prompts. `python tests/encoding/test_trl_templates.py` prints
which are accepted."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import trl
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_recipes.encoding.chat_template import prepare_tokenizer
from sft_recipes.encoding.encoder import IGNORE_INDEX, Encoder
from sft_recipes.errors import ConfigError, DataError
from support.paths import TINY_MODEL

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
# Refused, each with what the line says
REFUSED = {
    "deepseek_r1_distill": "no answer stands where it would be generated",  # served, it opens a thought that no row keeps
    "deepseekv3": "no answer stands where it would be generated",
}
CONTROL = re.compile(r"<\|[\w/]+\|?>|<[\w/]+\|>|<｜[^｜<]+｜>|<(?:start|end)_of_\w+>|</?think>|\[gMASK\]|<sop>|</s>")
MORE_CONTROL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")  # which Phi builds from a role
DAY = "2026-11-03"

# The token that each model's generation_config.json stops at, by the beginning of the template's name
STOPS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "diffusion_gemma": "<turn|>", "gemma": "<end_of_turn>", "gemma4": "<turn|>",
    "glm4moe": "<|user|>", "gptoss": "<|return|>", "idefics3": "<end_of_utterance>", "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>", "llava_next": "</s>", "muse": "<|eot|>", "nemotron": "<|im_end|>", "phi3": "<|end|>",
    "qwen": "<|im_end|>", "smolvlm": "<end_of_utterance>",
}  # fmt: skip
CALL_STOPS = {"diffusion_gemma": "<|tool_response>", "gptoss": "<|call|>", "glm4moe": "<|observation|>"}
CALL_STOPS |= dict.fromkeys(("gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5"), "<|tool_response>")
# What they write before an answer without thoughts, and no row says; it carries no loss
QWEN_EMPTY, REST_OF_EMPTY = "<think>\n\n</think>\n\n", "\n</think>\n\n"
INSERTED = {"qwen3": QWEN_EMPTY, "qwen3_5_think": REST_OF_EMPTY, "qwen3_6": REST_OF_EMPTY, "qwen3_8": REST_OF_EMPTY}
INSERTED |= {
    "glm4moe": "\n<think></think>\n",
    "gptoss": "<|channel|>final<|message|>",
    "muse_glimmer": " to=user<|message|>",
}
NO_SYSTEM = {"gemma"}
THOUGHTS = {
    name for name in NAMES
    if name.startswith(("nemotron", "qwen3_5", "lfm2_2_5"))
    or name in ("diffusion_gemma", "gemma4_v5", "glm4moe", "gptoss", "muse_glimmer", "qwen3", "qwen3_6", "qwen3_8")
}  # fmt: skip
TOOLS = {
    name for name in NAMES
    if name.startswith(("nemotron", "qwen2_5", "qwen3", "lfm2_2_5", "gemma4"))
    or name in ("diffusion_gemma", "glm4moe", "gptoss", "lfm2_v2", "llama3_1", "llama3_2", "muse_glimmer")
} - {"qwen2_5_vl"}  # fmt: skip


def say(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


QUESTION, ANSWER = say("user", "Which city?"), say("assistant", "Paris.")
LATER, SECOND = say("user", "And now?"), say("assistant", "Rome, then.")
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}}
FUNCTION = {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
ROWS = {
    "plain": {"messages": [QUESTION, ANSWER]},
    "system": {"messages": [say("system", "Be brief."), QUESTION, ANSWER]},
    "turns": {"messages": [QUESTION, ANSWER, LATER, SECOND]},
    "thoughts": {
        "messages": [QUESTION, ANSWER | {"reasoning_content": "It is in France."}, LATER,
                     SECOND | {"reasoning_content": "Not Oslo."}]
    },
    "tools": {
        "messages": [say("user", "Weather in Bonn?"), say("assistant", "", tool_calls=[CALL]), say("tool", "grey"),
                     say("assistant", "Grey."), LATER, SECOND],
        "tools": [{"type": "function", "function": FUNCTION}],
    },
}  # fmt: skip


def has_place(name: str, row: str) -> bool:
    """Whether a template has a place for a kind of row."""
    return {"system": name not in NO_SYSTEM, "thoughts": name in THOUGHTS, "tools": name in TOOLS}.get(row, True)


def longest(table: dict[str, str], name: str) -> str:
    """The entry of the longest key that a name begins with."""
    return table[max((key for key in table if name.startswith(key)), key=len)]


@cache
def own(name: str) -> tuple[PreTrainedTokenizerFast, Encoder]:
    """A tokenizer with this template of its own and the control tokens that it writes, and the encoder that trains it."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    control = sorted({*CONTROL.findall(tokenizer.chat_template), *(MORE_CONTROL if name.startswith("phi3") else ())})
    tokenizer.add_special_tokens({"extra_special_tokens": control}, replace_extra_special_tokens=False)
    template, new = prepare_tokenizer(tokenizer, any_stop=True, day=DAY)
    assert new == []
    return tokenizer, Encoder(tokenizer, template)


@pytest.fixture(scope="module", autouse=True)
def on_that_day():
    """Serving writes its own day, which is made the day of training here."""
    from datetime import datetime

    import transformers.utils.chat_template_utils as rendering

    class Day(datetime):
        now = classmethod(lambda cls: datetime.fromisoformat(DAY))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendering, "datetime", Day)
        rendering._compile_jinja_template.cache_clear()
        yield
        rendering._compile_jinja_template.cache_clear()


def served(tokenizer, context, turn: int) -> list[int]:
    """What the saved tokenizer shows before an answer."""
    row = context.conversation
    settings = row.get("chat_template_kwargs") or {}
    return tokenizer.apply_chat_template(
        row["messages"][:turn], tools=row.get("tools"), add_generation_prompt=True, return_dict=False, **settings
    )


def trained_texts(tokenizer, encoder, context) -> list[tuple[list[int], str, str]]:
    """For every stretch of a row with loss the ids before it, their end that is not the prompt's, and its text."""
    row = encoder.tokenized([context.pieces])
    ids, labels = row["input_ids"][0], row["labels"][0]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], labels != IGNORE_INDEX, [False]]).astype(int)))
    return [
        (ids[:start].tolist(), tokenizer.decode(ids[start:end]))
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
@pytest.mark.parametrize("kind", ROWS)
def test_every_answer_is_trained_whole_behind_the_prompt_of_serving(name, kind):
    if not has_place(name, kind):
        return
    tokenizer, encoder = own(name)
    answers = [place for place, message in enumerate(ROWS[kind]["messages"]) if message["role"] == "assistant"]
    found = []
    for context in encoder.contexts(ROWS[kind]):
        messages = context.conversation["messages"]
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        for before, text in trained_texts(tokenizer, encoder, context):
            (turn,) = (place for place in turns if (messages[place]["content"] or "weather") in text)
            found.append(turn)
            prompt, message = served(tokenizer, context, turn), messages[turn]
            context_text, prompt_text = tokenizer.decode(before), tokenizer.decode(prompt)
            assert context_text.startswith(prompt_text)
            inserted = context_text[len(prompt_text) :]
            if turn == answers[0]:
                assert before[: len(prompt)] == prompt
            thinks = "reasoning_content" in message
            called = bool(message.get("tool_calls"))
            if name == "diffusion_gemma" and messages[turn - 1]["role"] == "tool":
                assert inserted == "<|turn>model\n"  # which its prompt of serving forgets
            else:
                plain = "" if thinks or (called and name in ("gptoss", "muse_glimmer")) else INSERTED.get(name, "")
                assert inserted == plain
            stop = CALL_STOPS.get(name, longest(STOPS, name)) if called else longest(STOPS, name)
            assert text.endswith(stop) and text.count(stop) == 1
            if called:
                assert "weather" in text and "Bonn" in text
            elif thinks:
                assert message["reasoning_content"] in text and text.endswith(
                    message["content"] + END.get(name, "") + stop
                )
            else:
                assert text.strip() == message["content"] + END.get(name, "") + stop
    assert sorted(found) == answers


END = {"cohere2": "<|END_RESPONSE|>"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_trained_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=REFUSED[name]):
        own(name)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("more", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize(("ours", "theirs"), [("qwen3", "qwen3"), ("llama3", "llama3"), ("gemma", "gemma3")])
def test_our_own_named_templates_write_what_the_published_ones_write(ours, theirs, kind, more):
    if not has_place(theirs, kind):
        return
    row, named = ROWS[kind], AutoTokenizer.from_pretrained(TINY_MODEL)
    prepare_tokenizer(named, ours)
    for end in range(1, len(row["messages"]) + 1):
        if row["messages"][end - 1]["role"] == "system":
            continue
        options = {"tools": row.get("tools"), "tokenize": False, "add_generation_prompt": end % 2 == 0} | more
        texts = [each.apply_chat_template(row["messages"][:end], **options) for each in (named, own(theirs)[0])]
        assert texts[0] == texts[1].removeprefix(named.bos_token)


def test_at_least_38_templates_are_accepted():
    assert len(NAMES) - len(REFUSED) >= 38 and set(REFUSED) <= set(NAMES)


def main() -> None:
    """Prints the table."""
    for name in NAMES:
        try:
            tokenizer, encoder = own(name)
        except ConfigError as error:
            print(f"{name:24} refused   {error}")
            continue
        cells = []
        for kind, row in ROWS.items():
            try:
                cells.append(f"{kind} {len(encoder.contexts(row)) if has_place(name, kind) else '-'}")
            except DataError as error:
                cells.append(f"{kind}: {error}")
        print(f"{name:24} accepted  rows: {', '.join(cells)}; stops at {' '.join(encoder.answers.stops)}")


if __name__ == "__main__":
    main()
