"""What is asked for in a set of conversations: types of task, verbs, lengths, turns, and where they are narrow."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import log
from typing import Any

from sft_recipes.curation.filters import count_words, detect_language, last_answer, load_detector, refusal
from sft_recipes.curation.patterns import NOT_VERBS, TASKS
from sft_recipes.curation.words import Conversation, join_messages, split_words


def classify_task(conversation: Conversation) -> str:
    """The type of task of the first instruction, `conversation` for three turns and more without another sign.

    >>> classify_task({"messages": [{"role": "user", "content": "Translate to French: hello"}]})
    'rewriting'
    """
    asked = [str(m.get("content") or "") for m in conversation.get("messages", []) if m["role"] == "user"]
    first = asked[0].strip().lower()[:2000] if asked else ""
    found = next((task for task, pattern in TASKS.items() if re.search(pattern, first)), None)
    return found or ("conversation" if len(asked) > 2 else "other")


def leading_verb(conversation: Conversation) -> tuple[str, str] | None:
    """The word that opens the instruction, where it can be a verb, and the next one that can be its object."""
    words = [word for word in split_words(join_messages(conversation, "user")[:200]) if word != "please"]
    if not words or words[0] in NOT_VERBS or not words[0].isalpha():
        return None
    return words[0], next((word for word in words[1:6] if word not in NOT_VERBS and word.isalpha()), "")


def describe_diversity(
    conversations: Sequence[Conversation], count: Callable[[str], int] = count_words
) -> dict[str, Any]:
    """`tasks`, `verbs` and `languages` with their numbers, quantiles of lengths in tokens and how many rows are of each
    length (`length_counts`), turns, refusals, the entropy of the tasks in bits, and `warnings` in words.

    `languages` are None where no detector is installed, and those that are not sure are `unknown`.
    """
    tasks = Counter(map(classify_task, conversations))
    pairs = Counter(filter(None, map(leading_verb, conversations))).most_common()
    verbs, objects = Counter(), defaultdict(dict)
    for (verb, what), number in pairs:
        verbs[verb] += number
        if what and len(objects[verb]) < 5:
            objects[verb][what] = number
    lengths = {
        name: [count(join_messages(c, role)) for c in conversations]
        for name, role in (("instruction_tokens", "user"), ("answer_tokens", "assistant"))
    }
    detected = Counter(detect_language(last_answer(c)) or "unknown" for c in conversations) if load_detector() else None
    found = {
        "rows": len(conversations),
        "tasks": dict(tasks.most_common()),
        "task_entropy": sum(n / tasks.total() * log(tasks.total() / n, 2) for n in tasks.values()),  # in bits
        "verbs": dict(verbs.most_common(20)),
        "objects": {verb: objects[verb] for verb, _ in verbs.most_common(20)},  # the first five of each
        **{name: find_quantiles(values) for name, values in lengths.items()},
        "length_counts": {name: count_lengths(values) for name, values in lengths.items()},
        "languages": detected and dict(detected.most_common()),
        "turns": find_quantiles([sum(m["role"] == "user" for m in c["messages"]) for c in conversations]),
        "refusals": sum(refusal(c) is not None for c in conversations),
    }
    return found | {"warnings": warn_of_narrow_data(found, len(verbs))}


def find_quantiles(values: Sequence[int]) -> dict[str, int]:
    """The least, the quartiles and the most.

    >>> find_quantiles([1, 2, 3, 4, 50])
    {'least': 1, 'quarter': 2, 'half': 3, 'three quarters': 4, 'most': 50}
    """
    ranked = sorted(values) or [0]
    names = ("least", "quarter", "half", "three quarters", "most")
    return {name: ranked[round(part * (len(ranked) - 1) / 4)] for part, name in enumerate(names)}


def count_lengths(values: Sequence[int], bins: int = 20) -> dict[int, int]:
    """How many values there are from each bound to the next; those above 99 % of all are in the last bin.

    >>> count_lengths([3, 4, 4, 5, 9], bins=2)
    {3: 3, 5: 2}
    """
    ranked = sorted(values)
    if not ranked:
        return {}
    step = (ranked[int(0.99 * (len(ranked) - 1))] - ranked[0]) // bins + 1
    found = Counter(min((value - ranked[0]) // step, bins - 1) for value in ranked)
    return {ranked[0] + step * place: found[place] for place in range(max(found) + 1)}


def warn_of_narrow_data(found: Mapping[str, Any], verbs: int) -> list[str]:
    """What of it is narrow, a sentence each; a set for one task may be so on purpose."""
    rows, warnings = found["rows"], []
    if rows < 50:
        return warnings
    task, number = next(iter(found["tasks"].items()))
    if task != "other" and number > 0.8 * rows:  # other is what no key word tells
        warnings.append(f"{number / rows:.0%} of the rows are {task}: what else the model can do may fade.")
    verb, number = next(iter(found["verbs"].items()), ("", 0))
    if number > 0.5 * rows:
        warnings.append(
            f"{number / rows:.0%} of the instructions begin with {verb!r}, so that few ways to ask are learnt."
        )
    lengths = found["answer_tokens"]
    if lengths["three quarters"] <= 1.2 * lengths["quarter"]:
        span = f"{lengths['quarter']} to {lengths['three quarters']}"
        warnings.append(f"Half of the answers are {span} tokens long: the model will learn that length.")
    if found["refusals"] > 0.05 * rows:
        warnings.append(f"{found['refusals'] / rows:.0%} of the answers refuse.")
    return warnings
