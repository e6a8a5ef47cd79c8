"""FSDP2: two processes with half of the batch and of every parameter each train like one with all of it."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from training import CLASSIFIER, KINDS, MODELS, assert_ranks, assert_same, batches, build, gradients, train

import deberta_fast

STEPS = 3


def sharded(model, encoder=False, **options):
    """Shards the layers, perhaps the encoder, and the rest."""
    for layer in model.deberta.encoder.layer:
        fully_shard(layer, **options)
    if encoder:
        fully_shard(model.deberta.encoder, **options)
    return fully_shard(model, **options)


def plain(model):
    return sharded(model)


def encoder_too(model):
    return sharded(model, encoder=True)


def not_resharded(model):
    return sharded(model, reshard_after_forward=False)


def offloaded(model):
    return sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return sharded(model)


def checkpointed_reentrant(model):
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return sharded(model)


def wrapped(model, kind=CheckpointImpl.NO_REENTRANT):
    layers = set(model.deberta.encoder.layer)
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda layer: checkpoint_wrapper(layer, checkpoint_impl=kind),
        check_fn=layers.__contains__,
    )
    return sharded(model)


def wrapped_reentrant(model):
    return wrapped(model, CheckpointImpl.REENTRANT)


def compiled_layers(model):
    for layer in model.deberta.encoder.layer:
        layer.compile(backend="eager")
    return sharded(model)


WAYS = (
    plain, encoder_too, not_resharded, offloaded, checkpointed, checkpointed_reentrant, wrapped, wrapped_reentrant,
    compiled_layers,
)  # fmt: skip


def trained(shard, kind, name="v3", head=CLASSIFIER):
    model = shard(build(kind, name, head))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return train(model, batches(STEPS, torch.distributed.get_rank(), head))


@pytest.mark.parametrize("kind, name", [*MODELS, ("unpadded", "v2")])
def test_training(kind, name, processes):
    assert_ranks(processes.run(trained, plain, kind, name), train(build(kind, name), batches(STEPS)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: way.__name__)
def test_ways(kind, way, processes):
    assert_ranks(processes.run(trained, way, kind), train(build(kind), batches(STEPS)))


def patched_after(encoder):
    model = deberta_fast.patch(sharded(build("hf"), encoder))
    return train(model, batches(STEPS, torch.distributed.get_rank()))


@pytest.mark.parametrize("encoder", [False, True], ids=["layers", "encoder-too"])
def test_patched_after(encoder, processes):
    assert_ranks(processes.run(patched_after, encoder), train(build("patched"), batches(STEPS)))


def accumulated(kind):
    model = sharded(build(kind))
    (batch,) = batches(1, torch.distributed.get_rank())
    for row in range(2):
        model.set_requires_gradient_sync(row == 1)
        (model(**{name: x[row : row + 1] for name, x in batch.items()}).loss / 2).backward()
    return gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation(kind, processes):
    expected = train(build(kind), batches(1))["gradients"]
    for got in processes.run(accumulated, kind):
        assert_same(got, expected)


def in_bfloat16(kind):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    got = train(sharded(build(kind), mp_policy=policy), batches(1, torch.distributed.get_rank()))
    assert all(x.dtype == torch.float32 for x in got["gradients"].values())
    return got["gradients"]


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision(kind, processes):
    """Gradients are at most twice as far from the exact ones as those of one process whose model is bfloat16."""
    from hf_models import assert_as_precise

    exact = train(build(kind).double(), batches(1))["gradients"]
    eager = train(build(kind).bfloat16(), batches(1))["gradients"]
    first, second = processes.run(in_bfloat16, kind)
    assert_same(second, first, 0)
    in_order = lambda found: [[found[name].to(exact[name].dtype) for name in exact]]
    assert_as_precise(in_order(first), in_order(eager), in_order(exact))


def language_model(model):
    """The head multiplies with the word embeddings, so both are one group."""
    fully_shard([model.deberta.embeddings, model.lm_predictions])
    return sharded(model)


@pytest.mark.parametrize("way", [plain, language_model], ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_language_model(name, way, processes):
    expected = train(build("native", name, "ForMaskedLM"), batches(STEPS, head="ForMaskedLM"))
    found = processes.run(trained, way, "native", name, "ForMaskedLM")
    assert_ranks(found, expected)


def embeddings_apart():
    model = build("native", "v3", "ForMaskedLM")
    fully_shard(model.deberta.embeddings)
    with pytest.raises(RuntimeError, match=r"fully_shard\(\[model.deberta.embeddings, model.lm_predictions\]\)"):
        sharded(model)(**batches(1, 0, "ForMaskedLM")[0])


def test_a_language_model_whose_embeddings_are_a_group_of_their_own(processes):
    processes.run(embeddings_apart)


class Doubling:
    """A layer whose result a patched encoder could not give."""

    def forward(self, *arguments, **keywords):
        states, *others = super().forward(*arguments, **keywords)
        return 2 * states, *others


def with_own_layer():
    model = build("hf")
    layer = model.deberta.encoder.layer[0]
    layer.__class__ = type("OwnLayer", (Doubling, type(layer)), {})
    return model


def fallback_of_own_layer():
    model = deberta_fast.patch(sharded(with_own_layer()))
    with pytest.warns(UserWarning, match="FSDPOwnLayer has a forward of its own"):
        return model(**batches(1)[0]).loss.item()


def test_a_layer_of_ones_own_is_not_fused(processes):
    expected = with_own_layer()(**batches(1)[0]).loss.item()
    assert processes.run(fallback_of_own_layer) == [pytest.approx(expected, rel=1e-5)] * 2
