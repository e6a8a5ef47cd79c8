"""Models under other tools: compilation, export, autocast, copies, pickles, adapters."""

import copy
import io
import pickle

import pytest
import torch
from native_models import EMD, assert_same_states, build, gradients, heads, inputs_of, names, tokens
from torch._dynamo.testing import CompileCounterWithBackend

TOOLS = [("v1", "ForSequenceClassification", {}), ("v2", "ForTokenClassification", {}), ("v3", "ForMaskedLM", EMD)]
tools = pytest.mark.parametrize("name, head, changes", TOOLS, ids=[x[0] for x in TOOLS])


@tools
def test_compiles_whole_and_once_for_all_lengths(name, head, changes):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    model = build(name, head, **changes)
    model.set_unpad(False)  # as a compiled model does: the labels below count in rows of padding too
    compiled = torch.compile(copy.deepcopy(model), backend=counter, fullgraph=True)
    for length in (23, 37, 61):
        inputs = inputs_of(head, "right", length, labels=True)
        expected, got = model(**inputs), compiled(**inputs)
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.loss, expected.loss)
        got.loss.backward()
    assert counter.frame_count == 2  # one for the first length, one for all others


@tools
def test_compiles_with_inductor(name, head, changes):
    torch._dynamo.reset()
    model, inputs = build(name, head, num_hidden_layers=1, **changes), inputs_of(head)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(**inputs).logits
        valid = inputs["attention_mask"] if got.dim() == 3 else None
        assert_same_states(got, model(**inputs).logits, valid)


def exported(model, inputs):
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=60)
    return torch.export.export(model, (), inputs, dynamic_shapes={key: {0: batch, 1: length} for key in inputs})


@tools
def test_exports_with_dynamic_shapes(name, head, changes):
    model, inputs = build(name, head, **changes), inputs_of(head)
    model.set_unpad(False)  # an exported program keeps its padding, and rows of padding are compared too
    program, buffer = exported(model, inputs), io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size, count in ((19, 3), (31, 1), (60, 5)):
        other = inputs_of(head, "left", size, batch=count)
        with torch.no_grad():
            expected = model(**other)
            for module in (program.module(), loaded):
                got = module(**other)
                assert type(got) is type(expected)
                torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["eager", None])
def test_an_exported_program_has_all_gradients(backend):
    model, inputs = build("v3").train(), inputs_of("Model")
    model.set_backend(backend)
    expected = gradients(model, inputs)
    model.zero_grad()  # the program has the same parameters
    program = exported(model, inputs).module()
    program(**inputs).last_hidden_state[inputs["attention_mask"].bool()].mul(torch.linspace(-1, 1, 32)).pow(
        2
    ).mean().backward()
    got = {name: p.grad for name, p in program.named_parameters()}
    for key, gradient in expected.items():
        assert got[key] is not None, key
        torch.testing.assert_close(got[key], gradient, atol=1e-6, rtol=1e-5, msg=key)


@heads
def test_autocast(name, head):
    model, inputs = build(name, head).train(), inputs_of(head, labels=True)
    expected = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**inputs)
    last = list(expected)[-1]
    mask = inputs["attention_mask"].bool() if expected[last].shape[:2] == (3, 19) else ...
    error = (got[last].float() - expected[last])[mask].abs().mean() / expected[last][mask].abs().mean()
    assert 0 < error < 0.05
    sum(x.float().square().mean() for x in got.values()).backward()
    assert all(
        p.grad is None or p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@names
def test_half_models(name, dtype):
    model, inputs = build(name, "ForMaskedLM", **EMD), tokens("right")
    expected = model(**inputs).logits
    got = model.to(dtype)(**inputs).logits
    assert got.dtype == dtype
    mask = inputs["attention_mask"].bool()
    assert (got.float() - expected)[mask].abs().mean() < (0.05 if dtype == torch.bfloat16 else 0.01) * expected.std()


@heads
def test_copies_and_pickles(name, head):
    model, inputs = build(name, head), inputs_of(head)
    model.gradient_checkpointing_enable()
    expected = model(**inputs)[0]
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(**inputs)[0], expected) and clone.config == model.config
        assert clone.is_gradient_checkpointing
        clone.get_input_embeddings().weight.data.zero_()
        assert model.get_input_embeddings().weight.any()


def test_base_model_device_dtype_and_counts():
    model = build("v3", "ForSequenceClassification")
    assert model.base_model is model.deberta and model.deberta.base_model is model.deberta
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    total = sum(p.numel() for p in model.parameters())
    model.classifier.weight.requires_grad_(False)
    assert model.num_parameters() == total == model.num_parameters(only_trainable=True) + 2 * 32


def test_backends_by_name(monkeypatch):
    import deberta_fast.models.attention

    asked, attention = [], deberta_fast.models.attention.attend
    recording = lambda *args, **keywords: asked.append(keywords["backend"]) or attention(*args, **keywords)
    monkeypatch.setattr(deberta_fast.models.attention, "attend", recording)
    model, inputs = build("v3", "ForMaskedLM", **EMD), tokens("right")
    expected = model(**inputs).logits
    for backend in ("reference", "eager", None):
        asked.clear()
        model.set_backend(backend)
        assert_same_states(model(**inputs).logits, expected, inputs["attention_mask"])
        assert asked == [backend] * 3  # two layers, of which the decoder runs the last one twice
    with pytest.raises(ValueError, match="backend must be one of .*eager.* or None, got 'flash'"):
        model.set_backend("flash")


@pytest.mark.parametrize("reentrant", [True, False])
def test_lora(reentrant):
    peft = pytest.importorskip("peft")
    model, inputs = build("v3", "ForSequenceClassification"), inputs_of("ForSequenceClassification", labels=True)
    expected = model(**inputs).logits
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query_proj", "key_proj", "dense"], exclude_modules=["pooler.dense"]
    )
    adapted = peft.get_peft_model(model, config).eval()
    assert torch.equal(adapted(**inputs).logits, expected)
    if reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = adapted(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert losses[2] < losses[0] and any("query_proj.lora_B" in x for x in trained)
    assert all("lora_" in x or "classifier" in x or "pooler" in x for x in trained)
    adapted.eval()
    with torch.no_grad():
        learnt = adapted(**inputs).logits
        merged = adapted.merge_and_unload()
        assert not torch.allclose(learnt, expected)
        torch.testing.assert_close(merged(**inputs).logits, learnt, atol=1e-4, rtol=1e-4)
