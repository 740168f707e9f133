"""The issues of all rows counted, with what is done about them; and whether training shows what serving would."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from sft_recipes.config.options import CheckPolicy
from sft_recipes.config.schema import Config
from sft_recipes.data.formatters import Conversation
from sft_recipes.data.issues import FIELD_ISSUES, ISSUE_BIT, ISSUES, NOTES, ROLE_ORDER, THINKS_BIT
from sft_recipes.data.long_rows import apply_max_length_policy
from sft_recipes.data.token_rows import audit_entry, count_tokens, flat_values, row_arrays, row_lengths, take_rows
from sft_recipes.encoding.encoder import Encoder, Piece
from sft_recipes.encoding.rendering import list_strings, remove_markers
from sft_recipes.errors import ConfigError, DataError, plural

log = logging.getLogger(__name__)


def check_rows(
    name: str, rows: Dataset, config: Config, max_length: int | None, long_rows: str, held_out: set[int], seen: set[int]
) -> tuple[Dataset, Dataset, dict[str, Any]]:
    """One source's rows with all issues set in their `problems`, those that the policies keep, and the audit's entries.

    `held_out` are the keys of the held-out rows, and `seen` those of earlier rows, which grow by these. Raises
    DataError for the first issue whose policy is `raise`.
    """
    problems, long = flat_values(rows, "problems").copy(), row_lengths(rows) > (max_length or np.inf)
    for index, row in enumerate(row_arrays(rows, "input_ids")):
        key = hash(row.tobytes())
        if key in seen:
            problems[index] |= ISSUE_BIT["duplicate"]
        if key in held_out:
            problems[index] |= ISSUE_BIT["in_held_out"]
            problems[index] &= ~ISSUE_BIT["leak"]  # which is counted once
        seen.add(key)
    is_raw = flat_values(rows, "piece") >= 0
    problems |= np.where(is_raw, ISSUE_BIT["cut_into_pieces"], ISSUE_BIT["truncated"]) * long
    rows = rows.remove_columns("problems").add_column("problems", problems)
    kept, issues = apply_policy(name, rows, config.data_checks)
    kept, cut = apply_max_length_policy(name, kept, max_length, long_rows)
    return rows, kept, issues | cut


def apply_policy(name: str, rows: Dataset, policy: CheckPolicy) -> tuple[Dataset, dict[str, Any]]:
    """The rows that the policy keeps, and the count and first twenty row numbers of every problem that was found.

    Where a problem is one of fields it also has their names, with the number of rows. Raises DataError for the first
    problem whose policy is `raise`.
    """
    found, numbers = flat_values(rows, "problems"), flat_values(rows, "row")
    record, gone = {}, np.zeros(len(rows), dtype=bool)
    for problem in (*ISSUES, *NOTES):
        hit = (found & ISSUE_BIT[problem]) > 0
        if not hit.any():
            continue
        action = NOTES.get(problem) or getattr(policy, problem)
        record[problem] = audit_entry(numbers[hit], action)
        if problem == "unrolled":
            record[problem]["tokens"] = int(row_lengths(rows)[hit].sum())
        if problem in FIELD_ISSUES:
            named = rows.select(np.flatnonzero(hit))["fields"]
            counts = Counter(field for row in named for field in json.loads(row)[problem])
            record[problem]["fields"] = dict(counts.most_common())
        listed = ", ".join(map(str, record[problem]["first"][:5]))
        if action == "raise":
            raise DataError(
                f"data.{name}: {hit.sum():,} of {plural(len(rows), 'row')} {'has' if hit.sum() == 1 else 'have'} "
                f"{describe_issue(problem, record[problem])} "
                f"(row {listed}…): {ISSUE_DESCRIPTIONS[problem]}. Fix them, or write data_checks.{problem}=drop (or "
                "keep)."
            )
        if action == "drop":
            gone |= hit
    rows = rows.remove_columns("fields")
    return (take_rows(rows, np.flatnonzero(~gone)) if gone.any() else rows), record


def describe_issue(issue: str, entry: Mapping[str, Any]) -> str:
    """An issue's name, with the fields that it is about."""
    return " ".join([issue, *list(entry.get("fields", []))[:5]])


ISSUE_DESCRIPTIONS = {
    "nothing_supervised": "no token of them carries loss",
    "stop_not_supervised": "an answer ends without its stop token, so the model would not learn to stop; it should "
    "stand within the chat template's {% generation %} block",
    "marked_untrained": "they say themselves that they are not to be trained on",
    "empty_thought": "an answer begins with a thought that says nothing, which would teach a model not to think",
    "content_missing": "the chat template leaves out something that they say",
    "whitespace_trimmed": "the chat template cuts spaces or line breaks at the ends of what they say",
    "unread_field": "the formatter does not read it, and it is not known to be metadata",
    "blank_question": "they answer an empty question",
    "roles_out_of_order": "their turns do not alternate",
    "typed_control_token": "they spell out a special token",
    "double_bos_or_eos": "BOS or EOS stands twice in a row",
    "duplicate": "they repeat an earlier row token for token",
    "in_held_out": "they are also held out",
    "template_inserted": "the chat template begins their answers with something that they do not say",
    "unrolled": "the chat template shows their history otherwise than the present turn",
    "history_differs": "the chat template shows their history otherwise than the present turn, and it is trained so",
    "leak": "they are near-duplicates of held-out rows or share their passages",
    "truncated": "they are longer than trainer.max_length",
    "cut_into_pieces": "they are raw text longer than trainer.max_length",
    "fully_truncated": "nothing supervised is left of them",
}


# What is done with rows that stay, as the log says it
ACTIONS = {
    "truncated": "cut, their stop tokens gone",
    "cut_into_pieces": "cut into {pieces:,} pieces, none of which is lost",
    "template_inserted": "trained without it",
    "empty_thought": "trained without it",
    "unrolled": "an answer each beside the whole rows (data.NAME.unroll)",
    "history_differs": "trained as the whole row shows them",
}


def count_rows(audit: dict[str, Any], name: str, kept: Dataset, issues: Mapping[str, dict]) -> None:
    """Adds rows of a source to its audit, all of them or a batch of a stream's; what is new of it the log says."""
    log_issues(name, {key: found for key, found in issues.items() if key not in {"unusable", *audit["problems"]}})
    for key, value in ({"kept": len(kept)} | count_tokens(kept)).items():
        audit[key] = audit.get(key, 0) + value
    for key, found in issues.items():
        old = audit["problems"].get(key, {})
        counts = {unit: value + old.get(unit, 0) for unit, value in found.items() if isinstance(value, int)}
        if "fields" in found:
            counts["fields"] = dict((Counter(old.get("fields")) + Counter(found["fields"])).most_common())
        audit["problems"][key] = found | counts | {"first": (old.get("first", []) + found["first"])[:20]}
    bits = flat_values(kept, "problems")[flat_values(kept, "piece") < 0]
    if not (bits & (THINKS_BIT | ISSUE_BIT["empty_thought"] | ISSUE_BIT["template_inserted"])).any():
        return  # the template has no place for thoughts
    thinking, old = int(((bits & THINKS_BIT) > 0).sum()), audit.get("thoughts", {"with": 0, "without": 0})
    new = {"with": old["with"] + thinking, "without": old["without"] + len(bits) - thinking}
    audit["thoughts"] = new
    if all(new.values()) and not all(old.values()):
        log.warning(
            "data.%s: %s a thought before the answer and %s none, so that the model learns to do both. Train one "
            "kind, or tell them apart by a setting of the template (data.%s.chat_template_kwargs).",
            name, *(plural(number, "row has", "rows have") for number in new.values()), name,
        )  # fmt: skip


def count_faults(where: str, on_error: str, faults: list[tuple[int, str]], total: int) -> dict[str, Any]:
    """The audit's entry for rows that could not be read or formatted, which the log says; none where there are none.

    Raises DataError, which shows the first five, unless they may be dropped.
    """
    if not faults:
        return {}
    shown = "; ".join(fault.rstrip(".") for _, fault in sorted(faults)[:5])
    counted = f"{where}: {len(faults)} of {total} rows cannot be used: {shown}{'; …' if len(faults) > 5 else ''}."
    said = counted if len(faults) > 1 else f"{where} {shown}."
    if on_error == "raise":
        raise DataError(f"{said} Fix {'them' if len(faults) > 1 else 'it'}, or write {where}.on_error=drop.")
    log.warning("%s Dropped.", said)
    return {"unusable": audit_entry(sorted(number for number, _ in faults), "drop")}


def log_issues(name: str, problems: Mapping[str, Mapping[str, Any]]) -> None:
    """Says in the log which rows are dropped or cut, how many tokens are lost to it, and what of them is not read."""
    for problem, found in problems.items():
        if problem == "unread_field" and found["policy"] == "keep":
            counts = ", ".join(f"{field} in {plural(rows, 'row')}" for field, rows in found["fields"].items())
            log.warning("data.%s: fields that are neither read nor known to be metadata: %s.", name, counts)
        trained = (problem, found["policy"]) == ("empty_thought", "keep")
        if found["policy"] == "drop" or (problem in ACTIONS and not trained):
            action = "dropped" if found["policy"] == "drop" else ACTIONS[problem].format(**found)
            action += f", with {plural(found['tokens'], 'token')}" if "tokens" in found else ""
            listed = ", ".join(map(str, found["first"][:5]))
            quiet = found["policy"] != "drop" and problem != "truncated"
            log.log(
                logging.INFO if quiet else logging.WARNING, "data.%s: %s (%s: %s) %s %s (row %s…).",
                name, plural(found["rows"], "row"), describe_issue(problem, found), ISSUE_DESCRIPTIONS[problem],
                "is" if found["rows"] == 1 else "are", action, listed,
            )  # fmt: skip


def row_hashes(rows: Dataset) -> set[int]:
    """The rows' token ids as one number each, by which repeats are found."""
    return {hash(row.tobytes()) for row in row_arrays(rows, "input_ids")}


def check_train_serve_parity(encoder: Encoder, conversations: Sequence[Conversation]) -> None:
    """Raises ConfigError where training shows another context before an answer than serving would.

    The saved tokenizer renders the history with its own template, on the day that training renders. Before a first
    answer the ids have to be equal, before a last one the text: an earlier answer is encoded by itself when it is
    trained, and with the line break before it when it is history. Rows with typed special tokens are the exception, as
    serving would take them for real ones; rows whose turns do not alternate are served in no other way than they are
    written.
    """
    template = encoder.tokenizer.chat_template
    template = remove_markers(encoder.chat_template) if "strftime_now" in template else template
    trained, served, first = [], [], []
    try:
        for conversation in conversations:
            if "text" in conversation or any(map(encoder.has_typed_token, list_strings(conversation))):
                continue
            messages = [
                {key: value for key, value in message.items() if key not in ("train", "train_detail")}
                for message in conversation["messages"]
            ]
            if not ROLE_ORDER.fullmatch("".join(message["role"][0] for message in messages)):
                continue
            answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            for turn in {answers[0], answers[-1]}:
                context = encoder.contexts(conversation | {"messages": messages[: turn + 1], "train": True}, "last")[-1]
                prompt = encoder.tokenizer.apply_chat_template(
                    messages[:turn],
                    tools=conversation.get("tools") or None,
                    add_generation_prompt=True,
                    tokenize=False,  # but as it does it, below, where all prompts are tokenized at once
                    chat_template=template,
                    **context.conversation.get("chat_template_kwargs", {}),
                )
                trained.append(context.pieces[: context.answers[-1]])
                served.append(prompt)
                first.append(turn == answers[0])
    finally:  # before what the template refuses of a later one
        if served:
            compare_contexts(encoder, trained, served, first)


def compare_contexts(encoder: Encoder, trained: list[list[Piece]], served: list[str], first: list[bool]) -> None:
    """Raises ConfigError for the first context that serving would show otherwise; of a `first` answer, in other ids."""
    served_ids = encoder.tokenizer(served, add_special_tokens=False)["input_ids"]
    trained_ids = [ids.tolist() for ids in encoder.tokenized(trained)["input_ids"]]
    for *both, is_first in zip(trained_ids, served_ids, first, strict=True):
        if both[0] == both[1]:
            continue
        texts = list(map(encoder.tokenizer.decode, both))
        if texts[0] != texts[1] or is_first:
            raise ConfigError(
                f"model.chat_template: training shows …{texts[0][-40:]!r} before an answer, serving "
                f"…{texts[1][-40:]!r}. The text up to an answer should be what the template gives for the messages "
                "before it with add_generation_prompt."
            )
