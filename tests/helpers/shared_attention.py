"""Attention over sequences that several processes share, as a function of whole tensors in the test's own process.

The processes compute forward, keep the graph, and compute backward when the test's autograd asks for it.
"""

from dataclasses import dataclass

import torch
from cases import DROPOUT_SEED, TENSORS
from processes import Processes

from deberta_fast.distributed import disentangled_attention_context_parallel
from deberta_fast.op.context_parallel import ring
from deberta_fast.op.context_parallel.stretches import even_stretches


@dataclass(frozen=True)
class Way:
    """How the processes compute: "gather" is a ring whose keys arrive at once.

    ``ends`` are those of packed sequences; the inputs are then a batch of one.
    """

    method: str
    lengths: tuple[int, ...] | None = None  # rows of each process; None divides them evenly
    ends: tuple[int, ...] | None = None
    backend: str | None = None


_kept: dict = {}  # in a process: the graph between forward and backward


def forward_of_rank(call, way: Way):
    group = torch.distributed.group.WORLD
    rows = call.query.shape[2]
    lengths = way.lengths or even_stretches(rows, group.size())
    start = sum(lengths[: group.rank()])
    stop = start + lengths[group.rank()]
    leaves = [None if x is None else x.detach() for x in call[:5]]
    leaves[:3] = [x[:, :, start:stop] for x in leaves[:3]]
    for x in leaves:
        if x is not None:
            x.requires_grad_()
    heads, mask, packed = leaves[:3], call.mask, {}
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, start:stop]
    if way.ends is not None:
        heads = [x.squeeze(0).transpose(0, 1) for x in heads]
        mask = None if mask is None else mask.reshape(-1)
        packed = {"cu_seqlens": torch.tensor(way.ends, dtype=torch.int32)}
    # The others draw something else; the first process's seed counts.
    torch.manual_seed(DROPOUT_SEED + group.rank())
    ring.GATHER_BYTES = 1 << 40 if way.method == "gather" else -1
    output, lse = disentangled_attention_context_parallel(
        *heads, *leaves[3:5], method="heads" if way.method == "heads" else "ring", attention_mask=mask,
        position_buckets=call.position_buckets, max_relative_positions=call.max_relative_positions,
        far_negative=call.far_negative, scale=call.scale, dropout_p=call.dropout_p, first_slot=call.first_slot,
        return_lse=True, backend=way.backend, **packed,
    )  # fmt: skip
    if packed:
        output, lse = output.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)
    _kept.update(leaves=leaves, results=(output, lse), rows=slice(start, stop))
    return output.detach(), lse.detach()


def backward_of_rank(grad_output, grad_lse):
    leaves, results, rows = (_kept.pop(name) for name in ("leaves", "results", "rows"))
    wanted = [x for x in leaves if x is not None]
    made = iter(torch.autograd.grad(results, wanted, (grad_output[:, :, rows], grad_lse[:, :, rows])))
    return [None if x is None else next(made) for x in leaves]


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, processes: Processes, call, way, *tensors):
        ctx.processes = processes
        named = dict(zip(TENSORS, (None if x is None else x.detach() for x in tensors), strict=True))
        found = processes.run(forward_of_rank, call._replace(**named), way)
        return tuple(torch.cat(parts, 2) for parts in zip(*found, strict=True))

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        found = ctx.processes.run(backward_of_rank, grad_output.contiguous(), grad_lse.contiguous())
        grads = [torch.cat([x[index] for x in found], 2) for index in range(3)]
        for index in (3, 4):
            for other in found[1:]:  # the sum over processes, on each of them
                assert (other[index] is None) == (found[0][index] is None)
                assert found[0][index] is None or torch.equal(other[index], found[0][index])
            grads.append(found[0][index])
        return None, None, None, *grads


def shared(processes: Processes, way: Way):
    """The function for ``comparison.compare``."""

    def attention(inputs):
        return _Shared.apply(processes, inputs, way, *(getattr(inputs, name) for name in TENSORS))

    return attention
