"""Modules with hooks or overridden methods: patched models run them, and warn once if attention is not fused."""

import copy
import warnings

import pytest
import torch
from hf_models import assert_close, build, results, tokens
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import deberta_fast
from deberta_fast import patch, unpatch

pytestmark = pytest.mark.usefixtures("exact_hf")


def compared(model, inputs, warns):
    """Compares a changed model with and without patch: outputs, gradients, and the number of warnings of a fallback."""
    expected = results(unpatch(model), inputs)
    patch(model)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        for _ in range(2):
            assert_close(results(model, inputs), expected)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(model(**inputs)[0], expected[0][0], rtol=0, atol=1e-9)
    told = [str(x.message) for x in messages if "running Hugging Face's own attention" in str(x.message)]
    assert len(told) == warns, told
    return told


def zeroes(module, arguments, output):
    return output * 0


def halves_gradient(module, grad_input, grad_output):
    return tuple(None if x is None else x / 2 for x in grad_input)


REGISTER = {
    "forward hook": lambda module: module.register_forward_hook(zeroes),
    "pre hook": lambda module: module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,)),
    "backward hook": lambda module: module.register_full_backward_hook(halves_gradient),
    "global hook": lambda module: nn.modules.module.register_module_forward_hook(
        lambda other, inputs, output: output * 0.5 if other is module else None
    ),
}
PLACES = {
    "dropout": (lambda model: model.encoder.layer[1].attention.self.dropout, 1),
    "pos_dropout": (lambda model: model.encoder.layer[1].attention.self.pos_dropout, 0),
    "projection": (lambda model: next(model.encoder.layer[0].attention.self.children()), 0),
}


@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_hooks_run(name, place, kind):
    model, (find, warns) = build(name).double(), PLACES[place]
    handle = REGISTER[kind](find(model))
    try:
        compared(model, tokens("right"), 1 if kind == "global hook" else warns)
    finally:
        handle.remove()
    compared(model, tokens("right"), 0)


@pytest.mark.parametrize("name, rows", [("v1", 48), ("v2", 32), ("v3", 32)])
def test_hooks_see_what_hugging_face_shows_them(name, rows):
    model = build(name).double()
    attention = model.encoder.layer[0].attention.self
    projection = getattr(attention, {"v1": "pos_proj", "v2": "pos_key_proj", "v3": "key_proj"}[name])
    seen = []
    for module in (attention.pos_dropout, projection):
        module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, output.shape)))
    for length in (9, 83):
        inputs = tokens("absent", length)
        expected, got = [], []
        for run, shapes in ((unpatch, expected), (patch, got)):
            run(model)
            seen.clear()
            with torch.no_grad():
                model(**inputs), model(**inputs)
            shapes[:] = seen
        assert sorted(got) == sorted(expected) and (torch.Size([rows, 64]), torch.Size([rows, 64])) in got


def test_a_hook_that_comes_after_the_first_call():
    model, inputs = patch(build("v3").double()), tokens("right")
    with torch.no_grad():
        before = model(**inputs)[0]
        handle = model.encoder.layer[0].attention.self.pos_dropout.register_forward_hook(zeroes)
        with_hook = model(**inputs)[0]
        assert not torch.allclose(with_hook, before)
        torch.testing.assert_close(with_hook, unpatch(copy.deepcopy(model))(**inputs)[0], rtol=0, atol=1e-9)
        handle.remove()
        assert torch.equal(model(**inputs)[0], before)


@pytest.mark.parametrize(
    "dropout", [nn.AlphaDropout(0.1), nn.Sequential(nn.Dropout(0.1)), type("D", (nn.Dropout,), {})(0.1)]
)
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_another_dropout(name, dropout):
    model = build(name).double()
    model.encoder.layer[0].attention.self.dropout = dropout.eval()
    (told,) = compared(model, tokens("right"), 1)
    assert type(dropout).__name__ in told


ENCODER = ("get_rel_embedding", "get_attention_mask", "get_rel_pos")
OVERRIDES = {
    "v1": (*ENCODER, "disentangled_att_bias", "transpose_for_scores"),
    "v2": (*ENCODER, "disentangled_attention_bias", "transpose_for_scores"),
    "v3": (*ENCODER, "disentangled_attention_bias", "transpose_for_scores"),
}


def halved(own):
    def method(*arguments, **keywords):
        result = own(*arguments, **keywords)
        return result // 2 if not result.is_floating_point() and result.dtype != torch.bool else result / 2

    return method


@pytest.mark.parametrize("on", ["class", "instance"])
@pytest.mark.parametrize(
    "name, method", [(name, method) for name in OVERRIDES for method in (*OVERRIDES[name], *ENCODER)]
)
def test_overridden_methods(name, method, on):
    model = build(name).double()
    module = model.encoder if method in ENCODER else model.encoder.layer[0].attention.self
    own = type(module)
    if method == "get_attention_mask":
        changed = lambda self, mask: own.get_attention_mask(self, mask).bool().tril()
    else:
        changed = halved(getattr(own, method))
    if on == "class":
        module.__class__ = type("Mine", (own,), {method: changed})
    else:
        setattr(module, method, changed.__get__(module))
    before = results(build(name).double(), tokens("right"))[0][0]
    (told,) = compared(model, tokens("right"), 1)
    assert method in told and not torch.allclose(model(**tokens("right"))[0], before)


@pytest.mark.parametrize("method", ["disentangled_attention_bias", "get_rel_pos"])
def test_methods_replaced_in_hugging_faces_class(method, monkeypatch):
    """The patched model sees a method that is replaced after its first call."""
    model = build("v3").double()
    compared(model, tokens("right"), 0)
    own = type(model.encoder) if method in ENCODER else type(model.encoder.layer[0].attention.self)
    monkeypatch.setattr(own, method, halved(getattr(own, method)))
    (told,) = compared(model, tokens("right"), 1)
    assert method in told


def test_a_forward_replaced_in_hugging_faces_class(monkeypatch):
    model = build("v3").double()
    own = type(model.encoder.layer[0].attention.self)
    before = own.forward
    monkeypatch.setattr(own, "forward", lambda *arguments, **keywords: (before(*arguments, **keywords)[0] / 2, None))
    (told,) = compared(model, tokens("right"), 1)
    assert "not a patched one" in told


@pytest.mark.parametrize("name", ["v1", "v3"])
@pytest.mark.parametrize("part", ["layer", "attention"])
def test_layers_with_a_forward_of_their_own(name, part):
    """They may read the masks and distances that the fused path does not compute."""
    model = build(name).double()
    module = model.encoder.layer[1] if part == "layer" else model.encoder.layer[1].attention
    own = type(module)

    def forward(self, hidden_states, attention_mask, *arguments, relative_pos=None, **keywords):
        assert attention_mask.dim() == 4 and relative_pos.shape[-2:] == attention_mask.shape[-2:]
        return own.forward(self, hidden_states * 2, attention_mask, *arguments, relative_pos=relative_pos, **keywords)

    module.__class__ = type("Mine", (own,), {"forward": forward})
    (told,) = compared(model, tokens("right"), 1)
    assert "Mine has a forward of its own" in told


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_subclasses_that_override_nothing_are_fused(name, fused_calls):
    model, inputs = build(name).double(), tokens("right")
    for module in (model.encoder, *model.encoder.layer, *(layer.attention.self for layer in model.encoder.layer)):
        module.__class__ = type("Mine", (type(module),), {"__doc__": "Nothing new."})
    compared(model, inputs, 0)
    fused_calls.clear()
    output = model(**inputs, output_hidden_states=True)
    assert len(fused_calls) == 2 and type(output).__name__ == "BaseModelOutput" and len(output.hidden_states) == 3


def test_wrappers_of_torch_are_fused(fused_calls):
    model = build("v3").double().train()
    model.encoder.layer[1] = checkpoint_wrapper(model.encoder.layer[1])
    compared(model, tokens("right"), 0)
    assert fused_calls


def test_buckets_that_number_no_distances():
    """Hugging Face's formula is not defined for these settings, but its code returns numbers."""
    model = build("v3", position_buckets=8, max_relative_positions=5).double()
    (told,) = compared(model, tokens("right"), 1)
    assert "max_relative_positions at least position_buckets // 2 + 2" in told


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_v1_in_half_precision_with_two_biases_in_float32(dtype):
    model, inputs = build("v1"), tokens("right")
    exact = results(copy.deepcopy(model).double(), inputs)[0][0]
    model.to(dtype)
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.q_bias.data, attention.v_bias.data = attention.q_bias.data.float(), attention.v_bias.data.float()
    got, gradients = results(patch(model), inputs)
    assert got[0].dtype == dtype
    assert (got[0].double() - exact).norm() < 0.05 * exact.norm()
    assert gradients["encoder.layer.0.attention.self.q_bias"].dtype == torch.float32


@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_hooks_run_in_native_models(name, place, kind, tmp_path):
    if (name, place) == ("v1", "projection"):
        pytest.skip("v1's one projection is three here")
    theirs, inputs = build(name), tokens("right")
    theirs.save_pretrained(tmp_path)
    ours = getattr(deberta_fast, type(theirs).__name__).from_pretrained(tmp_path).double()
    find, warns = PLACES[place]
    results_of, told = [], []
    for model in (theirs.double(), ours):
        module = find(model) if place != "projection" else model.encoder.layer[0].attention.self.query_proj
        handle = REGISTER[kind](module)
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            output = [model(**inputs)[0] for _ in range(2)][1]
            output.square().sum().backward()
        handle.remove()
        told.append([str(x.message) for x in messages if "computed densely" in str(x.message)])
        results_of.append((output, model.embeddings.word_embeddings.weight.grad))
    for expected, got in zip(*results_of, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * max(1.0, float(expected.abs().max())))
    assert not told[0] and bool(told[1]) == (warns == 1 or kind == "global hook")


def test_packed_sequences_need_an_ordinary_dropout(tmp_path):
    build("v3").save_pretrained(tmp_path)
    model = deberta_fast.DebertaV2Model.from_pretrained(tmp_path)
    model.encoder.layer[0].attention.self.dropout.register_forward_hook(zeroes)
    with pytest.raises(ValueError, match="dropout is a Dropout with hooks: computed densely"):
        model(torch.ones(8, dtype=torch.long), cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32))
