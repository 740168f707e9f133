"""Where a run took place, and the command that repeats it."""

import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig


def command() -> str:
    """What a user types to have this run again, with the overrides of this job alone."""
    hydra = HydraConfig.get()
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    options = [part for folder in folders for part in ("-cd", folder)]
    return shlex.join(["python", "-m", "sft_recipes", *options, *hydra.overrides.task])


def environment() -> dict[str, Any]:
    """Python, system, processors, GPUs, processes, and the commit of this library where it is a checkout."""
    gpus = torch.cuda.device_count()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if gpus else None,
        "gpus": gpus,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "commit": commit,
    }
