"""The command: `python -m sft_recipes +recipe=lima`."""

import gc
import logging
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from traceback import clear_frames

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.main import get_args_parser
from hydra.types import RunMode
from omegaconf import DictConfig

from sft_recipes.config.command_line import VERBS, next_commands, prepare_command, raise_usage_error, rerun_command
from sft_recipes.config.config_files import TRUST_FLAG, check_choices
from sft_recipes.config.hydra_errors import USER_ERRORS, user_message
from sft_recipes.config.hydra_plugin import config_folder, register_with_hydra
from sft_recipes.config.offline import hub_is_reachable, needs_hub
from sft_recipes.config.own_configs import store_resumed_run
from sft_recipes.config.reference import describe_topic
from sft_recipes.config.run_folder import holds_run, remove_if_nothing_was_run
from sft_recipes.config.schema import from_hydra
from sft_recipes.errors import ConfigError, RunInterrupted, await_first, exit_on_user_error, is_first_process, one_line
from sft_recipes.reporting.sweep_report import finish_sweep

log = logging.getLogger("sft_recipes")
register_with_hydra()
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # our own line says it, once
logging.getLogger("huggingface_hub").propagate = False  # it prints with a handler of its own


def run_job(composed: DictConfig) -> float:
    """One job: the mode's module does it, and its objective goes back to Hydra's sweeper."""
    register_with_hydra()  # a process that joblib starts has not run this file
    folder = Path(HydraConfig.get().runtime.output_dir)
    failure = folder / "error.txt"
    failure.unlink(missing_ok=True)
    if not is_first_process():
        logging.getLogger().setLevel(logging.ERROR)
    gc.collect()  # a trainer and its parts name each other, so the job before this one holds its model until then
    try:
        config = from_hydra(composed)
        check_choices(composed, HydraConfig.get(), GlobalHydra.instance().config_loader())
        typed = HydraConfig.get().overrides.task
        if HydraConfig.get().job.config_name == "demo" and any(override.startswith("data=") for override in typed):
            line = "No model or recipe was named: this is the tiny demo model, at its own rate and max_length. "
            log.warning("%sFor a real one add +recipe=single_gpu_24gb, or model=NAME.", line)
        for override in typed if HydraConfig.get().mode == RunMode.RUN and not config.lr_find else ():
            if override.startswith(("+where=", "+sweep=")):
                log.warning("%s is for a sweep's jobs, and this is one run here. Write -m in front.", override)
        if needs_hub(config) and not hub_is_reachable():  # use what is cached; the hub's client would retry for 47 s
            os.environ["HF_HUB_OFFLINE"] = "1"
        if config.mode in ("curate", "generate") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError(f"mode={config.mode} works in one process. Start it without torchrun.")
        config = replace(config, command=rerun_command(HydraConfig.get()))
        if HydraConfig.get().mode == RunMode.MULTIRUN and holds_run(folder):  # an earlier start of the sweep began it
            resumed = config.trainer.fields | {"resume_from_checkpoint": True}
            config = replace(config, trainer=replace(config.trainer, fields=resumed))
        objective = import_module(f"sft_recipes.{config.mode}").main(config, folder)
        if is_first_process() and (folder / "report.html").is_file() and HydraConfig.get().mode == RunMode.RUN:
            print(f"\n{next_commands(folder, config.mode)}")
        return objective
    except Exception as error:
        await_first()
        mistake = isinstance(error, USER_ERRORS)
        reason = user_message(error) if mistake else f"{type(error).__name__}: {one_line(error)}"
        log.error(reason if mistake else "The run failed.", exc_info=not mistake)
        if HydraConfig.get().mode == RunMode.RUN:
            if mistake:
                remove_if_nothing_was_run(folder)
            sys.exit(2 if mistake else 1)  # a raise would make Hydra print more
        error.logged = True
        failure.write_text(f"{reason}\n", encoding="utf-8")
        release_traceback_frames(error)
        raise


def leave_process_group() -> None:
    """Ends the threads of gloo, torch's backend for a CPU: one that still runs when Python exits may abort the process.

    NCCL's group is left as it is: to end it is to wait for the other processes, which a mistake may have stopped.
    """
    torch = sys.modules.get("torch")  # only who trained has it
    if torch and torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def release_traceback_frames(error: BaseException | None) -> None:
    """Empties the frames of an exception and of those behind it: a sweep keeps it, and with it the model on the GPU."""
    while error:
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@exit_on_user_error()
def main() -> None:
    """Reads the command line; exits with 2 and one line for a user's mistake, 130 or 143 after a signal, 1 for ours."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints tracebacks of its own and exits with 1
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy CPU, waiting threads took the demo from 22 to 137 s
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every run otherwise
    if not is_first_process():
        os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    sys.path.append(os.getcwd())  # for a formatter of the user's, also under the console script
    if sys.argv[1:] and sys.argv[1] in VERBS:
        return import_module(f"sft_recipes.{VERBS[sys.argv[1]]}").main(sys.argv[2:])
    try:
        resumed = sys.argv[1:2] == ["resume"]
        if resumed:
            if len(sys.argv) < 3 or "=" in sys.argv[2]:
                raise ConfigError("Name the run: python -m sft_recipes resume outputs/NAME/DATE [key=value].")
            ours = ("hydra.run.dir=", "overwrite=", "mode=")
            if fixed := [word for word in sys.argv[3:] if word.lstrip("+").startswith(ours)]:
                raise ConfigError(f"{fixed[0]}: a run that is resumed trains on in its own folder. Leave that out.")
            sys.argv[1:3] = ["--config-name", store_resumed_run(Path(sys.argv[2]))]
        trusted = TRUST_FLAG in sys.argv  # which Hydra does not know
        sys.argv[1:] = [word for word in sys.argv[1:] if word != TRUST_FLAG]
        parser = get_args_parser()
        parser.error = raise_usage_error  # argparse would print its usage, too
        options = parser.parse_intermixed_args()
        if options.help and options.overrides and "=" not in options.overrides[0]:
            return print(describe_topic(options.overrides[0]))
        wanted = "hydra.sweep.dir=multirun/NAME" if options.multirun else "hydra.run.dir=outputs/NAME"
        named = resumed or any(wanted.partition("=")[0] in override for override in options.overrides)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not named:
            raise ConfigError(f"torchrun starts several processes: name their folder with {wanted}.")
        if not options.shell_completion:
            sys.argv[1:] = prepare_command(sys.argv[1:], options, trusted)
            sys.argv += [] if is_first_process() else ["hydra.output_subdir=null"]
        try:
            hydra.main(version_base="1.3", config_path=str(config_folder("conf")), config_name="config")(run_job)()
        finally:  # also after Ctrl-C and after a job that failed
            try:
                failed = finish_sweep()
            finally:
                leave_process_group()
        if failed:
            sys.exit(1)
    except RunInterrupted as stop:
        sys.exit(stop.code)  # it has been logged
    except Exception as error:
        if hasattr(error, "logged"):
            sys.exit(2 if isinstance(error, USER_ERRORS) else 1)
        if not isinstance(error, (*USER_ERRORS, OSError, ValueError)):  # those are Hydra's, before any job
            raise
        raise ConfigError(user_message(error)) from error


if __name__ == "__main__":
    main()
