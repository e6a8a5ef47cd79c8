"""Packed sequences in distributed training: two processes over gloo, against one process with the whole batch."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from native_models import build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

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


def model_of(name="v3"):
    return build(name, "ForSequenceClassification").train()


def gradients_of(model):
    full = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): full(p.grad)
        for name, p in model.named_parameters()
        if p.grad is not None
    }


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
    return gradients_of(wrapper)


def of_compiled_ddp(batch):
    wrapper = DistributedDataParallel(model_of())
    torch.compile(wrapper, backend="eager", dynamic=True)(**batch).loss.backward()
    return gradients_of(wrapper)


def of_alias_within(batch):
    wrapper = DistributedDataParallel(Calling(model_of()))
    wrapper(batch).loss.backward()
    return {name.removeprefix("model."): x for name, x in gradients_of(wrapper).items()}


def of_fsdp(batch, call=lambda model: model):
    model = model_of()
    for layer in model.deberta.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    call(model)(**batch).loss.backward()
    return gradients_of(model)


def of_fsdp_alias(batch):
    return of_fsdp(batch, lambda model: model.forward_packed)


def of_accelerate(batch):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    wrapper = accelerator.prepare(model_of())
    assert isinstance(wrapper, DistributedDataParallel)
    accelerator.backward(wrapper(**batch).loss)
    return gradients_of(wrapper)


WAYS = (of_ddp, of_compiled_ddp, of_alias_within, of_fsdp, of_fsdp_alias, of_accelerate)


def of_tensor_parallel():
    """Both processes see the whole batch, each with half of the heads."""
    model, mesh = model_of("v2"), init_device_mesh("cpu", (len(RANKS),))
    columns = ("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj")
    plan = {f"self.{name}": ColwiseParallel() for name in columns} | {"output.dense": RowwiseParallel()}
    for layer in model.deberta.encoder.layer:
        parallelize_module(layer.attention, mesh, plan)
    model(**WHOLE).loss.backward()
    return gradients_of(model)


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


def in_process(rank, port):
    torch.set_num_threads(1)
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(RANKS)), LOCAL_WORLD_SIZE=str(len(RANKS)),
        MASTER_ADDR="localhost", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.distributed.init_process_group("gloo")
    found = {way.__name__: way(BATCHES[rank]) for way in WAYS}
    found["of_tensor_parallel"] = of_tensor_parallel()
    found["refusals"] = refusals(BATCHES[rank])
    torch.distributed.destroy_process_group()
    return found


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def found():
    with ProcessPoolExecutor(len(RANKS), get_context("spawn")) as pool:
        port = free_port()
        return [future.result(timeout=300) for future in [pool.submit(in_process, rank, port) for rank in RANKS]]


@pytest.mark.parametrize("way", [*(way.__name__ for way in WAYS), "of_tensor_parallel"])
def test_every_process_has_the_whole_batchs_gradients(way, found):
    model = model_of("v2" if way == "of_tensor_parallel" else "v3")
    model(**WHOLE).loss.backward()
    expected = gradients_of(model)
    for got in (found[rank][way] for rank in RANKS):
        assert got.keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(got[name], x, rtol=0, atol=2e-6 * float(1 + x.abs().max()), msg=name)


def test_calls_past_the_wrapper_are_refused(found):
    for rank in RANKS:
        of_ddp, of_part, of_fsdp = found[rank]["refusals"]
        assert "DistributedDataParallel that holds the model" in of_ddp and of_part == of_ddp
        assert "DTensor" in of_fsdp  # torch's own words
