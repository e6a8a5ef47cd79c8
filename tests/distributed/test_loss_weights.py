"""Batches of different sizes, on several processes and accumulated, give the gradient of the mean over all items."""

import contextlib

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import CLASSIFIER, assert_same, build, gradients

from deberta_fast.data import PackedCollator
from deberta_fast.distributed import loss_weights

TOKENS = "ForTokenClassification"
# By rank and accumulated batch: lengths of the sequences, and how many tokens of each have a label. The second rank's
# first batch has no labelled token.
LENGTHS = [[[9, 31, 4], [12, 7]], [[25], [5, 6, 17, 3]]]
LABELLED = [[[2, 11, 4], [1, 0]], [[0], [5, 6, 9, 3]]]


def features(head, rank, index):
    generator = torch.Generator().manual_seed(10 * rank + index)
    found = []
    for length, labelled in zip(LENGTHS[rank][index], LABELLED[rank][index], strict=True):
        ids = torch.randint(1, 70, (length,), generator=generator)
        labels = ids % 2 if head == TOKENS else ids[0] % 2
        if head == TOKENS:
            labels[labelled:] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def collate(head, chosen):
    return PackedCollator(token_labels=head == TOKENS)(chosen)


def accumulated(kind, head, shard, weighted=True):
    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
    model = build(kind, "v3", head)
    if shard:
        for layer in model.deberta.encoder.layer:
            fully_shard(layer, mesh=mesh)
        model = fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    batches = [collate(head, features(head, rank, index)) for index in range(2)]
    weights = loss_weights([batch["labels"] for batch in batches], mesh)
    assert all(weight.dtype == torch.float32 for weight in weights)
    for index, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
        last = index == 1
        if shard:
            model.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if shard or last else model.no_sync():
            (model(**batch).loss * (weight if weighted else 0.5)).backward()
    return gradients(model)


@pytest.mark.parametrize("kind", ["native", "patched"])
@pytest.mark.parametrize("head", [CLASSIFIER, TOKENS])
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_gradients(kind, head, shard, processes):
    model = build(kind, "v3", head)
    everything = [x for rank in range(2) for index in range(2) for x in features(head, rank, index)]
    model(**collate(head, everything)).loss.backward()
    for got in processes.run(accumulated, kind, head, shard):
        assert_same(got, gradients(model))


def test_the_mean_of_means_is_another(processes):
    model = build("native", "v3", CLASSIFIER)
    everything = [x for rank in range(2) for index in range(2) for x in features(CLASSIFIER, rank, index)]
    model(**collate(CLASSIFIER, everything)).loss.backward()
    for got in processes.run(accumulated, "native", CLASSIFIER, False, False):
        with pytest.raises(AssertionError):
            assert_same(got, gradients(model))


def counted():
    rank = torch.distributed.get_rank()
    nothing = loss_weights([] if rank else [3, 1])
    return [loss_weights([3, 0] if rank else [1], torch.distributed.group.WORLD), nothing, loss_weights([0])]


def test_counts(processes):
    first, second = processes.run(counted)
    assert first == [[torch.tensor(0.5)], [torch.tensor(1.5), torch.tensor(0.5)], [torch.tensor(0.0)]]
    assert second == [[torch.tensor(1.5), torch.tensor(0.0)], [], [torch.tensor(0.0)]]


def test_one_process():
    labels = [torch.tensor([[0, 2, -100], [-1, 1, -100]]), torch.ones(3, 2), torch.ones(2, dtype=torch.bool), 2]
    assert torch.stack(loss_weights(labels)).tolist() == pytest.approx([0.3, 0.3, 0.2, 0.2])


def refusal():
    with pytest.raises(ValueError, match=r"mesh must have one dimension, got 2: mesh\[name\] selects one"):
        loss_weights([1], init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "other")))


def test_errors(processes):
    processes.run(refusal)
    with pytest.raises(TypeError, match=r"labels\[1\] must be a tensor or a number of items, got 1.5"):
        loss_weights([1, 1.5])
    with pytest.raises(ValueError, match=r"labels\[0\] must not be negative, got -1"):
        loss_weights([-1])
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, a ProcessGroup or None, got str"):
        loss_weights([1], "data")
