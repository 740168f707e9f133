"""Which formatter reads a source, by the names of its columns: what `formatter=auto` chooses."""

from collections.abc import Iterable, Mapping

from sft_recipes.errors import DataError

# The first whose columns are all there: alpaca rows often bring their rendered text, chats their prompt
BY_COLUMNS: dict[tuple[str, ...], dict[str, str]] = {
    ("messages",): {"name": "chatml"},
    ("conversations",): {"name": "sharegpt"},
    ("items",): {"name": "sharegpt", "conversations": "items"},
    ("instruction", "output"): {"name": "alpaca"},
    ("instruction", "response"): {"name": "alpaca", "output": "response"},
    ("question", "answer"): {"name": "alpaca", "instruction": "question", "output": "answer"},
    ("prompt", "completion"): {"name": "prompt_completion"},
    ("prompt", "response"): {"name": "prompt_completion", "completion": "response"},
    ("inputs", "targets"): {"name": "prompt_completion", "prompt": "inputs", "completion": "targets"},
    ("user", "assistant"): {"name": "prompt_completion", "prompt": "user", "completion": "assistant"},
    ("prompt", "message_tree_id"): {"name": "oasst"},
    ("text",): {"name": "text"},
}
LABELS = ("label", "labels", "label_text", "class", "target")
# Names that may mean more than one thing: the error proposes them, and the user decides
CHATS = ("conversation", "dialogue", "dialog", "chat", "turns")
QUESTIONS = ("instruction", "question", "query", "problem", "prompt", "input", "inputs", "user", "human", "request")
ANSWERS = ("output", "response", "answer", "completion", "solution", "target", "targets", "assistant", "gpt", "reply")


def detect_formatter(columns: Iterable[str]) -> dict[str, str]:
    """The formatter whose columns are there, and their names where they are not its own, as a config has it.

    Raises DataError where none is, or where the columns say that the text is no raw text; it proposes what to write.

    >>> detect_formatter(["instruction", "input", "output", "text"])
    {'name': 'alpaca'}
    >>> detect_formatter(["question", "context", "answer"])
    {'name': 'alpaca', 'instruction': 'question', 'output': 'answer', 'input': 'context'}
    """
    columns = list(columns)
    listed = f"the columns {', '.join(columns)}"
    found = next((choice for needed, choice in BY_COLUMNS.items() if {*needed} <= {*columns}), None)
    if found is None:
        way = f"Name one with its own, such as {propose_formatter(columns)}"
        if len(columns) == 1:
            mark = next((mark for mark in ";\t|" if mark in columns[0]), None)
            way = f'The cells seem to be separated: write "data.NAME.sep={mark!r}"' if mark else (
                f"{way}; rows under this key of a JSON document are read by data.NAME.field={columns[0]}"
            )  # fmt: skip
        raise DataError(f"no formatter reads {listed}. {way}.")
    if found["name"] == "text" and not {"role", "parent_id"}.isdisjoint(columns):
        raise DataError(
            f"{listed} are one message a row (text with role or parent_id), which is no raw text. formatter=oasst "
            "reads OpenAssistant's trees, such as 2023-04-12_oasst_ready.trees.jsonl.gz; else put the messages of a "
            "conversation into one row."
        )
    if found["name"] == "text" and (label := next((name for name in LABELS if name in columns), None)):
        raise DataError(
            f"{listed} are texts with a label. Write formatter='{{name: prompt_completion, prompt: text, completion: "
            f"{label}}}' to train the label, or formatter=text to train the text alone."
        )
    dolly = found["name"] == "alpaca" and "context" in columns and "input" not in columns
    return found | ({"input": "context"} if dolly else {})


def propose_formatter(columns: Iterable[str]) -> str:
    """The formatter that probably reads the columns, as a command line writes it.

    >>> propose_formatter(["id", "Query", "solution"])
    "formatter='{name: alpaca, instruction: Query, output: solution}'"
    """
    by_name = {column.lower(): column for column in columns}
    chat, question, answer = (
        next((by_name[name] for name in names if name in by_name), None) for names in (CHATS, QUESTIONS, ANSWERS)
    )
    if chat:
        return f"formatter={describe_choice({'name': 'sharegpt', 'conversations': chat})}"
    names = {"instruction": question, "output": answer} if question and answer else {}
    return f"formatter={describe_choice({'name': 'alpaca', 'instruction': 'question', 'output': 'answer'} | names)}"


def describe_choice(choice: Mapping[str, str]) -> str:
    """A formatter and its columns, as a command line writes them.

    >>> describe_choice({"name": "alpaca"}), describe_choice({"name": "alpaca", "output": "response"})
    ('alpaca', "'{name: alpaca, output: response}'")
    """
    if len(choice) == 1:
        return choice["name"]
    return "'{" + ", ".join(f"{key}: {value}" for key, value in choice.items()) + "}'"
