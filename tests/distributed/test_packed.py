"""Packed sequences in distributed training: two processes over gloo, against one process with the whole batch."""

import pytest
import torch
from native_models import build
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import assert_same, gradients

from deberta_fast.data import PackedCollator

LENGTHS = [[9, 31, 4], [12, 25, 17]]  # lengths of each process's sequences
RANKS = range(len(LENGTHS))


def features(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(1, 70, (n,), generator=generator), "labels": i % 2} for i, n in enumerate(lengths)
    ]


BATCHES = [PackedCollator()(features(LENGTHS[rank], rank)) for rank in RANKS]
WHOLE = PackedCollator()([x for rank in RANKS for x in features(LENGTHS[rank], rank)])


def model_of():
    return build("v3", "ForSequenceClassification").train()


def on_own_batch(way):
    return way(BATCHES[torch.distributed.get_rank()])


class Calling(nn.Module):
    """A user's module whose forward calls the alias ``forward_packed``; the wrapper sees the call of this module."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.forward_packed(**batch)


def of_ddp(batch):
    wrapper = DistributedDataParallel(model_of())
    wrapper(**batch).loss.backward()
    return gradients(wrapper)


def of_compiled_ddp(batch):
    wrapper = DistributedDataParallel(model_of())
    torch.compile(wrapper, backend="eager", dynamic=True)(**batch).loss.backward()
    return gradients(wrapper)


def of_alias_within(batch):
    wrapper = DistributedDataParallel(Calling(model_of()))
    wrapper(batch).loss.backward()
    return {name.removeprefix("model."): x for name, x in gradients(wrapper).items()}


def of_fsdp(batch, call=lambda model: model):
    model = model_of()
    for layer in model.deberta.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    call(model)(**batch).loss.backward()
    return gradients(model)


def of_fsdp_alias(batch):
    return of_fsdp(batch, lambda model: model.forward_packed)


def of_accelerate(batch):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    wrapper = accelerator.prepare(model_of())
    assert isinstance(wrapper, DistributedDataParallel)
    accelerator.backward(wrapper(**batch).loss)
    return gradients(wrapper)


WAYS = (of_ddp, of_compiled_ddp, of_alias_within, of_fsdp, of_fsdp_alias, of_accelerate)


def refusals(batch):
    """The errors of calls that bypass the wrapper. Calls without gradients or without a wrapper must succeed."""
    said = []
    wrapper = DistributedDataParallel(model_of())
    outer = DistributedDataParallel(Calling(model_of()))
    sharded = fully_shard(model_of())
    tokens = {name: x for name, x in batch.items() if name != "labels"}
    for call, inputs in (
        (wrapper.module.forward_packed, batch),
        (outer.module.model.deberta.forward_packed, tokens),
        (sharded.deberta.forward_packed, tokens),
    ):
        try:
            call(**inputs)
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    with torch.no_grad():
        wrapper.module.forward_packed(**batch)
    model_of().forward_packed(**batch).loss.backward()
    model = wrapper.module
    del wrapper, call
    model.forward_packed(**batch).loss.backward()
    return said


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_process_has_the_whole_batchs_gradients(way, processes):
    model = model_of()
    model(**WHOLE).loss.backward()
    for got in processes.run(on_own_batch, way):
        assert_same(got, gradients(model))


def test_calls_past_the_wrapper_are_refused(processes):
    for of_ddp, of_part, of_fsdp in processes.run(on_own_batch, refusals):
        assert "DistributedDataParallel that holds the model" in of_ddp and of_part == of_ddp
        assert "DTensor" in of_fsdp  # torch's own words
