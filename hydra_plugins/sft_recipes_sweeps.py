"""Our sweepers under the names that conf/hydra/ gives them: Hydra takes plugins from this namespace alone."""

from sft_recipes.sweeps import job_folders, optuna_study


class GridSweeper(job_folders.GridSweeper):
    """hydra/sweeper=basic."""


class OptunaSweeper(optuna_study.OptunaSweeper):
    """hydra/sweeper=optuna."""
