"""The package as it is installed: a wheel, built from what git would track, and the editable install."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support.paths import ROOT

SAY_WHERE = "import sft_recipes; print(sft_recipes.__file__)"


def run(*command: str, where: Path, **environment: str) -> str:
    """What the command prints; fails with all it said where it does not exit with 0."""
    found = subprocess.run(command, cwd=where, env=os.environ | environment, capture_output=True, text=True)
    assert found.returncode == 0, f"{' '.join(command)}\n{found.stdout}\n{found.stderr}"
    return found.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of every file that is tracked, and of the package's that are new and not ignored."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    folder = tmp_path_factory.mktemp("wheel") / "sources"
    listed = run("git", "ls-files", "-z", where=ROOT)
    new = ["--others", "--exclude-standard", "sft_recipes", "hydra_plugins", "conf", "recipes"]
    listed += run("git", "ls-files", "-z", *new, where=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def installed(sources) -> Path:
    """The folder into which the wheel was installed, nothing else with it."""
    target = sources.parent / "installed"
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(sources.parent), where=sources)
    (wheel,) = sources.parent.glob("sft_recipes-*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check",
        "--target", str(target), str(wheel), where=sources.parent)  # fmt: skip
    return target


def files(root: Path, *patterns: str) -> set[str]:
    """The names under `root`, below it, of files that match."""
    found = [path for pattern in patterns for path in root.glob(pattern) if path.is_file()]
    return {path.relative_to(root).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_every_config_recipe_template_and_the_tiny_model(sources, installed):
    package = installed / "sft_recipes"
    assert files(package, "conf/**/*") == files(sources, "conf/**/*")
    assert files(package, "recipes/**/*") == files(sources, "recipes/**/*")
    for folder in ("encoding/templates", "tiny"):
        assert files(package, f"{folder}/**/*") == files(sources / "sft_recipes", f"{folder}/**/*")
    assert files(package, "**/*.py") == files(sources / "sft_recipes", "**/*.py")
    assert files(package, "encoding/templates/chatml.jinja", "tiny/model/model.safetensors", "conf/config.yaml") == {
        "encoding/templates/chatml.jinja", "tiny/model/model.safetensors", "conf/config.yaml"
    }  # fmt: skip


def test_the_wheel_holds_nothing_but_the_package(installed):
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"sft_recipes", "hydra_plugins", "bin"}
    assert (installed / "bin" / "sft-recipes").is_file()


def test_the_wheel_is_small(sources):
    (wheel,) = sources.parent.glob("sft_recipes-*.whl")
    assert wheel.stat().st_size < 10_000_000


def test_the_installed_wheel_composes_a_recipe_in_a_foreign_folder(installed, tmp_path):
    path = {"PYTHONPATH": str(installed)}
    assert run(sys.executable, "-c", SAY_WHERE, where=tmp_path, **path).strip() == str(
        installed / "sft_recipes" / "__init__.py"
    )
    lima = run(sys.executable, "-m", "sft_recipes", "+recipe=lima", "--cfg", "job", where=tmp_path, **path)
    assert "\nname: lima\n" in lima and "\n  id: HuggingFaceTB/SmolLM2-1.7B\n" in lima
    tiny = run(sys.executable, "-m", "sft_recipes", "--cfg", "job", "--resolve", where=tmp_path, **path)
    assert f"\n  id: {installed / 'sft_recipes' / 'tiny' / 'model'}\n" in tiny
    assert "+recipe=" in run(sys.executable, "-m", "sft_recipes", "--help", where=tmp_path, **path)


def test_the_editable_install_composes_a_recipe_in_a_foreign_folder(tmp_path):
    place = run(sys.executable, "-c", SAY_WHERE, where=tmp_path).strip()
    if place != str(ROOT / "sft_recipes" / "__init__.py"):
        pytest.skip(f"the package is installed in {place}")
    lima = run(sys.executable, "-m", "sft_recipes", "+recipe=lima", "--cfg", "job", where=tmp_path)
    script = run(str(Path(sys.executable).parent / "sft-recipes"), "+recipe=lima", "--cfg", "job", where=tmp_path)
    assert "\nname: lima\n" in lima and script == lima


def test_the_oldest_releases_that_are_tested_are_those_that_are_allowed():
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+).*", line).groups() for line in allowed if ">=" in line)
    pins = [f"{name}=={bounds[name]}" for name in ("trl", "transformers", "peft", "datasets")]
    assert f"VENV=.venv-oldest PINS='{' '.join(pins)}'" in run("make", "-n", "test-oldest", where=ROOT)
