"""ONNX graphs and TorchScript of patched and native models, run at other shapes than the exported ones."""

import io

import pytest
import torch
from native_models import LENGTH, build, randomise, tokens

import deberta_fast
from deberta_fast import disentangled_attention
from deberta_fast.op import backends

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*treespec, LeafSpec:FutureWarning",
        "# The axis name. .* will not be used:UserWarning",
        ".torch.jit:DeprecationWarning",
        ".*legacy TorchScript-based ONNX:DeprecationWarning",
        "The feature will be removed:DeprecationWarning",
        ":torch.jit.TracerWarning",
    )
]
EXPORTED = 29  # no other size in these models is equal to this length
SHAPES = [("none", 1, 1), ("none", 1, LENGTH), ("holes", 3, LENGTH), ("left", 2, 37), ("right", 5, EXPORTED)]


class First(torch.nn.Module):
    """Returns the first output of a model and takes positional arguments, as TorchScript requires."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors):
        return self.model(**dict(zip(self.names, tensors, strict=True)))[0]


@pytest.fixture(params=[True, False], ids=["dynamo", "torchscript"])
def export(request, tmp_path):
    """Exports a model as its users would, with batch and length dynamic; returns a function from inputs to outputs."""

    def exported(model):
        inputs, path = tokens("right", EXPORTED, batch=2), tmp_path / "model.onnx"
        shapes = {name: {0: "batch", 1: "length"} for name in inputs}
        if request.param:
            program = torch.onnx.export(model, (), path, kwargs=inputs, dynamic_shapes=shapes)
            # sigma is stored as one row of numbers, not as a matrix of this length
            assert not any(EXPORTED in tuple(x.shape) for x in program.model.graph.initializers.values())
        else:
            names, tensors = list(inputs), tuple(inputs.values())
            torch.onnx.export(First(model, names), tensors, path, dynamo=False, input_names=names, dynamic_axes=shapes)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        return lambda inputs: torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])

    return exported


def assert_same_answers(run, model):
    """The program's outputs equal the model's on tokens. Elsewhere they are finite, also in a text without tokens."""
    for padding, batch, length in SHAPES:
        inputs = tokens(padding, length, batch)
        if batch > 2:
            inputs["attention_mask"][1] = 0
        with torch.no_grad():
            expected = model(**inputs)[0]
        got = run(inputs)
        assert got.shape == expected.shape and torch.isfinite(got).all()
        valid = inputs["attention_mask"].bool()
        valid = valid if expected.dim() == 3 else valid[:, 0]  # a text is judged by its first token
        atol = 1e-5 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(got[valid], expected[valid], rtol=0, atol=atol, msg=f"{padding} {batch} {length}")


@pytest.mark.parametrize("name, head", [("v1", "Model"), ("v2", "ForSequenceClassification"), ("v3", "Model")])
def test_patched(name, head, export):
    from hf_models import build as build_huggingface

    model = deberta_fast.patch(build_huggingface(name, head, num_hidden_layers=1))
    assert_same_answers(export(model), model)


NATIVE = [("v1", "ForSequenceClassification", {}), ("v1", "Model", {"talking_head": True}), ("v2", "Model", {})]


@pytest.mark.parametrize("name, head, changes", NATIVE)
def test_native(name, head, changes, export):
    model = build(name, head, num_hidden_layers=1, **changes)
    assert_same_answers(export(model), model)


def test_from_a_checkpoint(export, tmp_path):
    original = build("v3", "ForSequenceClassification")
    original.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    run = export(deberta_fast.DebertaV2ForSequenceClassification.from_pretrained(tmp_path))
    assert_same_answers(run, original)


@pytest.mark.parametrize("kind", ["patched", "native", "quantised"])
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_traced_saved_and_loaded(name, kind, monkeypatch):
    monkeypatch.setattr(backends, "_told", set())
    if kind == "native":
        model = build(name, "ForSequenceClassification", num_hidden_layers=1)
    else:
        from hf_models import build as build_huggingface

        model = deberta_fast.patch(build_huggingface(name, "Model", num_hidden_layers=1))
    if kind == "quantised":
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    inputs, file = tokens("right", EXPORTED, batch=2), io.BytesIO()
    with pytest.warns(UserWarning, match="only 'reference' can be traced by torch.jit") as caught:
        traced = torch.jit.trace(First(model, list(inputs)), tuple(inputs.values()))
    assert sum("deberta_fast:" in str(x.message) for x in caught) == 1
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert_same_answers(lambda inputs: loaded(*inputs.values()).detach(), model)


class Attention(torch.nn.Module):
    """Attention over states (B, L, 8), which are queries, keys and values at once."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.table = torch.nn.Parameter(torch.zeros(2, 8, 4))
        randomise(self)

    def forward(self, states):
        heads = states.unflatten(-1, (2, 4)).transpose(1, 2)
        return disentangled_attention(
            heads, heads, heads, self.table, position_buckets=4, max_relative_positions=8, backend=self.backend
        )


def test_a_named_backend_is_exported_or_refused(monkeypatch):
    states = torch.randn(2, 7, 8)
    program = torch.onnx.export(Attention("reference").eval(), (states,), dynamic_shapes=({0: "batch", 1: "length"},))
    assert {node.domain for node in program.model.graph} == {""}
    for dynamo in (True, False):
        with pytest.raises(RuntimeError, match="only 'reference' can be exported to ONNX"):
            torch.onnx.export(Attention("eager").eval(), (states,), io.BytesIO(), dynamo=dynamo)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(RuntimeError, match="'eager' cannot serve this call: only 'reference' can be exported to ONNX"):
        Attention("eager")(states)
