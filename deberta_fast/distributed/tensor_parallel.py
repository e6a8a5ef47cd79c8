"""Tensor parallel: each process computes some of the heads, and some of the feed-forward's width."""

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from ..hf.fallback import MARK, hf_class
from ..models.attention import DisentangledSelfAttention

# Projections to heads: of native models and Hugging Face's v2, then those of Hugging Face's v1
_TO_HEADS = (
    "query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj", "in_proj", "pos_proj", "pos_q_proj",
)  # fmt: skip


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """The plan with which torch's ``parallelize_module`` distributes the layers of every DeBERTa in ``model``.

        parallelize_module(model, mesh, tensor_parallel_plan(model))

    Projections of queries, keys, values and positions and the feed-forward's first layer are split by output, the
    layers behind them by input; all else is replicated. A layer communicates twice forward and twice backward: sums of
    tensors as large as its states, and of the gradients of the position table. Every process of the mesh gets the same
    batch and has the whole loss; gradients of replicated weights are equal on all of them, with nothing to average.
    Hidden dropout must draw the same masks everywhere: start the processes with the same seed. Attention dropout then
    draws one process's mask. Probabilities (output_attentions) are those of this process's heads.

    ``fully_shard`` comes after ``parallelize_module``, on the other dimension of the mesh; ``patch`` comes before.

    Args:
        model: a native or patched model, or a module that contains some. ``parallelize_module`` takes a 1-D mesh.

    Returns:
        The style of each module by its name in ``model``.

    Raises:
        ValueError: model contains no DeBERTa layer; or one is Hugging Face's and not patched, has talking heads, is
            distributed already, or has projections that are no Linear. ``parallelize_module`` raises it before it
            changes anything if the processes cannot divide num_attention_heads or intermediate_size evenly.
    """
    plan: dict[str, ParallelStyle] = {}
    for name, layer in _layers(model):
        prefix, attention = f"{name}." if name else "", layer.attention.self
        columns = [f"attention.self.{child}" for child in _TO_HEADS if hasattr(attention, child)]
        styles = dict.fromkeys([*columns, "intermediate.dense"], ColwiseParallel)
        styles |= dict.fromkeys(["attention.output.dense", "output.dense"], RowwiseParallel)
        _check(prefix, layer, list(styles))
        plan[name] = _Divided()
        plan |= {prefix + child: style() for child, style in styles.items()}
    if not plan:
        raise ValueError(f"model must contain a DeBERTa with its layers, got a {type(model).__name__} without any")
    # The checks of all layers come before any change.
    return dict(sorted(plan.items(), key=lambda item: not isinstance(item[1], _Divided)))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of DeBERTas with their names, native or Hugging Face's."""
    for name, module in model.named_modules():
        attention = getattr(getattr(module, "attention", None), "self", None)
        kind = None if attention is None else hf_class(type(attention))
        if isinstance(attention, DisentangledSelfAttention) or kind is not None:
            yield name, module


def _check(prefix: str, layer: nn.Module, children: list[str]) -> None:
    """Raises ValueError if the plan would compute something else."""
    attention = layer.attention.self
    if not (isinstance(attention, DisentangledSelfAttention) or MARK in vars(attention)):
        raise ValueError(
            "model must be native or patched: Hugging Face's own attention splits heads by their number, and would "
            "compute other scores from a part of them; call deberta_fast.patch(model) first"
        )
    if getattr(attention, "talking_head", False):
        raise ValueError(f"{prefix}attention.self has talking heads: each head reads all others, which are elsewhere")
    for child in children:
        linear = layer.get_submodule(child)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{prefix}{child} must be a torch.nn.Linear, got {type(linear).__name__}")
        if isinstance(linear.weight, DTensor):
            raise ValueError(f"{prefix}{child} is distributed already: make the plan first, then use fully_shard")


class _Divided(ParallelStyle):
    """Divides what is no Linear in a layer: the number of heads, and the biases beside Hugging Face's in_proj of v1."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        attention, processes = module.attention.self, device_mesh.size()
        sizes = {
            "num_attention_heads": attention.num_attention_heads,
            "intermediate_size": module.intermediate.dense.out_features,
        }
        for name, size in sizes.items():
            if size % processes:
                raise ValueError(f"{name} must be a multiple of the mesh's {processes} processes, got {size}")
        attention.num_attention_heads //= processes  # read by Hugging Face's own attention, if it has to run
        for name in ("q_bias", "v_bias"):
            if (bias := getattr(attention, name, None)) is not None:
                local = distribute_tensor(bias.detach(), device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
                setattr(attention, name, nn.Parameter(local, requires_grad=bias.requires_grad))
        return module
