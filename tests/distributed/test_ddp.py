"""DistributedDataParallel: two processes with half of the batch each train like one with all of it."""

import contextlib

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from training import KINDS, adamw, assert_ranks, assert_same, batches, build, by_name, gradients, train

STEPS = 3
# Settings of the wrapper, of checkpointing, and what is compiled
WAYS = {
    "plain": {},
    "static-graph": dict(static_graph=True),
    "bucket-view": dict(gradient_as_bucket_view=True),
    "checkpointed": dict(use_reentrant=False),
    "checkpointed-reentrant": dict(use_reentrant=True),
    "compiled-layers": dict(compiled="layers"),
    "compiled-wrapper": dict(compiled="wrapper"),
    "zero": dict(zero=True),
}


def wrapped(model, use_reentrant=None, compiled=None, zero=None, **settings):
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if compiled == "layers":
        for layer in model.deberta.encoder.layer:
            layer.compile(backend="eager")
    wrapper = DistributedDataParallel(model, **settings)
    return torch.compile(wrapper, backend="eager") if compiled == "wrapper" else wrapper


def trained(kind, name, way):
    model = wrapped(build(kind, name), **WAYS[way])
    optimizer = adamw(model)
    if way == "zero":
        optimizer = adamw(model, ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW)
    return train(model, batches(STEPS, torch.distributed.get_rank()), optimizer)


@pytest.mark.parametrize(
    "kind, name", [("native", "v1"), ("native", "v3"), ("patched", "v1"), ("patched", "v3"), ("unpadded", "v2")]
)
def test_training(kind, name, processes):
    assert_ranks(processes.run(trained, kind, name, "plain"), train(build(kind, name), batches(STEPS)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_ways(kind, way, processes):
    assert_ranks(processes.run(trained, kind, "v3", way), train(build(kind), batches(STEPS)))


def accumulated(kind):
    """Two batches of one row each, of which only the second reduces gradients."""
    model = DistributedDataParallel(build(kind))
    (batch,) = batches(1, torch.distributed.get_rank())
    for row in range(2):
        with model.no_sync() if row == 0 else contextlib.nullcontext():
            (model(**{name: x[row : row + 1] for name, x in batch.items()}).loss / 2).backward()
    return gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation(kind, processes):
    expected = train(build(kind), batches(1))["gradients"]
    for got in processes.run(accumulated, kind):
        assert_same(got, expected)


def with_unused(kind):
    model = build(kind)
    torch.manual_seed(0)
    model.unused = nn.Linear(3, 3)
    return model


def trained_with_unused(kind):
    wrapper = DistributedDataParallel(with_unused(kind), find_unused_parameters=True)
    return train(wrapper, batches(STEPS, torch.distributed.get_rank()))


@pytest.mark.parametrize("kind", KINDS)
def test_an_unused_parameter(kind, processes):
    expected = train(with_unused(kind), batches(STEPS))
    assert "unused.weight" not in expected["gradients"] and "unused.weight" in expected["weights"]
    assert_ranks(processes.run(trained_with_unused, kind), expected)


def every_parameter_is_used(kind, head):
    """The second step raises, unless find_unused_parameters is set, if a parameter got no gradient in the first."""
    wrapper = DistributedDataParallel(build(kind, "v3", head))
    train(wrapper, batches(2, torch.distributed.get_rank(), head))
    return sorted(by_name(wrapper).keys() - gradients_after(wrapper, head).keys())


def gradients_after(wrapper, head):
    wrapper(**batches(1, torch.distributed.get_rank(), head)[0]).loss.backward()
    return gradients(wrapper)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForQuestionAnswering"])
def test_no_parameter_is_unused(kind, head, processes):
    assert processes.run(every_parameter_is_used, kind, head) == [[], []]
