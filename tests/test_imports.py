"""The rooms hold: imports point as pyproject.toml says, files are short, and no test imports a test."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from pkgutil import iter_modules

import pytest

from support.paths import ROOT


def lint_imports(root: Path) -> str:
    """The contracts that the package below `root` breaks, a line each."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=root, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True)
    assert "Contracts:" in done.stdout, done.stdout + done.stderr
    return "\n".join(line for line in done.stdout.splitlines() if " BROKEN" in line)


def test_imports_point_the_way_of_the_rooms():
    assert lint_imports(ROOT) == ""


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("errors.py", "import sft_recipes.config.schema", "A module imports from the lines below"),
        ("encoding/encoder.py", "from sft_recipes.config import validation", "A module imports from the lines below"),
        ("modeling/loading.py", "from sft_recipes.data import packing", "A module imports from the lines below"),
        ("evaluation/suite.py", "from sft_recipes.training import memory", "A module imports from the lines below"),
        ("making/self_instruct.py", "from sft_recipes.training import memory", "A module imports from the lines below"),
        ("new_room.py", "import json", "A module imports from the lines below"),  # until it has its line there
        ("reporting/text.py", "from sft_recipes.reporting import run_report", "No circle of imports"),
        ("reporting/text.py", "from sft_recipes.data.formatters import alpaca", "Reports are made from files"),
        ("reporting/text.py", "import torch", "Config, reports and the formatters load no torch"),
        ("data/formatters.py", "import numpy", "Errors, formatters and validation need the standard library alone"),
        ("config/validation.py", "import omegaconf", "Errors, formatters and validation need the standard library"),
    ],
)
def test_a_wrong_import_breaks_its_contract(tmp_path, module, line, contract):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignored = shutil.ignore_patterns("tiny", "__pycache__")
    package = shutil.copytree(ROOT / "sft_recipes", tmp_path / "sft_recipes", ignore=ignored)
    with (package / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert contract in lint_imports(tmp_path)


def test_no_test_imports_another():
    found = []
    for path in ROOT.glob("tests/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path.name}: {name}" for name in names if re.match(r"(tests|conftest|test_.*)(\.|$)", name)]
    assert found == []


def test_the_package_s_top_has_at_most_twenty_rooms_and_verbs():
    found = {name for _, name, _ in iter_modules([str(ROOT / "sft_recipes")])} - {"__main__"}
    assert {"config", "errors", "train"} < found and len(found) <= 20, sorted(found)


def test_no_file_of_the_package_is_longer_than_250_lines():
    lengths = {
        path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("sft_recipes/**/*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 250} == {}
