"""What a model says, against one question at a time, token by token, without a cache."""

import pytest
import torch

from sft_recipes.config.options import ModelOptions
from sft_recipes.evaluation.generation import AllRepeat, generate_answers, is_answerable, split_last_answer
from sft_recipes.modeling.loading import load_model
from support.paths import TINY_MODEL
from support.small_models import Parrot


def say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


QUESTIONS = [
    {"messages": [say("user", question), say("assistant", answer)]}
    for question, answer in (
        ("What is the capital of Kelthia?", "The capital of Kelthia is Pinemoor."),
        ("Why?", "Because."),
        ("What does the hungry meadowgoat look for, and where does the willowtoad live?", "Figs."),
    )
] + [
    {
        "messages": [say("system", "Be brief."), say("user", "Hi."), say("assistant", "Hello."), say("user", "Bye."),
                     say("assistant", "Bye.")]
    }
]  # fmt: skip


@pytest.fixture(scope="module")
def base(chat_tokenizer):
    """The embedded base model and its tokenizer with ChatML."""
    tokenizer, _, new = chat_tokenizer("tiny", "chatml")
    model = load_model(ModelOptions(str(TINY_MODEL)), None, False, tokenizer, ["<|im_end|>"], new)
    return model.eval(), tokenizer


def greedy(model, tokenizer, prompt: str, most: int) -> tuple[str, bool]:
    """The likeliest token after the likeliest token, the whole text read anew for each, until a stop token."""
    ids, said = tokenizer(prompt, add_special_tokens=False).input_ids, []
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    while len(said) < most:
        with torch.no_grad():
            token = model(torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax().item()
        if token in stops:
            return tokenizer.decode(said), True
        said.append(token)
    return tokenizer.decode(said), False


PROMPTS = [
    "<|im_start|>user\nWhat is the capital of Kelthia?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat does the hungry meadowgoat look for, and where does the willowtoad live?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_greedy_answers_are_the_likeliest_tokens_whatever_the_batch(base, batch):
    model, tokenizer = base
    found = generate_answers(model, tokenizer, QUESTIONS, batch, 8)
    assert [(one["text"], one["stops"]) for one in found] == [greedy(model, tokenizer, text, 8) for text in PROMPTS]
    assert len({one["text"] for one in found}) > 1


def test_every_answer_comes_with_its_question_and_reference(base):
    found = generate_answers(*base, QUESTIONS, 2, 1)
    assert [(one["prompt"], one["reference"]) for one in found] == [
        ("What is the capital of Kelthia?", "The capital of Kelthia is Pinemoor."),
        ("Why?", "Because."),
        ("What does the hungry meadowgoat look for, and where does the willowtoad live?", "Figs."),
        ("Bye.", "Bye."),
    ]


def test_drawn_answers_repeat_with_their_seed_and_no_other(base):
    def draw(seed: int) -> list[str]:
        return [
            one["text"] for one in generate_answers(*base, QUESTIONS, 4, 12, temperature=1.5, top_p=0.95, seed=seed)
        ]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9, "seed": 3}])
def test_the_run_s_own_state_stays_as_it_is(base, sampling):
    model, tokenizer = base
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model.train()
    model.config.use_cache = False
    generate_answers(model, tokenizer, QUESTIONS, 2, 4, **sampling)
    assert torch.equal(torch.rand(3), expected)
    assert model.training and model.config.use_cache is False
    model.eval()


def test_questions_are_padded_on_the_left(chat_tokenizer):
    tokenizer, _, _ = chat_tokenizer("tiny", "chatml")
    parrot = Parrot([[5]] * 2, 0)
    generate_answers(parrot, tokenizer, QUESTIONS[:2], 2, 1)
    longer, shorter = (tokenizer(text, add_special_tokens=False).input_ids for text in PROMPTS[:2])
    padding = len(longer) - len(shorter)
    assert parrot.input_ids.tolist() == [longer, [tokenizer.pad_token_id] * padding + shorter]
    assert parrot.attention_mask.tolist() == [[1] * len(longer), [0] * padding + [1] * len(shorter)]
    assert parrot.options.do_sample is False


@pytest.mark.parametrize("both", [True, False])
def test_an_answer_ends_before_its_first_stop_token(chat_tokenizer, both):
    tokenizer, _, new = chat_tokenizer("tiny", "chatml")
    word, other = tokenizer(" toad fox", add_special_tokens=False).input_ids[:2]
    end, eos, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id, tokenizer.pad_token_id
    said = [[word, end, pad, pad], [word, other, word, other], [end, word, word, end], [word, eos, pad, pad]]
    questions = [QUESTIONS[0]] * 4
    found = generate_answers(Parrot(said, [end, eos] if both else end), tokenizer, questions, 4, 4)
    toad, fox = tokenizer.decode([word]), tokenizer.decode([other])
    last = (toad, True) if both else (toad + "<|endoftext|>" * 3, False)  # a stop token it was not told of is a text
    assert [(one["text"], one["stops"]) for one in found] == [
        (toad, True), (toad + fox + toad + fox, False), ("", True), last
    ]  # fmt: skip


def test_the_last_answer_is_asked_for_and_what_follows_it_left_out():
    messages = [say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", "d"), say("user", "e")]
    assert split_last_answer(messages) == (messages[:3], "d")


def test_an_answer_that_is_not_trained_on_is_no_reference():
    untrained, partly = say("assistant", "d") | {"train": False}, say("assistant", "d") | {"train_detail": []}
    start = [say("user", "a"), say("assistant", "b"), say("user", "c")]
    assert split_last_answer([*start, untrained]) == (start[:1], "b")
    assert split_last_answer([*start, partly]) == (start[:1], "b")


@pytest.mark.parametrize(
    ("messages", "can_be"),
    [
        ([say("user", "a"), say("assistant", "b") | {"train": False}], False),
        ([say("user", "a"), say("assistant", "b")], True),
        ([say("assistant", "b")], False),
        ([say("user", "a"), {"role": "assistant", "content": "", "tool_calls": [{}]}], False),
    ],
)
def test_an_answer_alone_or_a_call_is_nothing_to_ask_for(messages, can_be):
    assert is_answerable(messages) is can_be


def test_a_batch_ends_when_every_answer_has_ended_or_repeats_itself():
    prompt, cycle, pad, novel = [7] * 16, [1, 2, 3, 4] * 16, [0] * 64, list(range(100, 164))
    stop = AllRepeat(prompt=16)

    def ends(*answers: list[int]) -> list[bool]:
        return stop(torch.tensor([prompt + answer for answer in answers]), None).tolist()

    assert ends(cycle, pad) == [True, True]
    assert ends(cycle, novel) == [False, False]
    assert ends(cycle[:-1] + [9], pad) == [False, False]
    assert ends(cycle[:48], pad[:48]) == [False, False]  # too early to tell
