"""Self-Instruct (Wang et al. 2022, arXiv 2212.10560): new tasks from examples, with their filters."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random

from sft_recipes.curation.words import split_words
from sft_recipes.errors import DataError

SEEDS, OWN = 6, 2  # in-context examples of the seed tasks, and of those made so far (section 2.2)
# What cannot be done in writing alone; a task that asks for a program by name is over-represented in what models write
UNFIT = re.compile(
    r"\b(images?|pictures?|photos?|graphs?|charts?|diagrams?|maps?|videos?|audio|music|files?|draw|sketch|plot|go to)\b"
    r"|^write a program\b",
    re.IGNORECASE,
)


class TaskPool:
    """The instructions that there are, and which new ones may join them."""

    def __init__(self, seeds: Sequence[str], own: Sequence[str], limit: float):
        self.seeds, self.own, self.limit = list(seeds), list(own), limit
        self.words = [split_words(text) for text in (*seeds, *own)]

    def draw_examples(self, draw: Random) -> str:
        """Eight numbered instructions in an order of their own, two of them made ones, as soon as there are any."""
        own = draw.sample(self.own, min(OWN, len(self.own)))
        chosen = own + draw.sample(self.seeds, min(SEEDS + OWN - len(own), len(self.seeds)))
        draw.shuffle(chosen)
        return "\n".join(f"{number}. {text}" for number, text in enumerate(chosen, 1))

    def try_to_add(self, instruction: str) -> str | None:
        """Takes the instruction in; gives back the reason where it does not."""
        words = split_words(instruction)
        if not 3 <= len(words) <= 150:
            return f"it has {len(words)} words"
        if found := UNFIT.search(instruction):
            return f"it says {found[0]!r}, which is not done in writing alone"
        if not instruction[0].isalnum() and instruction[0] not in "\"'¿¡(":
            return f"it begins with {instruction[0]!r}"
        for other in self.words:
            if (score := measure_rouge_l(words, other, self.limit)) >= self.limit:
                return f"its ROUGE-L to another one is {score:.2f}"
        self.own.append(instruction)
        self.words.append(words)
        return None


def measure_rouge_l(first: Sequence[str], second: Sequence[str], least: float = 0.0) -> float:
    """ROUGE-L's F-measure (Lin 2004) of two lists of words; 0 where it is sure to be below `least`.

    The longest common subsequence is found for all of `second` at once, a bit a word (Hyyrö 2004):
    thousands of instructions are compared with each new one.

    >>> measure_rouge_l("the cat sat on the mat".split(), "the cat lay on a mat".split())
    0.6666666666666666
    """
    total = len(first) + len(second)
    if not total or 2 * min(len(first), len(second)) < least * total:
        return 0.0
    places: dict[str, int] = {}
    for place, word in enumerate(second):
        places[word] = places.get(word, 0) | 1 << place
    row = full = (1 << len(second)) - 1
    for word in first:
        shared = row & places.get(word, 0)
        row = (row + shared | row - shared) & full
    return 2 * (len(second) - row.bit_count()) / total


def parse_list(text: str) -> list[str]:
    """The items of a numbered list, each on lines of its own.

    >>> parse_list("Here you are:\\n9. Name a tree.\\n10) **Sing** a song\\nwith two verses.")
    ['Name a tree.', '**Sing** a song with two verses.']
    """
    items = re.split(r"^\s*\d+\s*[.):]\s*", text, flags=re.MULTILINE)[1:]
    return [" ".join(item.split()) for item in items if item.strip()]


def parse_instances(text: str) -> list[tuple[str, str]]:
    """Input and output of each example in a reply; the input is empty where it is none.

    >>> parse_instances("Label: spam\\nInput: Buy now!\\n\\nLabel: ham\\nInput: See you at 8.")
    [('Buy now!', 'spam'), ('See you at 8.', 'ham')]
    >>> parse_instances("**Input:** none\\n**Output:** Yes.")
    [('', 'Yes.')]
    """
    parts = re.split(r"^\W*(Input|Output|Label)\W*:\W*?(?=\S)(?:\*\*\s*)?", text, flags=re.MULTILINE)
    fields = [(name, part.strip()) for name, part in zip(parts[1::2], parts[2::2], strict=True)]
    found = []
    for (name, one), (other, two) in zip(fields[::2], fields[1::2], strict=False):
        if {name, other} in ({"Input", "Output"}, {"Input", "Label"}):
            given, answer = (one, two) if name == "Input" else (two, one)
            found.append(("" if re.fullmatch(r"\W*(none|n/?a|no input|keine?)?\W*", given, re.I) else given, answer))
    return found


def read_seed_tasks(path: str | None) -> list[str]:
    """The instructions of a .jsonl of seed tasks, ours where none is named; raises DataError where they are too few."""
    where = Path(path or Path(__file__).with_name("seed_tasks.jsonl"))
    try:
        rows = [json.loads(line) for line in where.read_text(encoding="utf-8").splitlines() if line.strip()]
        tasks = [row["instruction"] for row in rows if isinstance(row["instruction"], str)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"generate.source={where} should be a .jsonl with an instruction in each line ({error!r})."
        ) from error
    if len(tasks) < SEEDS + OWN:
        raise DataError(f"generate.source={where} has {len(tasks)} seed tasks. Write {SEEDS + OWN} at least.")
    return tasks


def fill_prompt(folder: str, name: str, **values: str) -> list[dict[str, str]]:
    """A prompt file with its {names} filled in, as a user's message; other braces stay."""
    text = Path(folder, name).read_text(encoding="utf-8")
    return [{"role": "user", "content": re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), text).strip()}]
