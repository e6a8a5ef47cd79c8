"""FSDP2 by accelerate on CPUs, where accelerate itself takes DistributedDataParallel and ignores the plugin."""

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def plugin_for(model) -> FullyShardedDataParallelPlugin:
    """Shards the layers and the rest of the model."""
    layer = type(model.deberta.encoder.layer[0]).__name__
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[layer],
        cpu_ram_efficient_loading=False,
    )


def sharding(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> Accelerator:
    """Puts the accelerator into the state that it would have on GPUs."""
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.is_fsdp2
    return accelerator
