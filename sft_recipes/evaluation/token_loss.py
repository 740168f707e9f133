"""The loss on held-out rows, a mean over supervised tokens, and where it comes from: source, turn, position, length."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sft_recipes.data.token_rows import flat_values, row_arrays, row_lengths
from sft_recipes.encoding.encoder import IGNORE_INDEX
from sft_recipes.modeling.inference import bf16_autocast, eval_mode


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Dataset, batch_size: int
) -> list[np.ndarray]:
    """For every row its tokens' losses in nats, but the first's: NaN where a token carries none.

    Needs the fused LM head that TRL's trainer gives a model (`trl.trainer.utils.add_fused_lm_head`), which makes no
    logits. Several processes share the rows, in equal numbers of batches, since a sharded model needs them all.
    """
    ids, labels = row_arrays(rows, "input_ids"), row_arrays(rows, "labels")
    order = np.argsort([-len(row) for row in ids], kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    first = torch.distributed.get_rank() if processes > 1 else 0
    batches += [batches[-1]] * (-len(batches) % processes)
    found = []
    with eval_mode(model), bf16_autocast(model):
        off = {"disable": True} if first > 0 or len(batches) < 100 else {}  # else as TQDM_DISABLE says
        for chosen in tqdm(batches[first::processes], desc="Losses", leave=False, **off):
            inputs = tokenizer.pad(
                {"input_ids": [ids[i].tolist() for i in chosen]}, padding_side="right", return_tensors="pt"
            ).to(model.device)
            wanted = [torch.tensor(labels[i], dtype=torch.int64, device=model.device) for i in chosen]
            wanted = pad_sequence(wanted, batch_first=True, padding_value=IGNORE_INDEX)
            out = model(**inputs, labels=wanted, fused_lm_head=True, use_cache=False)
            losses = -out.log_probs.float().masked_fill(~out.label_mask, torch.nan)
            losses = losses[:, losses.shape[1] + 1 - inputs.input_ids.shape[1] :].cpu().numpy()  # no virtual tokens
            found += [(int(i), losses[place, : len(ids[i]) - 1]) for place, i in enumerate(chosen)]
    if processes > 1:
        torch.distributed.all_gather_object(shares := [None] * processes, found)
        found = chain.from_iterable(shares)
    by_row = dict(found)
    return [by_row[i] for i in range(len(ids))]


def break_down_loss(rows: Dataset, losses: Sequence[np.ndarray], stop: int, names: Sequence[str]) -> dict[str, Any]:
    """`loss`, its parts by `source`, `turn`, `position` and `length`, in nats a token, and `p_stop`.

    `p_stop` is the mean probability of the stop token where an answer truly ends. `names` are the sources', to which
    the rows' column `source` points, where they have one. The loss is the same at every batch size, unlike TRL's, a
    mean of the batches' means.
    """
    lengths, names = row_lengths(rows), names if "source" in rows.column_names else []
    sources = flat_values(rows, "source") if names else None
    labels = np.concatenate([row[1:] for row in row_arrays(rows, "labels")])
    row_of, loss = np.repeat(np.arange(len(rows)), lengths - 1), np.concatenate(losses)
    there = ~np.isnan(loss)
    new_row = np.append(True, row_of[1:] != row_of[:-1])
    begins = there & (new_row | ~np.append(False, there[:-1]))
    before = np.cumsum(begins)  # answers begun so far, in all rows
    turn = before - np.maximum.accumulate(np.where(new_row, before - begins, 0))
    stops = there & (labels == stop)
    found = {"loss": float(loss[there].mean()), "rows": len(rows), "tokens": int(there.sum())}
    found |= {"p_stop": float(np.exp(-loss[stops]).mean())} if stops.any() else {}
    parts = {
        "source": {name: sources[row_of] == index for index, name in enumerate(names)},
        "turn": {"first": turn <= 1, "later": turn > 1},
        "position": {"stop": stops, "other": ~stops},
        "length": length_quartiles(lengths, row_of),
    }
    for part, masks in parts.items():
        found[part] = {key: float(loss[there & mask].mean()) for key, mask in masks.items() if (there & mask).any()}
    return found


def length_quartiles(lengths: np.ndarray, row_of: np.ndarray) -> dict[str, np.ndarray]:
    """Which tokens stand in the shortest quarter of the rows, and so on; rows of one length stay together.

    >>> quartiles = length_quartiles(np.array([2, 3, 4, 9]), np.array([0, 1, 2, 3, 3]))
    >>> {key: mask.sum().item() for key, mask in quartiles.items()}
    {'2 to 2 tokens': 1, '3 to 3 tokens': 1, '4 to 4 tokens': 1, '9 to 9 tokens': 2}
    """
    edges = np.quantile(lengths, [0.25, 0.5, 0.75])
    quarter = np.searchsorted(edges, lengths, side="left")
    parts = {}
    for number in np.unique(quarter):
        some = lengths[quarter == number]
        parts[f"{some.min()} to {some.max()} tokens"] = (quarter == number)[row_of]
    return parts


def flatten_loss(found: Mapping[str, Any]) -> dict[str, float]:
    """The measured numbers as one level of names, as a log and a tracker take them.

    >>> flatten_loss({"loss": 1.0, "rows": 3, "p_stop": 0.5, "turn": {"first": 2.0}, "length": {"2 to 9 tokens": 1.0}})
    {'loss': 1.0, 'p_stop': 0.5, 'loss_turn_first': 2.0, 'loss_length_1': 1.0}
    """
    numbers = {key: found[key] for key in ("loss", "p_stop") if key in found}
    for part in ("source", "turn", "position", "length"):
        for place, (key, value) in enumerate(found.get(part, {}).items(), start=1):
            numbers[f"loss_{part}_{place if part == 'length' else key}"] = value
    return numbers
