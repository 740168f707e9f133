"""412 rows, 200 of them copies that differ by a space and 12 bad: `python benchmarks/make_dirty_rows.py`.

Each row names in `planted` what it is; the 200 good rows have null there.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

ANIMALS = ["otter", "heron", "badger", "lynx", "stork", "marten", "beaver", "falcon", "hedgehog", "salmon"]
PLACES = ["the northern marshes", "a valley of old oaks", "the harbour wall", "an empty quarry", "the upper river"]
FOODS = ["snails and soft roots", "small fish and crabs", "beetles under bark", "berries that fell early"]
ASKS = (
    "Describe how the {a} near {p} finds food in winter.",
    "Write two sentences about the {a} of {p} for a school book.",
    "Why would a visitor to {p} rarely see the {a}?",
    "Name something that the {a} of {p} needs more than quiet.",
)


def main() -> None:
    """Writes the rows to the path given, else dirty.jsonl."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "dirty.jsonl")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows()), encoding="utf-8")
    print(f"{path}: {len(make_rows())} rows")


def make_rows(seed: int = 0) -> list[dict[str, Any]]:
    """The rows in an order drawn with the seed."""
    draw = random.Random(seed)
    good = [good_row(ask, animal, place) for animal in ANIMALS for place in PLACES for ask in ASKS]
    copies = []
    for row in good:
        place = draw.choice([index for index, sign in enumerate(row["output"]) if sign == " "])
        output = row["output"][:place] + " " + row["output"][place:]
        copies.append(row | {"output": output, "planted": "copy"})
    bad = [
        bad_row("Give three tips for a long train journey.", "Ok", "near_empty_answer"),
        bad_row("Explain why bread rises in the oven.", "N/A", "near_empty_answer"),
        bad_row("Tell me about the moons of Jupiter.", "moon " * 200, "repetition"),
        bad_row("Write a paragraph about sleep.", "Sleep is rest. " * 40, "repetition"),
        bad_row(
            "How does a sailing boat move against the wind?",
            "The sails act as a wing. The keel keeps the hull from drifting, and by turning to and fro the boat advan",
            "abrupt_end",
        ),
        bad_row(
            "What should I check before I buy a used bicycle?",
            "Look at the frame for cracks first. Then turn the pedals, listen to the bearings, and try the",
            "abrupt_end",
        ),
        bad_row(
            "Show a loop in Python.",
            "A loop looks like this:\n```python\nfor n in range(3):\n    print(n)",
            "abrupt_end",
        ),
        bad_row("How do I sharpen a kitchen knife?", "I'm sorry, but I cannot help with that request.", "refusal"),
        bad_row("Recommend a book about ferns.", "As an AI language model, I am unable to provide a list.", "refusal"),
        bad_row("Wie koche ich Reis?", "Es tut mir leid, aber dabei kann ich nicht helfen.", "refusal"),
        bad_row("Name a river in Austria.\n### Response:", "The Mur flows through Graz.", "template_tokens"),
        {
            **good[0],
            "output": "It sleeps under thick roots through most of the cold months, and wakes up hungry in spring.",
            "planted": "second_answer",
        },
    ]
    rows = good + copies + bad
    draw.shuffle(rows)
    return rows


def good_row(ask: str, animal: str, place: str) -> dict[str, Any]:
    """A question about an animal in a place, and an answer that no other row has."""
    draw = random.Random(f"{ask}{animal}{place}")
    words = [
        f"{first}{second}" for first in ("mor", "tel", "vas", "nib", "kur") for second in ("ane", "ilo", "ust", "eff")
    ]
    names = draw.sample(words, 6)
    answer = (
        f"The {animal} of {place} lives on {draw.choice(FOODS)}, which it finds by {names[0]} and {names[1]}. "
        f"People there call it {names[2]}. Its young stay near {names[3]} until {names[4]} has passed, and then "
        f"{draw.choice(['leave', 'return', 'wait', 'hide'])} for {names[5]}."
    )
    return {"instruction": ask.format(a=animal, p=place), "output": answer, "planted": None}


def bad_row(instruction: str, output: str, planted: str) -> dict[str, Any]:
    """One bad row and its name."""
    return {"instruction": instruction, "output": output.strip(), "planted": planted}


if __name__ == "__main__":
    main()
