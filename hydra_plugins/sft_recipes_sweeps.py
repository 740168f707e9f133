"""Our sweepers under the names that conf/hydra/ gives them: Hydra takes plugins from this namespace alone."""

from sft_recipes.sweeps import job_folders


class GridSweeper(job_folders.GridSweeper):
    """hydra/sweeper=basic."""
