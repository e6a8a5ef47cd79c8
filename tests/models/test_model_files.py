"""Models in files, and models whose vocabulary changes."""

import copy
import io
import warnings

import pytest
import torch
from native_models import EMD, build, heads, inputs_of, names, tokens

import deberta_fast
from deberta_fast import DebertaV2Config

# Embeddings


@names
def test_inputs_embeds_stand_for_their_ids(name):
    model, inputs = build(name, "ForMaskedLM"), inputs_of("ForMaskedLM")
    by_ids = model(**inputs).logits
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model(inputs_embeds=embedded, **inputs).logits, by_ids)


def test_token_types_and_positions_default_to_zeros_and_counting():
    model, (ids, *_) = build("v2"), inputs_of("Model", "none").values()
    counting = torch.arange(19)[None]
    assert torch.equal(model(ids)[0], model(ids, token_type_ids=ids * 0, position_ids=counting)[0])
    assert not torch.allclose(model(ids)[0], model(ids, token_type_ids=ids * 0 + 1)[0])
    assert not torch.allclose(model(ids)[0], model(ids, position_ids=counting + 1)[0])
    typeless = build("v2", type_vocab_size=0)
    assert torch.equal(typeless(ids)[0], typeless(ids, token_type_ids=ids % 2)[0])


def test_padding_row_takes_no_gradient():
    model = build("v3", pad_token_id=7)
    model(tokens()["input_ids"].masked_fill(tokens()["input_ids"] % 3 == 0, 7))[0].sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert not gradient[7].any() and gradient.any(1).sum() > 30


def parameters(model):
    return sum(1 for _ in model.parameters())


def test_output_embeddings_are_tied_unless_told_otherwise():
    tied, untied = (build("v3", "ForMaskedLM", tie_word_embeddings=x) for x in (True, False))
    assert parameters(untied) == parameters(tied) + 1
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight
    inputs = inputs_of("ForMaskedLM")
    states = tied.deberta(**inputs)[0]
    torch.testing.assert_close(untied(**inputs).logits, untied.lm_predictions(states, None))
    # tie_weights keeps output embeddings that were set
    decoder = untied.get_output_embeddings()
    tied.set_output_embeddings(decoder)
    assert tied.get_output_embeddings() is decoder and not tied.config.tie_word_embeddings
    tied.tie_weights()
    assert tied.get_output_embeddings() is decoder
    tied.set_output_embeddings(tied.get_input_embeddings())
    assert tied.config.tie_word_embeddings and parameters(untied) == parameters(tied) + 1
    untied.config.tie_word_embeddings = True
    untied.tie_weights()
    assert untied.get_output_embeddings().weight is untied.get_input_embeddings().weight
    assert build("v3", "ForSequenceClassification").get_output_embeddings() is None


def test_input_embeddings_can_be_replaced():
    for head in ("Model", "ForMaskedLM", "ForQuestionAnswering"):
        model, other = build("v3", head), torch.nn.Embedding(70, 32)
        model.set_input_embeddings(other)
        assert model.get_input_embeddings() is model.base_model.embeddings.word_embeddings is other
        inputs = inputs_of(head)
        bare = {"attention_mask": inputs["attention_mask"], "token_type_ids": inputs["token_type_ids"]}
        assert torch.equal(model(**inputs)[0], model(inputs_embeds=other(inputs["input_ids"]), **bare)[0])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["v1", "v2-c2p-narrow-embeddings", "v3"])
def test_vocabulary_grows_and_shrinks(name, tied, tmp_path):
    model, inputs = build(name, "ForMaskedLM", tie_word_embeddings=tied), inputs_of("ForMaskedLM", labels=True)
    count, old = parameters(model), model.get_input_embeddings().weight.detach().clone()
    output = model.get_output_embeddings().weight.detach().clone()
    logits = model(**inputs).logits
    assert (
        model.resize_token_embeddings() is model.get_input_embeddings()
        and len(model.get_input_embeddings().weight) == 70
    )
    grown = model.resize_token_embeddings(83)
    assert type(grown) is torch.nn.Embedding and grown is model.get_input_embeddings() and grown.num_embeddings == 83
    assert torch.equal(grown.weight[:70], old) and grown.padding_idx == 0
    torch.testing.assert_close(grown.weight[70:], old.mean(0).expand(13, -1))
    torch.testing.assert_close(model.get_output_embeddings().weight[70:], output.mean(0).expand(13, -1))
    assert not model.lm_predictions.lm_head.bias[70:].any()
    assert model.config.vocab_size == model.deberta.config.vocab_size == 83 and parameters(model) == count
    got = model(**inputs)
    assert got.logits.shape == (3, 19, 83)
    torch.testing.assert_close(got.logits[..., :70], logits)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, got.logits)
    model.resize_token_embeddings(60)
    inputs["input_ids"].clamp_(max=59)
    assert model(**inputs).logits.shape == (3, 19, 60) and torch.equal(model.get_input_embeddings().weight, old[:60])
    model(**inputs).loss.backward()
    assert model.get_output_embeddings().weight.grad.shape[0] == 60
    assert model.resize_token_embeddings(61, pad_to_multiple_of=8).num_embeddings == 64 == model.config.vocab_size
    assert model.resize_token_embeddings(pad_to_multiple_of=64).num_embeddings == 64


def test_resizing_keeps_frozen_frozen_and_dtype():
    model = build("v3", "ForMaskedLM").bfloat16()
    model.get_input_embeddings().weight.requires_grad_(False)
    weight = model.resize_token_embeddings(75).weight
    assert (
        weight.dtype == torch.bfloat16 and not weight.requires_grad and model.lm_predictions.lm_head.bias.requires_grad
    )


def test_impossible_vocabularies_are_refused():
    model = build("v3", pad_token_id=7)
    for number in (0, -3, 90.0):
        with pytest.raises(ValueError, match=f"new_num_tokens must be a whole number from 1 on, got {number}"):
            model.resize_token_embeddings(number)
    for multiple in (0, -8, 1.3):
        with pytest.raises(ValueError, match=f"pad_to_multiple_of must be a whole number from 1 on, got {multiple}"):
            model.resize_token_embeddings(50, pad_to_multiple_of=multiple)
    with pytest.raises(ValueError, match="new_num_tokens=7 leaves no row for pad_token_id=7"):
        model.resize_token_embeddings(7)


# Files


@heads
def test_saved_and_loaded_twice(name, head, tmp_path):
    changes = EMD if head == "ForMaskedLM" else {}
    model, inputs = build(name, head, num_labels=3, **changes), inputs_of(head)
    expected = model(**inputs)[0]
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.train().save_pretrained(folder)
        assert (folder / "config.json").exists()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not again.training and not info.missing and not info.unexpected and not info.mismatched
        assert again.config.to_dict() == {**model.config.to_dict(), "architectures": [type(model).__name__]}
        assert again.state_dict().keys() == model.state_dict().keys()
        torch.testing.assert_close(again(**inputs)[0], expected, atol=1e-6, rtol=1e-5)
        assert all(torch.equal(p, again.state_dict()[key]) for key, p in model.state_dict().items())
        assert all(p.requires_grad and p.dtype == torch.float32 for p in again.parameters())
        model = again


def test_split_into_several_files(tmp_path):
    model, inputs = build("v3", "ForMaskedLM"), inputs_of("ForMaskedLM")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)
    model.save_pretrained(tmp_path, max_shard_size=10**9)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)


def test_state_dict_through_torch_save():
    model, buffer = build("v2", "ForMaskedLM"), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = type(model)(model.config)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other.eval()(**tokens()).logits, model(**tokens()).logits)


def test_head_on_a_checkpoint_of_another_head(tmp_path):
    model = build("v3", "ForMaskedLM")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="classifier.bias, classifier.weight, pooler.dense.bias, pooler.dense.weight"):
        classifier, info = deberta_fast.DebertaV2ForSequenceClassification.from_pretrained(
            tmp_path, num_labels=5, output_loading_info=True
        )
    assert info.missing == ["classifier.bias", "classifier.weight", "pooler.dense.bias", "pooler.dense.weight"]
    assert classifier.classifier.weight.std() < 0.05 and not classifier.classifier.bias.any()
    assert torch.equal(classifier.deberta(**tokens())[0], model.deberta(**tokens())[0])
    base, info = deberta_fast.DebertaV2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info.missing and torch.equal(base(**tokens())[0], model.deberta(**tokens())[0])
    # and back: a checkpoint of the base model fills the encoder of a task model
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="qa_outputs.bias, qa_outputs.weight"):
        answering = deberta_fast.DebertaV2ForQuestionAnswering.from_pretrained(tmp_path / "base")
    assert torch.equal(answering.deberta(**tokens())[0], base(**tokens())[0])


def test_other_shapes_are_refused_or_initialised(tmp_path):
    model = build("v3", "ForSequenceClassification", num_labels=3)
    model.save_pretrained(tmp_path)
    kind = type(model)
    with pytest.raises(
        ValueError, match=r"classifier.bias must be of shape \(42,\), got \(3,\).*ignore_mismatched_sizes"
    ):
        kind.from_pretrained(tmp_path, num_labels=42)
    with pytest.warns(UserWarning, match="their shape is another: classifier.bias, classifier.weight"):
        other, info = kind.from_pretrained(
            tmp_path, num_labels=42, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert info.mismatched == ["classifier.bias", "classifier.weight"] and other(**tokens()).logits.shape == (3, 42)
    assert torch.equal(other.pooler.dense.weight, model.pooler.dense.weight)


def test_dtypes_and_configuration_on_loading(tmp_path):
    model = build("v3", "ForTokenClassification").bfloat16()
    model.save_pretrained(tmp_path)
    kind = type(model)
    for asked, expected in ((None, torch.float32), ("auto", torch.bfloat16), (torch.float16, torch.float16)):
        again = kind.from_pretrained(tmp_path, **({} if asked is None else dict(dtype=asked)))
        assert {p.dtype for p in again.parameters()} == {expected} and again.dtype == expected
    changed = kind.from_pretrained(tmp_path, hidden_dropout_prob=0.3, far_negative="ms")
    assert changed.dropout.p == 0.3 and changed.config.far_negative == "ms"
    config = copy.deepcopy(model.config)
    other = kind.from_pretrained(tmp_path, config=config)
    assert other.config == config and other.config is not config
    given = kind.from_pretrained(None, config=config, state_dict=model.state_dict(), dtype="auto")
    assert torch.equal(given(**tokens()).logits, model(**tokens()).logits)
    with torch.device("meta"):
        assert kind.from_pretrained(tmp_path).device.type == "cpu"


def test_new_models_are_initialised_as_the_configuration_says():
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=500, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256,
        relative_attention=True, pos_att_type="c2p", initializer_range=0.3, conv_kernel_size=3,
        norm_rel_ebd="layer_norm", pad_token_id=3,
    )  # fmt: skip
    for name, value in deberta_fast.DebertaV2ForMaskedLM(config).named_parameters():
        if "LayerNorm" in name or name.endswith("bias"):
            assert torch.equal(value, torch.full_like(value, float(name.endswith("LayerNorm.weight")))), name
        else:
            assert 0.27 < value.std() < 0.33 and value.mean().abs() < 0.03, name
            if "word_embeddings" in name:
                assert not value[3].any() and value[0].any()


def test_models_of_files_are_refused(tmp_path):
    kind = deberta_fast.DebertaV2ForSequenceClassification
    model = build("v3", "ForSequenceClassification")
    with pytest.raises(ValueError, match="config and state_dict must be given"):
        kind.from_pretrained(None, config=model.config)
    with pytest.raises(FileNotFoundError):
        kind.from_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        kind.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="DebertaV2Config has no hidden_sizes"):
        kind.from_pretrained(tmp_path, hidden_sizes=3)
    for dtype in (torch.int8, "int8", "float99"):
        with pytest.raises(TypeError, match='dtype must be a floating-point torch.dtype or "auto", got'):
            kind.from_pretrained(tmp_path, dtype=dtype)
    with pytest.raises(ValueError, match="state_dict holds no DeBERTa, but other"):
        kind.from_pretrained(None, config=model.config, state_dict={"other": torch.ones(2)})
    with pytest.raises(ValueError, match="model_type is 'deberta-v2', and DebertaConfig describes a 'deberta'"):
        deberta_fast.DebertaForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="DebertaV2Model takes a DebertaV2Config, got DebertaConfig"):
        deberta_fast.DebertaV2Model(build("v1").config)
    for size, message in (("5 apples", "\"500MB\", got '5 apples'"), (0, "max_shard_size must be positive, got 0")):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "no", max_shard_size=size)
