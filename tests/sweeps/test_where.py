"""What `+where=` gives a launcher: GPUs or workers, time, and how often a job may be stopped."""

import pytest

SET = {
    "ray": ("sft_recipes_sweeps.RayTrain", "n_jobs: 1", "num_workers: 1", "use_gpu: true", "max_failures: 3"),
    "slurm": (
        "submitit_launcher.SlurmLauncher", "gpus_per_node: 1", "timeout_min: 240", "signal_delay_s: 300",
        "max_num_timeout: 20",
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", SET)
def test_a_launcher_gets_processes_time_and_how_often_it_may_start_again(command, where):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    code, printed, _ = command("+recipe=tiny", f"+where={where}", "--cfg", "hydra", "--package", "hydra.launcher")
    assert code == 0 and [line for line in SET[where] if f"{line}\n" not in printed] == []
