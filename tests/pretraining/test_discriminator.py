"""The head that finds replaced tokens, against its formula; and a model's layers without the ordinary last run."""

import pytest
import torch
from native_models import build, randomise, settings
from torch.nn import functional as F

import deberta_fast
from deberta_fast import DebertaConfig, DebertaV2Config
from deberta_fast.pretraining.discriminator import (
    DebertaForReplacedTokens,
    DebertaV2ForReplacedTokens,
    replaced_tokens_loss,
)

LENGTHS = (13, 30, 1)


def model(name):
    second = not name.startswith("v1")
    kind, config = (
        (DebertaV2ForReplacedTokens, DebertaV2Config) if second else (DebertaForReplacedTokens, DebertaConfig)
    )
    return randomise(kind(config(**settings(name)))).double().eval()


def batches():
    """The same sequences padded and packed, with labels."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 70, (n,), generator=generator) for n in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.stack([(torch.arange(max(LENGTHS)) < n).long() for n in LENGTHS])
    labels = (torch.rand(ids.shape, generator=generator) < 0.3).long()
    packed = dict(
        input_ids=torch.cat(rows), cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(), max_seqlen=max(LENGTHS),
        labels=labels[mask.bool()],
    )  # fmt: skip
    return dict(input_ids=ids, attention_mask=mask, labels=labels), packed


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_formula_and_packing(name):
    detector, (padded, packed) = model(name), batches()
    output = detector(**padded)
    states = detector.deberta(padded["input_ids"], padded["attention_mask"]).last_hidden_state
    head = detector.mask_predictions
    eps = detector.config.layer_norm_eps
    x = states[:, :1] + states
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    x = F.gelu((x * head.LayerNorm.weight + head.LayerNorm.bias) @ head.dense.weight.T + head.dense.bias)
    expected = (x @ head.classifier.weight.T + head.classifier.bias)[..., 0]
    tokens = padded["attention_mask"].bool()
    torch.testing.assert_close(output.logits[tokens], expected[tokens], rtol=1e-10, atol=1e-10)
    loss = F.binary_cross_entropy_with_logits(expected[tokens], padded["labels"][tokens].double())
    torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=0)
    by_packing = detector(**packed)
    torch.testing.assert_close(by_packing.logits, expected[tokens], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(by_packing.loss, loss, rtol=1e-10, atol=0)


def test_loss_leaves_out_padding_and_negative_labels():
    logits = torch.tensor([[1.0, -2.0, 3.0, 9.0]])
    labels, mask = torch.tensor([[1, 0, -100, 1]]), torch.tensor([[True, True, True, False]])
    expected = F.binary_cross_entropy_with_logits(logits[0, :2], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(replaced_tokens_loss(logits, labels, mask), expected)
    assert replaced_tokens_loss(logits, torch.full_like(labels, -1)) == 0
    assert replaced_tokens_loss(logits.bfloat16(), labels).dtype == torch.float32
    with pytest.raises(ValueError, match=r"labels must be of shape \(1, 4\), got \(4,\)"):
        replaced_tokens_loss(logits, labels[0])


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_saved_and_loaded(name, tmp_path):
    detector, (padded, _) = model(name).float(), batches()
    detector.save_pretrained(tmp_path)
    loaded, info = type(detector).from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(loaded(**padded).logits, detector(**padded).logits)
    body = deberta_fast.DebertaModel if name == "v1" else deberta_fast.DebertaV2Model
    states = body.from_pretrained(tmp_path)(padded["input_ids"], padded["attention_mask"]).last_hidden_state
    assert torch.equal(states, detector.deberta(padded["input_ids"], padded["attention_mask"]).last_hidden_state)


@pytest.mark.parametrize("name, layers", [("v1", 2), ("v3", 3), ("v3-conv", 3)])
def test_enhanced_mask_decoder_runs_each_layer_once_and_the_last_twice(name, layers):
    generator = build(name, "ForMaskedLM", enhanced_mask_decoder=True, position_biased_input=False,
                      num_hidden_layers=layers).double()  # fmt: skip
    runs = []
    for index, layer in enumerate(generator.deberta.encoder.layer):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    padded, packed = ({k: v for k, v in x.items() if k != "labels"} for x in batches())
    logits = [generator(**inputs).logits for inputs in (padded, packed)]
    assert runs == 2 * [*range(layers), layers - 1]
    runs.clear()
    whole = generator(**padded, output_hidden_states=True)
    assert runs == [*range(layers), layers - 1, layers - 1]
    torch.testing.assert_close(whole.logits, logits[0], rtol=1e-12, atol=1e-12)
    assert len(whole.hidden_states) == layers + 1
    tokens = padded["attention_mask"].bool()
    torch.testing.assert_close(whole.logits[tokens], logits[1], rtol=1e-9, atol=1e-9)
    states, outputs = generator.predicting_states(**padded)
    assert states.shape == (3, 30, 32) and not outputs.to_tuple()


def test_first_layers_alone():
    body, (padded, _) = build("v3", num_hidden_layers=3), batches()
    inputs = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
    states = body(**inputs, output_hidden_states=True).hidden_states
    for number in range(4):
        assert torch.equal(body(**inputs, num_layers=number).last_hidden_state, states[number])
    with pytest.raises(ValueError, match="num_layers must be from 0 to 3, got 4"):
        body(**inputs, num_layers=4)
