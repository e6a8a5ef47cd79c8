"""Training steps of models that share sequences: wrappers, checkpointing, compilation; and what is refused."""

import time

import pytest
import torch
from native_models import inputs_of
from processes import Processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import MODELS, assert_ranks, batches, build, train

from deberta_fast import patch, unpatch
from deberta_fast.distributed import context_parallel, shard_batch, unshard
from deberta_fast.op.context_parallel import ring


@pytest.fixture(scope="module")
def processes():
    with Processes(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def three():
    with Processes(3) as pool:
        yield pool


@pytest.fixture(scope="module")
def four():
    with Processes(4) as pool:
        yield pool


def of_steps(kind, name, prepare=lambda model: model, method="ring"):
    """Steps of one process: DistributedDataParallel takes the mean of the gradients."""
    ring.GATHER_BYTES = -1
    model = context_parallel(build(kind, name), None, method)
    return train(DistributedDataParallel(prepare(model)), [shard_batch(batch) for batch in batches(3)])


def once(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def reentrant(model):
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model


def compiled(model):
    for layer in model.base_model.encoder.layer:
        layer.compile(backend="eager")
    return model


@pytest.mark.parametrize("kind, name", MODELS)
@pytest.mark.parametrize("method", ["ring", "heads"])
def test_steps(method, kind, name, processes):
    expected = train(build(kind, name), batches(3))
    assert_ranks(processes.run(of_steps, kind, name, plain, method), expected)


@pytest.mark.parametrize("name", ["v1", "v3"])
@pytest.mark.parametrize("kind", ["native", "patched"])
def test_steps_of_three(kind, name, three):
    assert_ranks(three.run(of_steps, kind, name), train(build(kind, name), batches(3)))


def plain(model):
    return model


@pytest.mark.parametrize("prepare", [once, reentrant, compiled], ids=lambda x: x.__name__)
@pytest.mark.parametrize("kind", ["native", "patched"])
def test_layers_run_again_or_compiled(kind, prepare, processes):
    expected = train(build(kind), batches(3))
    assert_ranks(processes.run(of_steps, kind, "v3", prepare), expected)


def on_mesh(kind, wrapper):
    """Two pairs of processes: each pair shares the sequences of its batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    model = context_parallel(build(kind), mesh["context"])
    data = [shard_batch(x, mesh["context"]) for x in batches(2, mesh.get_local_rank("data"))]
    if wrapper == "ddp":
        return train(DistributedDataParallel(model), data)
    everyone = mesh["data", "context"]._flatten("all")
    for layer in model.base_model.encoder.layer:
        fully_shard(layer, mesh=everyone)
    return train(fully_shard(model, mesh=everyone), data)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["native", "patched"])
def test_two_dimensions(kind, wrapper, four):
    assert_ranks(four.run(on_mesh, kind, wrapper), train(build(kind), batches(2)))


def under_autocast(kind):
    model = context_parallel(build(kind), None)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**shard_batch(batches(1)[0])).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("kind", ["native", "patched"])
def test_autocast(kind, processes):
    exact = build(kind)(**batches(1)[0]).loss
    with torch.autocast("cpu", torch.bfloat16):
        alone = build(kind)(**batches(1)[0]).loss
    found = processes.run(under_autocast, kind)
    assert found[0] == found[1]
    assert abs(found[0] - exact) <= 2 * abs(alone - exact) + 2**-8 * exact


def what_is_refused():
    """The errors of this process, by name."""
    rank, said = torch.distributed.get_rank(), {}
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("context", "other"))
    batch = batches(1)[0]
    model = context_parallel(build("native"), mesh["context"])
    patched = context_parallel(build("patched"), None)
    patched_otherwise = context_parallel(build("patched"), None)
    patched_otherwise.deberta.encoder.layer[0].attention.self.dropout.register_forward_hook(lambda *_: None)
    one_row = {name: x[:1] for name, x in batch.items()}
    other_ids = {name: x + 1 if name == "input_ids" else x for name, x in batch.items()}
    pairs = batch["attention_mask"][:, None, :, None] * batch["attention_mask"][:, None, None]
    calls = {
        "dimension": lambda: context_parallel(build("native"), mesh["ring"]),
        "two dimensions": lambda: context_parallel(build("native"), mesh),
        "method": lambda: context_parallel(build("native"), None, "rings"),
        "heads": lambda: context_parallel(build("native", num_attention_heads=1), None, "heads"),
        "talking": lambda: context_parallel(build("native", "v1-talking-heads"), None),
        "unpatched": lambda: context_parallel(build("hf"), None),
        "neither": lambda: context_parallel(torch.nn.Linear(1, 1), None),
        "batches differ": lambda: shard_batch(batch if rank else one_row),
        "ids differ": lambda: shard_batch(batch if rank else other_ids),
        "too short": lambda: shard_batch({"input_ids": batch["input_ids"][:, :1]}),
        "no ids on one": lambda: shard_batch(batch if rank else {"labels": batch["labels"]}),
        "rows differ": lambda: model(batch["input_ids"][: 1 + rank]),
        "pairs on one": lambda: model(batch["input_ids"], attention_mask=pairs if rank else None),
        "probabilities": lambda: model(**shard_batch(batch), output_attentions=True),
        "unpatch": lambda: unpatch(patched),
        "patch again": lambda: patch(patched),
        "encoder alone": lambda: patched.deberta.encoder(torch.randn(1, 5, 64), torch.ones(1, 5)),
        "not fused": lambda: patched(**shard_batch(batch), output_attentions=True),
        "layer not fused": lambda: patched_otherwise(**shard_batch(batch)),
        "backend": lambda: (model.set_backend("reference"), model(**shard_batch(batch))),
    }
    for name, call in calls.items():
        try:
            call()
            said[name] = "nothing"
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def test_refusals(processes):
    first, second = processes.run(what_is_refused)
    parts = {
        "dimension": "Valid mesh_dim_names are ['context', 'other']",
        "two dimensions": "got 2 (context, other): mesh[name] selects one",
        "method": "method must be one of ('ring', 'heads'), got 'rings'",
        "heads": "heads that 2 processes divide, got 1",
        "talking": "talking heads",
        "unpatched": "call deberta_fast.patch(model) first",
        "neither": "got a Linear with neither",
        "batches differ": "the batch (its keys, shapes and the checksum of its ids) must be the same on all ranks",
        "ids differ": "checksum",
        "too short": "1 columns or rows cannot be cut for 2 processes",
        "rows differ": "the number of sequences",
        "probabilities": "output_attentions must be False",
        "unpatch": "context_parallel(model, False)",
        "patch again": "context_parallel(model, False)",
        "encoder alone": "call the patched model's forward",
        "not fused": "output_attentions must be False",
        "layer not fused": "processes share sequences, and this call is not fused: the attention's dropout is",
        "backend": "backend 'reference' has no backward over keys of several processes",
    }
    for name, part in parts.items():
        assert part in first[name] and part in second[name], (name, first[name], second[name])
    assert first["no ids on one"].startswith("TypeError: batch must have tensors, input_ids or inputs_embeds")
    assert second["no ids on one"].startswith("RuntimeError: rank 0 of 2 failed: TypeError: batch must have tensors")
    assert first["pairs on one"].startswith("RuntimeError: rank 1 of 2 failed: ValueError: attention_mask must be of")


def loses_the_other(timeout):
    """Rank 1 leaves in the middle of a forward pass."""
    from datetime import timedelta

    group = torch.distributed.new_group(timeout=timedelta(seconds=timeout))
    model = context_parallel(build("native"), group)
    batch = shard_batch(inputs_of("ForSequenceClassification", labels=True), group)
    if torch.distributed.get_rank() == 1:
        layer = model.base_model.encoder.layer[1]
        layer.forward = lambda *inputs: time.sleep(2 * timeout)
    start = time.monotonic()
    try:
        model(**batch)
    except (RuntimeError, TypeError, AttributeError) as error:
        return str(error), time.monotonic() - start


def test_a_lost_process_is_named():
    with Processes(2) as pool:
        (message, seconds), _ = pool.run(loses_the_other, 3)
    assert "rank 0 of 2 got no keys and values (rank 1) within" in message, message
    assert "timeout of the process group: 0:00:03" in message and seconds < 30


def of_unshard(dim):
    rank = torch.distributed.get_rank()
    part = torch.arange(12.0).view(3, 4).narrow(dim, rank, 1 + rank).contiguous().requires_grad_()
    whole = unshard(part, dim=dim)
    (whole * (1 + rank)).sum().backward()
    return whole.detach(), part.grad


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unshard(dim, processes):
    x = torch.arange(12.0).view(3, 4)
    expected = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 1, 2)], dim)
    for whole, gradient in processes.run(of_unshard, dim):
        assert torch.equal(whole, expected) and (gradient == 3).all()
