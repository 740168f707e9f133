"""The command with FSDP on a CPU: accelerate 1.15 shards over GPUs alone (state.py, AcceleratorState), torch over gloo, too."""

from functools import wraps
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from sft_recipes.__main__ import main

initialize = AcceleratorState.__init__


@wraps(initialize)
def initialize_sharded(
    self: AcceleratorState, *arguments: Any, fsdp_plugin: FullyShardedDataParallelPlugin | None = None, **options: Any
) -> None:
    """accelerate's state, in which the processes of a CPU are sharded as those of GPUs are."""
    first = not AcceleratorState._shared_state
    initialize(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if first and fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = initialize_sharded
    main()
