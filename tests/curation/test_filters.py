"""Filters: what each calls bad, and the good rows beside it that it leaves alone."""

import pytest

from sft_recipes.curation.filters import FILTERS
from sft_recipes.errors import ConfigError


def talk(answer: str, question: str = "Tell me something.") -> dict:
    """One question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


LONG_QUESTION = "Please list the four seasons of the year in their order"
BAD = [
    ("near_empty_answer", talk("Ok.")),
    ("near_empty_answer", talk("...")),
    ("encoding_damage", talk("The cafÃ© is open.")),
    ("encoding_damage", talk("It costs 5 \ufffd a day.")),
    ("template_tokens", talk("Paris.<|im_end|>")),
    ("template_tokens", talk("Yes.\nHuman: And then?")),
    ("repetition", talk("moon " * 200)),
    ("repetition", talk("\n".join(["The same long line comes again."] * 9 + ["And one other line of text."]))),
    (
        "repetition",
        talk(
            "It was a bright cold day and the clocks struck thirteen. "
            + "I will go to the sea and look for it. " * 7
            + "Nobody came along that long road after noon, so we left our boots behind them and sang."
        ),
    ),
    ("abrupt_end", talk("```python\nprint(1)")),
    ("abrupt_end", talk("First wash the rice. Then boil the water in a large pot, and add the")),
    ("abrupt_end", talk("First wash the rice. Then boil the water in a large pot and stir it slo")),
    ("abrupt_end", talk("First wash the rice and then boil the water in a large pot and stir it slo")),
    ("abrupt_end", talk("Man wäscht zuerst den Reis und kocht dann das Wasser in einem großen Top")),
    ("echo", talk(LONG_QUESTION + ".", LONG_QUESTION)),
    ("boilerplate", talk("As an AI language model, I find Rome old.")),
    ("refusal", talk("I'm sorry, but I can't help with that.")),
    ("refusal", talk("Lo siento, no puedo ayudar con eso.")),
    ("refusal", talk("抱歉，我无法回答这个问题。")),
    ("instruction_length", talk("Fine, thank you.", "Hi")),
    ("answer_length", talk("Paris.")),
]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
GOOD = [
    ("answer_length", {"messages": [{"role": "user", "content": "What time is it?"}, CALL]}),
    ("near_empty_answer", talk("Paris")),
    ("near_empty_answer", talk("42")),
    ("encoding_damage", talk("São Paulo, café, naïve, “quoted” — 5 €.")),
    ("template_tokens", talk("Use ### for a heading and <s> is not HTML's strong.".replace("<s> ", ""))),
    ("repetition", talk(" ".join(f"word{n}" for n in range(40)))),
    ("repetition", talk("<table>" + "<tr><td>Ann</td><td>30</td></tr>" * 20 + "</table>")),
    ("repetition", talk("| a | b |\n" * 30)),
    (
        "repetition",
        talk(
            "It was a bright cold day and the clocks struck thirteen. "
            + "I will go to the sea and look for it. " * 2
            + "Nobody came."
        ),
    ),
    ("abrupt_end", talk("The Art of Fugue by Johann Sebastian Bach")),
    (
        "abrupt_end",
        talk("The Life and Strange Surprizing Adventures of Robinson Crusoe of York Mariner Written by himself"),
    ),
    (
        "abrupt_end",
        talk("He has three bags of them. Each bag holds five of them, so that\nhe has 3 * 5 = 15 apples left"),
    ),
    ("abrupt_end", talk("Buy these. Then cook:\n- rice\n- water from the tap and a little salt")),
    ("abrupt_end", talk("ประเทศไทยเป็นประเทศที่ตั้งอยู่ในเอเชียตะวันออกเฉียงใต้")),
    ("abrupt_end", talk("First wash the rice. Then boil it for ten minutes in salted water and serve it hot.")),
    ("echo", talk("Spring, summer, autumn and winter follow each other in this order.", LONG_QUESTION)),
    ("boilerplate", talk("A language model predicts the next token.")),
    ("refusal", talk("He said: I'm sorry, but I can't help with that.")),
    ("instruction_length", talk("Fine.", "How are you today, my friend?")),
    ("answer_length", talk("word " * 30)),
]


@pytest.mark.parametrize(("name", "conversation"), BAD)
def test_a_bad_row_is_named_with_its_reason(name, conversation):
    assert FILTERS[name](conversation)


@pytest.mark.parametrize(("name", "conversation"), GOOD)
def test_a_good_row_is_left_alone(name, conversation):
    assert FILTERS[name](conversation) is None


def test_an_answer_in_another_language_is_named_and_a_name_is_in_none():
    pytest.importorskip("py3langid")
    german = talk("Das Brot geht auf, weil die Hefe Zucker in Gas verwandelt, das im Teig bleibt.")
    assert FILTERS["language"](german) == "the answer's language is de"
    assert FILTERS["language"](german, keep=["en", "de"]) is None
    assert FILTERS["language"](talk("Das Brot")) is None
    assert FILTERS["language"](talk("The bread rises because yeast turns sugar into gas that stays inside.")) is None


def test_without_a_detector_the_language_filter_says_what_to_install(monkeypatch):
    monkeypatch.setattr("sft_recipes.curation.filters.load_detector", lambda: None)
    with pytest.raises(ConfigError, match=r"pip install 'sft-recipes\[curate\]'"):
        FILTERS["language"](talk("A sentence of more than twenty letters."))
