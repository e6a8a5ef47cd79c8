"""Tensor parallel: two processes with half of the heads each have the losses and gradients of one with all."""

import warnings

import native_models
import pytest
import torch
from processes import Processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from training import MODELS, assert_ranks, batches, build, train

from deberta_fast import unpatch
from deberta_fast.distributed import tensor_parallel_plan


def parallel(model):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return parallelize_module(model, mesh, tensor_parallel_plan(model))


def trained(kind, name):
    model = parallel(build(kind, name))
    shards = [
        p.to_local().shape[0] for n, p in model.named_parameters() if n.endswith(("self.query_proj.weight", "q_bias"))
    ]
    return {**train(model, batches(2)), "shards": shards}


@pytest.mark.parametrize("kind, name", [*MODELS, ("unpadded", "v3")])
def test_training(kind, name, processes):
    expected = train(build(kind, name), batches(2))
    found = processes.run(trained, kind, name)
    width = 32 if kind == "native" else 64
    assert [got.pop("shards") for got in found] == [[width // 2] * 2] * 2
    assert_ranks(found, expected)


def trained_in_two_dimensions(kind, name):
    """Two groups of processes share the batch; in each, two processes share the heads."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    model = build(kind, name)
    parallelize_module(model, mesh["heads"], tensor_parallel_plan(model))
    for layer in model.deberta.encoder.layer:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return train(model, batches(2, mesh["data"].get_local_rank()))


def test_with_fsdp():
    with Processes(4) as processes:
        for kind, name in (("native", "v3"), ("patched", "v1")):
            found = processes.run(trained_in_two_dimensions, kind, name)
            assert_ranks(found, train(build(kind, name), batches(2)))


def probabilities(kind, name):
    """Hugging Face's own attention runs here, on half of the heads."""
    model = parallel(build(kind, name)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(**batches(1)[0], output_attentions=True)
    return output.loss, output.attentions[0]


@pytest.mark.parametrize("kind, name", [("native", "v1"), ("native", "v3"), ("patched", "v3")])
def test_probabilities_are_those_of_this_process(kind, name, processes):
    model = build(kind if kind == "native" else "hf", name).eval()
    with torch.no_grad():
        output = model(**batches(1)[0], output_attentions=True)
    found = processes.run(probabilities, kind, name)
    torch.testing.assert_close(torch.cat([x for _, x in found], 1), output.attentions[0])
    for loss, _ in found:
        torch.testing.assert_close(loss, output.loss)


def refusals():
    """Returns what ``parallelize_module`` says, and checks that it changed nothing."""
    said = []
    for changes in (dict(num_attention_heads=1), dict(intermediate_size=49)):
        model = build("native", "v3", **changes)
        try:
            parallel(model)
        except ValueError as error:
            said.append(str(error))
        assert all(type(x) is torch.nn.Parameter for x in model.parameters())
    model = parallel(build("native", "v3"))
    try:
        tensor_parallel_plan(model)
    except ValueError as error:
        said.append(str(error))
    return said


def test_what_does_not_divide_is_refused(processes):
    heads, width, again = processes.run(refusals)[0]
    assert heads == "num_attention_heads must be a multiple of the mesh's 2 processes, got 1"
    assert width == "intermediate_size must be a multiple of the mesh's 2 processes, got 49"
    assert "deberta.encoder.layer.0.attention.self.query_proj is distributed already" in again


class Elsewhere(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def test_what_would_be_wrong_is_refused():
    with pytest.raises(ValueError, match="model must contain a DeBERTa with its layers, got a Linear"):
        tensor_parallel_plan(torch.nn.Linear(2, 2))
    for model in (build("hf"), unpatch(build("patched"))):
        with pytest.raises(ValueError, match=r"native or patched.*deberta_fast.patch\(model\) first"):
            tensor_parallel_plan(model)
    with pytest.raises(ValueError, match="encoder.layer.0.attention.self has talking heads"):
        tensor_parallel_plan(native_models.build("v1-talking-heads"))
    model = build("native")
    model.deberta.encoder.layer[1].output.dense = Elsewhere(model.deberta.encoder.layer[1].output.dense)
    with pytest.raises(ValueError, match=r"deberta.encoder.layer.1.output.dense must be a torch.nn.Linear, got Elsew"):
        tensor_parallel_plan(model)


def test_names():
    """The plan names the modules of every DeBERTa inside, whatever holds it."""
    inner, whole = (
        build("patched", "v1"),
        torch.nn.ModuleDict({"text": build("native"), "other": build("patched", "v1")}),
    )
    names = {f"other.{name}" for name in tensor_parallel_plan(inner)}
    assert names <= tensor_parallel_plan(whole).keys()
    layer = whole["text"].deberta.encoder.layer[0]
    assert {"", "attention.self.query_proj", "output.dense"} < tensor_parallel_plan(layer).keys()
