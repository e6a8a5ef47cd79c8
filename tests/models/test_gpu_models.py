"""Models on a CUDA device. Native ones are as precise as Hugging Face's eager code; native and patched ones run packed,
captured and compiled. ``make gpu`` runs these tests."""

import copy

import pytest
import torch
from gpu import DEVICE, FUSED, HALF_ONLY, pytestmark  # noqa: F401

import deberta_fast

hf_models = pytest.importorskip("hf_models")


@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", ["eager", *FUSED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_native_model(name, dtype, backend, unpad):
    if dtype == torch.float32 and backend in HALF_ONLY:
        pytest.skip(f"{backend} has no float32")
    theirs = hf_models.build(name, "ForSequenceClassification").to(DEVICE, dtype)
    kind = "DebertaForSequenceClassification" if name == "v1" else "DebertaV2ForSequenceClassification"
    kind = getattr(deberta_fast, kind)
    config = kind.config_class.from_dict(theirs.config.to_dict())
    ours = kind.from_pretrained(None, config=config, state_dict=theirs.state_dict(), dtype=dtype, device=DEVICE)
    ours.set_backend(backend)
    ours.set_unpad(unpad)
    draws = [{key: x.to(DEVICE) for key, x in hf_models.tokens("right", seed=seed).items()} for seed in range(6)]
    run = lambda model: [hf_models.results(model, inputs) for inputs in draws]
    exact, eager, got = run(copy.deepcopy(theirs).double()), run(theirs), run(ours)
    # v1's projections have other names in native models, so only parameters with the same name are compared
    shared = [x for x, grad in exact[0][1].items() if grad is not None and got[0][1].get(x) is not None]
    flat = ([[*outputs, *(grads[x] for x in shared)] for outputs, grads in runs] for runs in (got, eager, exact))
    hf_models.assert_as_precise(*flat)


backends = pytest.mark.parametrize("backend", ["eager", *FUSED])
kinds = pytest.mark.parametrize("kind", ["native", "patched"])


def on_device(kind, backend, name="v2", unpad=False, constant_weights=False):
    """A bfloat16 model of that kind, and inputs with padding on both sides and in between."""
    model = hf_models.build(name).to(DEVICE, torch.bfloat16)
    if kind == "patched":
        deberta_fast.patch(model, backend, unpad=unpad, constant_weights=constant_weights)
    else:
        native = deberta_fast.DebertaV2Model
        config = native.config_class.from_dict(model.config.to_dict())
        model = native.from_pretrained(
            None, config=config, state_dict=model.state_dict(), dtype=torch.bfloat16, device=DEVICE
        )
        model.set_backend(backend)
        model.set_unpad(unpad)
        model.set_constant_weights(constant_weights)
    return model, {key: x.to(DEVICE) for key, x in hf_models.tokens("holes").items()}


def states(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state[inputs["attention_mask"].bool()].float()


def assert_near(got, expected):
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@backends
@kinds
def test_packed_is_padded(kind, backend):
    padded, inputs = on_device(kind, backend)
    packed, _ = on_device(kind, backend, unpad=True)
    assert_near(states(packed, inputs), states(padded, inputs))
    packed(**inputs).last_hidden_state.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in packed.parameters() if p.grad is not None)


@pytest.mark.parametrize("backend", FUSED)  # eager reads the lengths on the host
def test_forward_packed_without_waiting_for_the_device(backend):
    model, inputs = on_device("native", backend)
    ids, lengths = inputs["input_ids"].flatten()[:150], torch.tensor([0, 61, 61, 150], device=DEVICE)
    ends = lengths.int()
    with torch.no_grad():
        model.forward_packed(ids, ends, max_seqlen=90)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = model.forward_packed(ids, ends, max_seqlen=90).last_hidden_state
        finally:
            torch.cuda.set_sync_debug_mode("default")
        alone = [model(ids[None, a:b]).last_hidden_state[0] for a, b in ((0, 61), (61, 150))]
    assert_near(got.float(), torch.cat(alone).float())


@backends
@kinds
@pytest.mark.parametrize("constant", [False, True], ids=["", "constant"])
def test_captured(kind, backend, constant):
    """A captured graph's outputs follow its input ids. The padding is the same in all replays."""
    if backend == "eager":
        pytest.skip("eager copies its slot table from the host")
    model, inputs = on_device(kind, backend, constant_weights=constant)
    other = {**inputs, "input_ids": inputs["input_ids"].flip(0)}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            states(model, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    static, graph = {key: x.clone() for key, x in inputs.items()}, torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = model(**static).last_hidden_state
    for chosen in (other, inputs):
        static["input_ids"].copy_(chosen["input_ids"])
        graph.replay()
        assert_near(output[inputs["attention_mask"].bool()].float(), states(model, chosen))


@backends
@kinds
def test_compiled_for_latency(kind, backend):
    torch._dynamo.reset()
    model, inputs = on_device(kind, backend)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        got = states(compiled, inputs)
    assert_near(got, states(model, inputs))


@backends
@kinds
def test_constant_weights_keep_tables_on_the_device(kind, backend):
    model, inputs = on_device(kind, backend, constant_weights=True)
    plain, _ = on_device(kind, backend)
    for _ in range(2):
        assert_near(states(model, inputs), states(plain, inputs))
    for each in (model, plain):
        with torch.no_grad():
            each.encoder.rel_embeddings.weight.mul_(1.5)
    assert_near(states(model, inputs), states(plain, inputs))
