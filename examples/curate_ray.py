"""The filters of mode=curate over parquet beyond one machine, by Ray Data: `python examples/curate_ray.py IN OUT`.

IN has a column `messages`, OUT gets the folders curated and removed. Near-duplicates need all rows: mode=curate.
"""

import sys

import pyarrow
import ray

from sft_recipes.curation.filters import FILTERS
from sft_recipes.curation.selection import score_quality

NAMES = (
    "near_empty_answer",
    "encoding_damage",
    "template_tokens",
    "repetition",
    "abrupt_end",
    "refusal",
    "boilerplate",
)


def add_reasons(rows: pyarrow.Table) -> pyarrow.Table:
    """The rows with what each filter says of them, and their score."""
    talks = rows.to_pylist()
    reasons = [[f"{name}: {why}" for name in NAMES if (why := FILTERS[name](talk))] for talk in talks]
    rows = rows.append_column("reasons", pyarrow.array(reasons, pyarrow.list_(pyarrow.string())))
    return rows.append_column("score", pyarrow.array([score_quality(talk) for talk in talks]))


if __name__ == "__main__":
    found = ray.data.read_parquet(sys.argv[1]).map_batches(add_reasons, batch_format="pyarrow").materialize()
    found.filter(lambda row: not len(row["reasons"])).write_parquet(f"{sys.argv[2]}/curated")
    found.filter(lambda row: len(row["reasons"])).write_parquet(f"{sys.argv[2]}/removed")
