"""accelerate with patched and native models: prepare, bfloat16, hooks that move tensors, dispatch, offload."""

import accelerate
import pytest
import torch
import training
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState
from sharding import plugin_for, sharding
from tiny import assert_close, batch, folder, gradients, models, names, options, weights
from torch.distributed.fsdp import FSDPModule

import deberta_fast
from deberta_fast import patch

BF16 = 4 * torch.finfo(torch.bfloat16).eps
LABELS = torch.tensor([0, 2, 1, 0])


@pytest.fixture(autouse=True)
def forget_precision():
    """Accelerator keeps its settings for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def hf(name="v3"):
    checkpoint = folder(name, "ForSequenceClassification", num_labels=3)
    return transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint)


def native(name="v3"):
    kind = deberta_fast.DebertaForSequenceClassification if name == "v1" else None
    kind = kind or deberta_fast.DebertaV2ForSequenceClassification
    return kind.from_pretrained(folder(name, "ForSequenceClassification", num_labels=3)).eval()


def steps(model, name, precision, path):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimiser = accelerator.prepare(model, optimiser)
    losses = []
    for step in range(4):
        with accelerator.accumulate(model):
            outputs = model(**batch(name), labels=LABELS.roll(step))
            assert outputs.logits.shape == (4, 3) and outputs["loss"] is outputs.loss
            accelerator.backward(outputs.loss)
            losses.append(outputs.loss.item())
            if step == 3:
                grads = gradients(model)
            optimiser.step()
            optimiser.zero_grad()
    accelerator.save_state(str(path))
    got = weights(accelerator.unwrap_model(model))
    accelerator.load_state(str(path))
    assert_close(weights(model), got)
    return {"losses": losses, "gradients": grads if precision == "no" else {}}


def forward(model, name):
    outputs = model(**batch(name), labels=LABELS)
    assert type(outputs.loss) is torch.Tensor
    return {"loss": outputs.loss.item(), "logits": outputs.logits.detach()}


@models
def test_prepared(name, options, tmp_path, same_when_patched):
    same_when_patched(lambda: hf(name), lambda model: steps(model, name, "no", tmp_path), **options)


@options
def test_prepared_in_bfloat16(options, tmp_path, same_when_patched):
    same_when_patched(hf, lambda model: steps(model, "v3", "bf16", tmp_path), tolerance=BF16, **options)


@models
def test_hooks_that_move_tensors(name, options, same_when_patched):
    def run(model):
        add_hook_to_module(model, AlignDevicesHook(io_same_device=True, execution_device="cpu"))
        return forward(model, name)

    same_when_patched(lambda: hf(name), run, **options)


@models
def test_dispatched(name, options, same_when_patched):
    def run(model):
        return forward(accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True), name)

    same_when_patched(lambda: hf(name), run, **options)


@pytest.mark.parametrize("name", ["v1", "v3"])
@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload])
def test_offloaded_as_far_as_hugging_face_is(name, offload, tmp_path):
    """DeBERTa reads weights outside of the modules that own them. Offloading leaves no data there: calls may fail."""

    def outcome(model):
        where = {} if offload is accelerate.cpu_offload else {"offload_dir": str(tmp_path / type(model).__module__)}
        try:
            with torch.no_grad():
                return forward(offload(model, execution_device=torch.device("cpu"), **where), name)
        except (NotImplementedError, RuntimeError) as error:
            return error

    expected, patched = outcome(hf(name)), outcome(patch(hf(name)))
    if isinstance(expected, Exception):
        assert "meta" in str(expected)
        assert isinstance(patched, Exception) and "meta" in str(patched) or isinstance(patched, dict)
    else:
        assert_close(patched, expected)


@names
def test_native_prepared(name, tmp_path):
    expected = steps(hf(name), name, "no", tmp_path)["losses"]
    assert_close(steps(native(name), name, "no", tmp_path)["losses"], expected)


@names
def test_native_prepared_in_bfloat16(name, tmp_path):
    expected = steps(native(name), name, "no", tmp_path)["losses"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_close(steps(native(name), name, "bf16", tmp_path)["losses"], expected, 2 * BF16)


@names
@pytest.mark.parametrize("way", ["hook", "dispatch", "send"])
def test_native_outputs_are_rebuilt(name, way):
    expected, model = forward(native(name), name), native(name)
    if way == "hook":
        add_hook_to_module(model, AlignDevicesHook(io_same_device=True, execution_device="cpu"))
    elif way == "dispatch":
        model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        outputs = model(**batch(name), labels=LABELS)
        sent = accelerate.utils.send_to_device(outputs, "cpu")
        assert type(sent) is type(outputs) and torch.equal(sent.logits, outputs.logits)
        assert torch.equal(sent.loss, outputs.loss)
        return
    assert_close(forward(model, name), expected)


def sharded(kind, name, path):
    """Three steps under accelerate's FSDP plugin, and three more that loading its checkpoint undoes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model = training.build(kind, name)
    accelerator = sharding(accelerate.Accelerator(cpu=True), plugin_for(model))
    model, optimiser = accelerator.prepare(model, training.adamw(model))
    assert isinstance(model, FSDPModule) and all(isinstance(x, FSDPModule) for x in model.deberta.encoder.layer)
    data = training.batches(3, torch.distributed.get_rank())
    got = training.train(model, data, optimiser, accelerator.backward)
    accelerator.save_state(path)
    training.train(model, data, optimiser, accelerator.backward)
    accelerator.load_state(path)
    training.assert_same(training.by_name(model), got["weights"], 0)
    return got


@pytest.mark.parametrize("kind, name", [("native", "v1"), ("native", "v3"), ("patched", "v1"), ("unpadded", "v3")])
def test_sharded(kind, name, processes, tmp_path):
    expected = training.train(training.build(kind, name), training.batches(3))
    training.assert_ranks(processes.run(sharded, kind, name, str(tmp_path)), expected)
