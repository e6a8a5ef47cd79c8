"""TorchScript and torchinfo on patched models, and v1 in half precision, where Hugging Face's own code fails."""

import pytest
import torch
import torchinfo
import transformers
from tiny import assert_close, batch, folder, models, options

import deberta_fast
from deberta_fast import patch

HEAD = "ForSequenceClassification"


def hf(name, **settings):
    checkpoint = folder(name, HEAD, num_labels=3)
    return transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint, **settings)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask).logits


def inputs(name):
    encoded = batch(name)
    return encoded["input_ids"], encoded["attention_mask"]


@models
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_traced_saved_and_loaded(name, options, tmp_path):
    model = hf(name)
    others = [x.flip(0) for x in inputs(name)]  # their padding is in other places than in the traced inputs
    expected = [Logits(model)(*x).detach() for x in (inputs(name), others)]
    traced = torch.jit.trace(Logits(patch(model, **options)), inputs(name), check_trace=False)
    torch.jit.save(traced, tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    assert_close([loaded(*x).detach() for x in (inputs(name), others)], expected)


@models
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_torchinfo(name, options, device):
    """The summary has the same parameters and sizes. It hooks every module, so Hugging Face's own attention runs."""
    summary = lambda model: torchinfo.summary(
        model, input_data=dict(zip(("input_ids", "attention_mask"), [x.to(device) for x in inputs(name)], strict=True)),
        device=device, verbose=0, depth=2,
    )  # fmt: skip
    expected = summary(hf(name))
    with pytest.warns(UserWarning, match="dropout is a Dropout with hooks"):
        got = summary(patch(hf(name), **options))
    shown = lambda x: [
        (layer.class_name, layer.depth, layer.output_size) for layer in x.summary_list if layer.depth < 2
    ]
    assert got.total_params == expected.total_params and shown(got) == shown(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@options
@torch.no_grad()
def test_v1_in_half_precision(dtype, options):
    """Loading casts all weights except q_bias and v_bias, and Hugging Face's own code then fails."""
    model, arguments = hf("v1", dtype=dtype), batch("v1")
    assert model.deberta.encoder.layer[0].attention.self.q_bias.dtype == torch.float32
    expected = hf("v1")(**arguments).logits
    patched = patch(model, **options)(**arguments).logits
    native = deberta_fast.DebertaForSequenceClassification.from_pretrained(
        folder("v1", HEAD, num_labels=3), dtype=dtype
    )
    for got in (patched, native.eval()(**arguments).logits):
        assert got.dtype == dtype
        assert_close(got.float(), expected, tolerance=16 * torch.finfo(dtype).eps)
