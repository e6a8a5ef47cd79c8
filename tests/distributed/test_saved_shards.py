"""Sharded models and optimizers are saved, resumed to the bit, and read by the other library under its names."""

import hf_models
import native_models
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from training import CLASSIFIER, KINDS, MODELS, adamw, assert_same, batches, build, by_name, train

import deberta_fast

FULL = StateDictOptions(full_state_dict=True)


def sharded(model):
    for layer in model.deberta.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def forgotten(model):
    """The model with other weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def resumed(kind, name, folder):
    """Returns what two steps give after two others, and after a checkpoint of these."""
    data = batches(4, torch.distributed.get_rank())
    model = sharded(build(kind, name))
    optimizer = adamw(model)
    train(model, data[:2], optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    weights, expected = by_name(model), train(model, data[2:], optimizer)

    model = forgotten(sharded(build(kind, name)))
    optimizer = adamw(model)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return weights, expected, train(model, data[2:], optimizer)


@pytest.mark.parametrize("kind, name", MODELS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_resumed(kind, name, processes, tmp_path):
    found = processes.run(resumed, kind, name, str(tmp_path))
    for _, expected, got in found:
        assert_same(got, expected, 0)  # to the bit
    model = forgotten(build(kind, name))
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)  # one process reads the shards of two
    model.load_state_dict(state["model"])
    assert_same(by_name(model), found[0][0], 0)


def full_state(kind, name):
    model = sharded(build(kind, name))
    state = get_model_state_dict(model, options=FULL)
    again = forgotten(sharded(build(kind, name)))
    set_model_state_dict(again, dict(state), options=FULL)  # it puts shards into the dict
    return state, by_name(again)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_whole_state(kind, name, processes):
    expected = by_name(build(kind, name))
    for state, loaded in processes.run(full_state, kind, name):
        assert_same({name: state[name] for name in expected}, expected, 0)
        assert_same(loaded, expected, 0)


def loss(model):
    with torch.no_grad():
        return model.eval()(**batches(1)[0]).loss


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_native_reads_a_patched_models_state(name, processes):
    state, _ = processes.run(full_state, "patched", name)[0]
    hf = hf_models.build(name, CLASSIFIER)
    kind = deberta_fast.DebertaForSequenceClassification if name == "v1" else None
    kind = kind or deberta_fast.DebertaV2ForSequenceClassification
    model = kind.from_pretrained(None, config=kind.config_class.from_dict(hf.config.to_dict()), state_dict=state)
    torch.testing.assert_close(loss(model), loss(hf))


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_hugging_face_reads_a_native_models_state(name, processes, tmp_path):
    state, _ = processes.run(full_state, "native", name)[0]
    model = native_models.build(name, CLASSIFIER)
    forgotten(native_models.build(name, CLASSIFIER)).save_pretrained(tmp_path, state_dict=state)
    hf = hf_models.transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loss(hf), loss(model))
