"""Where things are in the repository, and the real tokenizers and rows beside it, if they are there."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
NEEDS_SHARED = "needs the real rows and tokenizers of ../shared/data"
TINY_MODEL = ROOT / "sft_recipes" / "tiny" / "model"
TEMPLATES = sorted(path.stem for path in (ROOT / "sft_recipes" / "encoding" / "templates").glob("*.jinja"))

ALL_TESTS = "ALL_TESTS" in os.environ  # make test-all: every recipe and notebook runs; otherwise some of each kind
ALL_FAULTS = "ALL_FAULTS" in os.environ  # make test-faults and .ci/run: runs are killed at every point
