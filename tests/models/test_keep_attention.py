"""Checkpointing that keeps attention: gradients stay the same to the bit, and attention runs once a layer."""

import pickle

import pytest
import torch
from native_models import inputs_of
from training import CLASSIFIER, assert_same, build, gradients

from deberta_fast.models import add_norm
from deberta_fast.models.checkpointing import keep_attention
from deberta_fast.op import backends

DROPPED = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
KINDS = ["native", "patched", "unpadded"]


@pytest.fixture
def runs(monkeypatch):
    """The calls of the operator that a backend computed."""
    computed, forward = [], backends.forward
    monkeypatch.setattr(backends, "forward", lambda call, backend: computed.append(backend) or forward(call, backend))
    return computed


def enable(model, kind, keep=True):
    if kind == "native":
        model.gradient_checkpointing_enable(keep_attention=keep)
    else:
        context = {"context_fn": keep_attention} if keep else {}
        name = "activation_checkpointing_enable"  # since transformers 5
        getattr(model, name, model.gradient_checkpointing_enable)({"use_reentrant": False, **context})


def step(model):
    torch.manual_seed(3)
    model.zero_grad()
    loss = model(**inputs_of(CLASSIFIER, labels=True)).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.fixture
def unfused(monkeypatch):
    """Torch's own norms: the fused ones, which round otherwise, do not run where torch has to see every operation."""
    monkeypatch.setattr(add_norm, "_is_built", lambda: False)


@pytest.mark.parametrize("changes", [{}, DROPPED], ids=["exact", "dropout"])
@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_to_the_bit(kind, name, changes, runs, unfused):
    model = build(kind, name, **changes)
    expected = step(model)
    assert len(runs) == 2
    enable(model, kind, keep=False)
    assert_same(step(model), expected, 0)
    assert len(runs) == 2 + 4
    enable(model, kind)
    assert_same(step(model), expected, 0)
    assert len(runs) == 6 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_beside_fused_norms(kind, runs):
    model = build(kind)
    expected = step(model)
    enable(model, kind)
    assert_same(step(model), expected)
    assert len(runs) == 2 + 2


def test_every_second_layer(runs):
    model = build("native", num_hidden_layers=3)
    expected = step(model)
    model.gradient_checkpointing_enable(every_n_layers=2, keep_attention=True)
    assert_same(step(pickle.loads(pickle.dumps(model))), expected)
    assert len(runs) == 3 + 3


@pytest.mark.parametrize("keywords", [{"use_reentrant": True}, {"context_fn": keep_attention}])
def test_errors(keywords):
    with pytest.raises(ValueError, match="keep_attention needs use_reentrant=False and no other context_fn, got"):
        build("native").gradient_checkpointing_enable(keywords, keep_attention=True)
