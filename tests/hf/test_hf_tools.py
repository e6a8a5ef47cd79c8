"""patch beside other tools: wrappers, hooks, adapters, copies, subclasses; run with transformers 4.48 too."""

import copy
import pickle

import pytest
import torch
from hf_models import V2, assert_close, build, randomise, results, tokens
from torch import nn

from deberta_fast import patch, unpatch

pytestmark = pytest.mark.usefixtures("exact_hf")


def test_model_inside_a_wrapper(fused_calls):
    class Spans(nn.Module):  # like GLiNER: the encoder is two modules deep, under a recurrent layer
        def __init__(self):
            super().__init__()
            self.token_rep_layer = nn.ModuleDict({"model": build("v3")})
            self.rnn = nn.LSTM(64, 16, bidirectional=True, batch_first=True)

        def forward(self, input_ids, attention_mask, token_type_ids):
            states = self.token_rep_layer["model"](input_ids, attention_mask=attention_mask)[0]
            return {"states": self.rnn(states * attention_mask[..., None])[0]}

    model, inputs = randomise(Spans()).double(), tokens()
    expected = results(model, inputs)
    assert patch(model) is model
    assert_close(results(model, inputs), expected)
    assert len(fused_calls) == 2


def snapshot(model):
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def assert_same_objects(model, before):
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name
        assert all(vars(module)[key] is value for key, value in before[name].items()), name


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_state_stays_and_unpatch_restores(name, fused_calls):
    model, inputs = build(name, "ForMaskedLM").train(), tokens()
    model.get_parameter("deberta.encoder.rel_embeddings.weight").requires_grad_(False)
    model.deberta.encoder.layer[0].eval()
    parameters = lambda: [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()]
    state = lambda: (list(model.state_dict()), parameters(), [module.training for module in model.modules()])
    before, state_before = snapshot(model), state()
    for backend in ("reference", "eager", None):
        patch(model, backend)(**inputs)
        assert fused_calls == [backend] * 2 and state() == state_before
        fused_calls.clear()
    assert unpatch(model) is model
    assert_same_objects(model, before)
    model(**inputs)
    assert not fused_calls
    assert_same_objects(unpatch(model), before)


def test_refusals():
    model = build("v3")
    attention, before = model.encoder.layer[1].attention.self, snapshot(model)
    for wrong, error, message in (
        (("microsoft/deberta-v3-base",), TypeError, "model must be a torch.nn.Module, got str"),
        ((model, "quick"), ValueError, "backend must be one of .*eager.* got 'quick'"),
        ((model.encoder.layer[0].output,), ValueError, "nothing to patch in DebertaV2Output"),
    ):
        with pytest.raises(error, match=message):
            patch(*wrong)
    assert_same_objects(model, before)
    attention.forward = lambda *args, **kwargs: type(attention).forward(attention, *args, **kwargs)
    before = snapshot(model)
    with pytest.raises(ValueError, match="forward of a DisentangledSelfAttention was replaced by other code"):
        patch(model)
    assert_same_objects(model, before)


class Doubled(V2.DisentangledSelfAttention):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)[0], None


class Renamed(V2.DisentangledSelfAttention):
    pass


def test_subclass_with_its_own_forward_keeps_it():
    model, inputs = build("v3").double(), tokens()
    for layer in model.encoder.layer:
        layer.attention.self.__class__ = Doubled
    expected = results(model, inputs)
    with pytest.warns(UserWarning, match="not a patched one"):
        assert_close(results(patch(model), inputs), expected)


def test_half_unpatched_model_is_right():
    model, inputs = build("v3").double(), tokens(length=2)  # two rows of two tokens: wrong mask shapes raise no error
    expected = results(model, inputs)
    unpatch(patch(model).encoder.layer[0])
    with pytest.warns(UserWarning, match="not a patched one"):
        assert_close(results(model, inputs), expected)


def test_which_subclasses_are_fused(fused_calls):
    model = build("v3")
    model.encoder.layer[0].attention.self.__class__ = Doubled
    with pytest.raises(ValueError, match="nothing to patch in DebertaV2Attention"):
        patch(model.encoder.layer[0].attention)
    for layer in model.encoder.layer:
        layer.attention.self.__class__ = Renamed
    patch(model)(**tokens())
    assert len(fused_calls) == 2


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_hooks_fire_as_often(name):
    model, inputs, counts = build(name), tokens(), {}
    for key, module in model.encoder.layer.named_modules():
        if key.endswith("attention.self.dropout"):
            continue  # a part of the fused attention
        for kind in ("forward", "forward_pre", "full_backward"):
            if kind != "full_backward" or not key.endswith("pos_q_proj"):  # Hugging Face divides its output in place
                count = lambda *_, where=(key, kind): counts.update({where: counts.get(where, 0) + 1})
                getattr(module, f"register_{kind}_hook")(count)
    results(model, inputs)
    expected = dict(counts)
    counts.clear()
    results(patch(model), inputs)
    assert counts == expected and len(counts) > 50


def test_deepcopy_and_pickle(fused_calls):
    model, inputs = patch(build("v3", "ForTokenClassification"), "reference"), tokens()
    run = lambda module: results(module, inputs, gradients=False)[0][0]
    expected = run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fused_calls.clear()
        assert torch.equal(run(twin), expected) and fused_calls == ["reference"] * 2
        for p in twin.deberta.encoder.layer.parameters():
            p.data.zero_()
        assert not torch.equal(run(twin), expected)  # a forward still bound to the original would not see it
        assert torch.equal(run(unpatch(twin)), run(twin)) and torch.equal(run(model), expected)
        assert len(fused_calls) == 6


def test_monte_carlo_dropout():
    model = patch(build("v3", attention_probs_dropout_prob=0.3))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(**tokens())[0], model(**tokens())[0])


def test_dropout_replaced_by_identity():
    model = patch(build("v3").train())
    for layer in model.encoder.layer:
        layer.attention.self.dropout = nn.Identity()
    model(**tokens())


ADAPTED = {"v1": ["in_proj", "pos_q_proj"], "v2": ["query_proj", "value_proj", "pos_key_proj"], "v3": ["key_proj"]}


@pytest.mark.parametrize("name", ADAPTED)
def test_lora(name, fused_calls):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    config = peft.LoraConfig(target_modules=ADAPTED[name], r=4, lora_alpha=8)
    model, inputs = randomise(peft.get_peft_model(build(name), config)).double(), tokens()
    expected, got = results(model, inputs), results(patch(model), inputs)
    assert len(fused_calls) == 2
    assert_close(got, expected)
    for key, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in key) == (got[1][key] is not None), key


def hook(model):
    hooks = pytest.importorskip("accelerate.hooks", exc_type=ImportError)
    calls = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    for module in (model.encoder, model.encoder.layer[0].attention.self):
        hooks.add_hook_to_module(module, Counting())
    return calls, lambda: hooks.remove_hook_from_module(model, recurse=True)


ORDERS = [
    "hook patch",
    "patch hook",
    "hook patch unpatch",
    "patch hook unpatch",
    "hook patch remove",
    "patch hook remove",
    "hook remove patch",
    "patch hook remove unpatch",
    "hook patch unpatch remove",
    "hook patch remove unpatch",
]


@pytest.mark.parametrize("order", ORDERS)
def test_accelerate_hooks(order, fused_calls):
    """Hooks run and attention is fused for every order in which hooks and patch are added and removed."""
    model, inputs, calls = build("v3").double(), tokens("left"), []
    expected = results(model, inputs)
    for step in order.split():
        if step == "hook":
            calls, remove = hook(model)
        else:
            remove() if step == "remove" else (patch if step == "patch" else unpatch)(model)
    assert_close(results(model, inputs), expected)
    assert len(calls) == (0 if "remove" in order else 2)
    assert len(fused_calls) == (0 if "unpatch" in order else 2)
    absent = ["_deberta_fast"] * ("unpatch" in order) + ["_old_forward"] * ("remove" in order)
    assert not any(name in vars(module) for name in absent for module in model.modules())


@pytest.mark.parametrize("name", ADAPTED)
def test_tables_kept_in_inference_follow_merged_adapters(name):
    """Merging writes through ``.data``; torch does not count these writes."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model, inputs = patch(build(name).double()), tokens()
    with torch.no_grad():
        model(**inputs)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=ADAPTED[name], r=4, lora_alpha=8))
        for key, p in adapted.named_parameters():
            if "lora_" in key:
                p.normal_(generator=torch.Generator().manual_seed(0))
        merged = adapted.merge_and_unload()
        got = merged(**inputs)[0]
        model.encoder.rel_embeddings.weight.data.mul_(1.5)
        other = merged(**inputs)[0]
        unpatch(merged)
        again = merged(**inputs)[0]
        model.encoder.rel_embeddings.weight.data.div_(1.5)
        expected = merged(**inputs)[0]
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[valid], expected[valid], rtol=0, atol=1e-9)
    torch.testing.assert_close(other[valid], again[valid], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_constant_weights(name, fused_calls):
    model, inputs = build(name), tokens("holes")
    with torch.no_grad():
        expected = model(**inputs)[0]
        patch(model, unpad=True, constant_weights=True)
        got = [model(**inputs)[0] for _ in range(2)]
    valid = inputs["attention_mask"].bool()
    assert torch.equal(*got) and len(fused_calls) == 4
    torch.testing.assert_close(got[0][valid], expected[valid], rtol=1e-4, atol=1e-4)
    assert_close(results(model, inputs), results(patch(model), inputs), 1e-5)


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_linear_layers_between_belong_to_who_replaced_them(name):
    model = build(name)
    layer, other = model.encoder.layer
    own = layer.output.forward = lambda states, residual: residual
    patch(model)
    assert layer.output.forward is own and not hasattr(layer.output, "_deberta_fast")
    between = [other.output, other.intermediate, other.attention.output, layer.intermediate]
    between += [other.output.LayerNorm, model.embeddings.LayerNorm] if name == "v1" else []
    assert all("forward" in vars(module) for module in between)
    unpatch(model)
    assert layer.output.forward is own and not any("forward" in vars(module) for module in between)
