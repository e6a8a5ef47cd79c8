"""Outputs of native models that other code rebuilds, copies, moves, casts and gathers."""

import copy
import dataclasses
import pickle

import pytest
import torch
from native_models import build, inputs_of
from torch.nn.parallel.scatter_gather import gather
from torch.utils import _pytree

from deberta_fast.models import add_norm, outputs

KINDS = [x for x in vars(outputs).values() if isinstance(x, type) and issubclass(x, outputs.ModelOutput)][1:]
KINDS = [kind for kind in KINDS if not kind.__name__.startswith("_")]
STATES = (torch.ones(2, 3), torch.zeros(2, 3))


def example(kind):
    first, second, *_ = (field.name for field in dataclasses.fields(kind))
    second = {} if second == "hidden_states" else {second: torch.arange(6.0).view(2, 3)}
    return kind(**{first: torch.ones(()), **second, "hidden_states": STATES})


def same(got, expected):
    flat = lambda x: list(x) if isinstance(x, tuple) else [x]
    assert type(got) is type(expected) and list(got) == list(expected)
    for field in dataclasses.fields(expected):
        x, y = getattr(got, field.name), getattr(expected, field.name)
        assert (x is None) == (y is None), field.name
        if y is not None:
            assert type(x) is type(y) and got[field.name] is x
            assert all(torch.equal(a, b) for a, b in zip(flat(x), flat(y), strict=True))
    assert len(got.to_tuple()) == len(expected.to_tuple())
    return True


WAYS = {
    "dictionary": lambda out: type(out)(dict(out)),
    "itself": lambda out: type(out)(out),
    "pairs": lambda out: type(out)(list(out.items())),
    "tuple-of-pairs": lambda out: type(out)(tuple(out.items())),
    "generator": lambda out: type(out)((name, value) for name, value in out.items()),
    "items": lambda out: type(out)(iter(out.items())),
    "keywords": lambda out: type(out)(**out),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "method": lambda out: out.copy(),
    "union": lambda out: out | {},
    "pickle": lambda out: pickle.loads(pickle.dumps(out)),
    "replace": dataclasses.replace,
    "pytree": lambda out: _pytree.tree_map(lambda x: x, out),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_made_again(kind, way):
    out = example(kind)
    assert same(WAYS[way](out), out)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_as_hugging_faces(kind):
    modeling_outputs = pytest.importorskip("transformers.modeling_outputs")
    out = example(kind)
    theirs = getattr(modeling_outputs, kind.__name__)(**out)
    for made in (theirs, type(theirs)(dict(out)), type(theirs)(out.items())):
        assert list(made) == list(out) and list(made.keys()) == list(out.keys())
        assert [id(x) for x in made.to_tuple()] == [id(x) for x in out.to_tuple()]
        assert all(made[i] is out[i] for i in range(len(out)))
        assert [f.name for f in dataclasses.fields(made)] == [f.name for f in dataclasses.fields(out)]
    same(kind(theirs), out)


def test_what_is_no_output():
    kind = outputs.SequenceClassifierOutput
    with pytest.raises(TypeError, match="has no 'scores', but loss, logits"):
        kind({"loss": torch.ones(()), "scores": 1})
    with pytest.raises(TypeError, match="by name or all in one, got both: .*logits"):
        kind({"loss": torch.ones(())}, logits=torch.ones(2))
    with pytest.raises(TypeError, match="expected pairs of a name and a value"):
        kind(x for x in (1, 2))
    out = example(kind)
    for remove in (
        lambda: out.pop("loss"), lambda: out.popitem(), out.clear, lambda: out.__delitem__("loss"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="keeps its values"):
            remove()
    assert kind(1.5).loss == 1.5 and kind([torch.ones(2)]).loss[0].sum() == 2  # neither is a dictionary


def test_gathered_by_data_parallel():
    """DataParallel's threads return one output each. torch itself gathers only from GPUs."""
    outs = [example(outputs.SequenceClassifierOutput) for _ in range(2)]
    joined = type(outs[0])((name, [x[name] for x in outs]) for name in outs[0])
    assert list(joined) == list(outs[0]) and joined.logits[1] is outs[1].logits
    with pytest.raises(Exception, match="Gather function not implemented for CPU|[Cc]annot gather"):
        gather(outs, "cpu")


def test_accelerate_moves_and_casts_them():
    pytest.importorskip("accelerate")
    from accelerate.utils import convert_outputs_to_fp32, find_device, recursively_apply, send_to_device

    model = build("v3", "ForSequenceClassification")
    inputs = inputs_of("ForSequenceClassification", labels=True)
    out = model(**inputs, output_hidden_states=True)
    same(send_to_device(out, "cpu"), out)
    assert find_device(out).type == "cpu"
    halves = recursively_apply(lambda x: x.bfloat16(), out)
    assert halves.logits.dtype == halves.hidden_states[1].dtype == torch.bfloat16
    run = convert_outputs_to_fp32(lambda: halves)
    assert run().logits.dtype == run().hidden_states[0].dtype == torch.float32 and type(run()) is type(out)


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_models_in_the_hands_of_accelerate(name, monkeypatch):
    # The hooks replace the forward of each norm, so torch adds and normalises in two steps: here in every model.
    monkeypatch.setattr(add_norm, "_is_built", lambda: False)
    pytest.importorskip("accelerate")
    from accelerate import Accelerator, dispatch_model
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.state import AcceleratorState

    inputs = inputs_of("ForSequenceClassification", labels=True)
    expected = build(name, "ForSequenceClassification")(**inputs)
    held = add_hook_to_module(
        build(name, "ForSequenceClassification"), AlignDevicesHook(execution_device="cpu", io_same_device=True)
    )
    dispatched = dispatch_model(
        build(name, "ForSequenceClassification"), {"deberta": "cpu", "pooler": "cpu", "": "cpu"}, force_hooks=True
    )
    for model in (held, dispatched):
        same(model(**inputs), expected)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = build(name, "ForSequenceClassification")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    got = model(**inputs)
    assert got.loss.dtype == got.logits.dtype == torch.float32
    torch.testing.assert_close(got.loss, expected.loss, atol=0.1, rtol=0.1)
    accelerator.backward(got.loss)
    optimizer.step()
    packed = dict(
        input_ids=inputs["input_ids"].flatten(), cu_seqlens=torch.arange(0, 58, 19, dtype=torch.int32), max_seqlen=19
    )
    got = model(**packed, labels=inputs["labels"])
    assert got.loss.dtype == torch.float32 and torch.isfinite(got.loss)
    AcceleratorState._reset_state(reset_partial_state=True)
