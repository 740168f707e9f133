"""Our sweepers under the names that conf/hydra/ gives them: Hydra takes plugins from this namespace alone."""

from sft_recipes.sweeps import halving, job_folders, local_gpus, optuna_study, ray_train


class GridSweeper(job_folders.GridSweeper):
    """hydra/sweeper=basic."""


class OptunaSweeper(optuna_study.OptunaSweeper):
    """hydra/sweeper=optuna."""


class HalvingSweeper(halving.HalvingSweeper):
    """hydra/sweeper=halving."""


class LocalGpus(local_gpus.LocalGpus):
    """hydra/launcher=local_gpus."""


class RayTrain(ray_train.RayTrain):
    """hydra/launcher=ray_train."""
