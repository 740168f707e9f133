"""Whether a run's arguments, or what started it, have its processes share one model."""

import os

from trl import SFTConfig


def is_sharded(arguments: SFTConfig) -> bool:
    """Whether FSDP or DeepSpeed shards the model, which is placed only when training starts.

    `accelerate launch --use_fsdp` says so by the environment alone.
    """
    by_launch = (os.environ.get(f"ACCELERATE_USE_{way}", "").lower() == "true" for way in ("FSDP", "DEEPSPEED"))
    return bool(arguments.deepspeed or (arguments.world_size > 1 and (arguments.fsdp or any(by_launch))))


def is_sharded_by_fsdp2(arguments: SFTConfig) -> bool:
    """Whether the model is sharded by FSDP2: trainer=fsdp, or `accelerate launch --use_fsdp --fsdp_version 2`."""
    version = arguments.fsdp_plugin_args["fsdp_version"] if arguments.fsdp else os.environ.get("FSDP_VERSION")
    return is_sharded(arguments) and not arguments.deepspeed and str(version) == "2"
