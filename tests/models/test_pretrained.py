"""Configurations, and loading and saving of models, without transformers."""

import json
import pickle
import warnings

import pytest
import torch

import deberta_fast
from deberta_fast import (
    DebertaConfig,
    DebertaForMaskedLM,
    DebertaModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    DebertaV2Model,
)
from deberta_fast.checkpoint.hub import Source

TINY = dict(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    max_position_embeddings=64, relative_attention=True, pos_att_type="c2p|p2c", position_biased_input=False,
)  # fmt: skip
IDS = torch.tensor([[5, 7, 9, 11], [6, 8, 10, 3]])


def tiny(kind=DebertaV2Model, **changes):
    torch.manual_seed(1)
    return kind(kind.config_class(**{**TINY, "initializer_range": 0.5, **changes})).eval()


def output(model):
    with torch.no_grad():
        return model(IDS)[0]


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path)
    return tmp_path


def test_config_keeps_what_it_does_not_know(tmp_path):
    values = dict(TINY, model_type="deberta-v2", fancy={"a": 1}, position_buckets=8)
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = DebertaV2Config.from_pretrained(tmp_path, num_labels=4)
    assert config.fancy == {"a": 1} and config.pos_att_type == ["c2p", "p2c"] and config.num_labels == 4
    config.to_json_file(tmp_path / "config.json")
    assert DebertaV2Config.from_json_file(tmp_path / "config.json") == config
    config.save_pretrained(tmp_path / "again")
    assert DebertaV2Config.from_pretrained(tmp_path / "again") == config
    # None as a value would shadow what Hugging Face computes
    assert "attention_head_size" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_config_of_microsoft():
    config = DebertaV2Config.from_dict(dict(TINY, padding_idx=3, pooling={"dropout": 0.25, "hidden_act": "tanh"}))
    assert (config.pad_token_id, config.pooler_dropout, config.pooler_hidden_act) == (3, 0.25, "tanh")


def test_labels():
    config = DebertaV2Config(id2label={"0": "no", "1": "yes", "2": "maybe"})
    assert config.num_labels == 3 and config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert DebertaV2Config(label2id={"no": 0, "yes": 1, "maybe": 2}).id2label == {0: "no", 1: "yes", 2: "maybe"}
    config.num_labels = 2
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    with pytest.raises(ValueError, match="num_labels is 5"):
        DebertaV2Config(id2label={0: "no"}, num_labels=5)


@pytest.mark.parametrize(
    "kind, values, message",
    [
        (DebertaConfig, dict(hidden_size="768"), "hidden_size must be of type int, got '768'"),
        (DebertaConfig, dict(vocab_size=True), "vocab_size must be of type int, got True"),
        (DebertaConfig, dict(hidden_size=10, num_attention_heads=3), "multiple of num_attention_heads, 3, got 10"),
        (DebertaConfig, dict(num_hidden_layers=-1), "num_hidden_layers must not be negative"),
        (DebertaConfig, dict(hidden_dropout_prob=1.0), r"hidden_dropout_prob must be in \[0, 1\)"),
        (DebertaConfig, dict(hidden_act="golu"), "activation must be one of gelu, .* got 'golu'"),
        (DebertaConfig, dict(pos_att_type=["c2c"]), "pos_att_type may hold c2p and p2c, got 'c2c'"),
        (DebertaConfig, dict(problem_type="guess"), "problem_type must be one of"),
        (DebertaConfig, dict(far_negative="other"), "far_negative must be one of"),
        (DebertaConfig, dict(pad_token_id=50265), "pad_token_id must be below vocab_size, 50265, got 50265"),
        (DebertaConfig, dict(position_buckets=256), "DeBERTa v1 has no position_buckets"),
        (DebertaConfig, dict(share_att_key=True), "DeBERTa v1 has neither share_att_key"),
        (DebertaConfig, dict(layer_norm_eps=-1.0), "layer_norm_eps must be positive"),
        (DebertaConfig, dict(embedding_size=0), "embedding_size must be at least 1, got 0"),
        (DebertaConfig, dict(attention_head_size=32), "heads are hidden_size / num_attention_heads = 64 wide"),
        (DebertaConfig, dict(generation=2), "generation is no value of a configuration"),
        (DebertaConfig, dict(to_dict=2), "to_dict is no value of a configuration"),
        (DebertaConfig, dict(enhanced_mask_decoder=True, num_hidden_layers=0), "needs a layer to run again"),
        (DebertaV2Config, dict(position_buckets=1), "position_buckets must be at least 2"),
        (DebertaV2Config, dict(position_buckets=200, max_relative_positions=40), "max_relative_positions at least"),
        (DebertaV2Config, dict(norm_rel_ebd="layernorm"), 'norm_rel_ebd must be "layer_norm" or "none"'),
        (DebertaV2Config, dict(talking_head=True), "talking_head belongs to DeBERTa v1"),
        (DebertaV2Config, dict(conv_kernel_size=4), "conv_kernel_size must be odd, got 4"),
        (DebertaV2Config, dict(conv_kernel_size=3, conv_groups=7), "conv_groups must divide hidden_size, 1536"),
        (DebertaV2Config, dict(num_labels=0), "num_labels must be at least 1"),
    ],
)
def test_bad_config(kind, values, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**values)


@pytest.mark.parametrize("text, message", [("{", "not valid JSON"), ("[]", "must hold a JSON object, got list")])
def test_damaged_config(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        DebertaV2Model.from_pretrained(tmp_path)


def test_no_such_place(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no config.json in"):
        DebertaV2Model.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder '/nowhere/at/all'"):
        DebertaV2Model.from_pretrained("/nowhere/at/all")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="expected the folder"):
        Source(tmp_path / "file")
    with pytest.raises(TypeError, match="expected a folder or a name on the hub, got int"):
        Source(3)


def test_round_trip(folder):
    model, info = DebertaV2Model.from_pretrained(folder, output_loading_info=True)
    assert torch.equal(output(model), output(tiny())) and not model.training
    assert info.file.endswith("model.safetensors") and not info.missing and not info.unexpected
    assert model.config.architectures == ["DebertaV2Model"]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("size", [3000, "2KB", "0.004 MiB"])
def test_shards(size, tmp_path):
    tiny().save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(output(DebertaV2Model.from_pretrained(tmp_path)), output(tiny()))
    tiny().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model-*"))


@pytest.mark.parametrize("size", ["many", "5 parsecs", 0, "-1GB"])
def test_bad_shard_size(size, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size must be"):
        tiny().save_pretrained(tmp_path, max_shard_size=size)


def test_dtype_is_float32_unless_asked(tmp_path):
    tiny().half().save_pretrained(tmp_path)
    assert DebertaV2Model.from_pretrained(tmp_path).dtype == torch.float32
    assert DebertaV2Model.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16
    assert DebertaV2Model.from_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    model = DebertaV2Model.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and output(model).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="dtype must be a floating-point"):
        DebertaV2Model.from_pretrained(tmp_path, dtype="float99")


def test_head_that_the_checkpoint_lacks(folder):
    with pytest.warns(UserWarning, match="lacks them: classifier.bias, classifier.weight, pooler.dense"):
        model, info = DebertaV2ForSequenceClassification.from_pretrained(folder, num_labels=5, output_loading_info=True)
    assert model.classifier.weight.shape == (5, 32) and model.num_labels == 5
    assert info.missing == ["classifier.bias", "classifier.weight", "pooler.dense.bias", "pooler.dense.weight"]
    assert model.classifier.weight.std() > 0.2 and not model.classifier.bias.any()
    assert torch.equal(output(model.deberta), output(tiny()))


def test_heads_that_the_model_lacks(tmp_path):
    whole = tiny(DebertaV2ForTokenClassification)
    whole.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = DebertaV2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert info.ignored == ["classifier.bias", "classifier.weight"]
    assert torch.equal(output(model), output(whole.deberta))


def test_unexpected_tensors_are_reported(folder):
    tensors = {**tiny().state_dict(), "encoder.layer.0.adapter.weight": torch.zeros(2)}
    with pytest.warns(UserWarning, match="not used: encoder.layer.0.adapter.weight") as caught:
        DebertaV2Model.from_pretrained(None, config=tiny().config, state_dict=tensors)
    assert [warning.filename for warning in caught] == [__file__]


def test_other_shapes(folder):
    with pytest.raises(
        ValueError, match=r"embeddings.word_embeddings.weight must be of shape \(41, 32\), got \(40, 32"
    ):
        DebertaV2Model.from_pretrained(folder, vocab_size=41)
    with pytest.warns(UserWarning, match="their shape is another: embeddings.word_embeddings.weight"):
        model = DebertaV2Model.from_pretrained(folder, vocab_size=41, ignore_mismatched_sizes=True)
    assert torch.isfinite(output(model)).all()


def test_wrong_kind(folder):
    with pytest.raises(ValueError, match="model_type is 'deberta-v2', and DebertaConfig describes a 'deberta'"):
        DebertaModel.from_pretrained(folder)
    with pytest.raises(TypeError, match="DebertaV2Model takes a DebertaV2Config, got DebertaConfig"):
        DebertaV2Model(DebertaConfig(**TINY))
    with pytest.raises(TypeError, match="DebertaV2Config has no hidden_sise"):
        DebertaV2Model.from_pretrained(folder, hidden_sise=3)
    with pytest.raises(ValueError, match="config and state_dict must be given"):
        DebertaV2Model.from_pretrained(None)
    with pytest.raises(ValueError, match="state_dict holds no DeBERTa, but other.weight"):
        DebertaV2Model.from_pretrained(None, config=tiny().config, state_dict={"other.weight": torch.ones(2)})


def test_named_weights(folder):
    other = tiny(initializer_range=0.1)
    torch.save({"config": {"a": 1}, "model": other.state_dict()}, folder / "pytorch_model-0003.bin")
    model = DebertaV2Model.from_pretrained(folder, weights="pytorch_model-0003.bin")
    assert torch.equal(output(model), output(other))


def test_loaded_weights_are_no_map_of_their_file(folder):
    """If they were, saving over the loaded file would crash the process."""
    (folder / "model.safetensors").unlink()
    torch.save(tiny().state_dict(), folder / "pytorch_model.bin")
    model = DebertaV2Model.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert torch.equal(output(model), output(tiny()))


def test_a_name_that_cannot_be_translated_comes_with_its_file(folder):
    tensors = {**tiny().state_dict(), "encoder.layer.0.attention.self.in_proj.weight": torch.zeros(96, 32)}
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: encoder.layer.0.*in_proj.weight belongs to DeBERTa v1"):
        DebertaV2Model.from_pretrained(folder, weights="pytorch_model.bin")


@pytest.mark.parametrize("kind", [DebertaForMaskedLM, DebertaV2ForMaskedLM])
@pytest.mark.parametrize("tied", [True, False])
def test_language_model(kind, tied, tmp_path):
    model = tiny(kind, tie_word_embeddings=tied)
    if not tied:
        model.get_output_embeddings().weight.data.normal_()
    model.save_pretrained(tmp_path)
    assert torch.equal(output(kind.from_pretrained(tmp_path)), output(model))


def test_enhanced_mask_decoder_keeps_its_positions(tmp_path):
    """Hugging Face's model lacks them if they are not added to the embeddings. Here they are saved and loaded."""
    model = tiny(DebertaV2ForMaskedLM, enhanced_mask_decoder=True)
    model.save_pretrained(tmp_path)
    again = DebertaV2ForMaskedLM.from_pretrained(tmp_path)
    assert again.config.enhanced_mask_decoder and torch.equal(output(again), output(model))
    plain = DebertaV2ForMaskedLM.from_pretrained(tmp_path, enhanced_mask_decoder=False)
    assert plain.deberta.embeddings.position_embeddings is None
    assert (output(plain) - output(model)).abs().max() > 0.1
    (tmp_path / "plain").mkdir()
    plain.save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="lacks them: deberta.embeddings.position_embeddings.weight"):
        DebertaV2ForMaskedLM.from_pretrained(tmp_path / "plain", enhanced_mask_decoder=True)


def test_saving_a_gathered_state(tmp_path):
    model = tiny()
    state = {name: x + 1 for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = DebertaV2Model.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_resized_vocabulary(tmp_path):
    for tied in (True, False):
        model = tiny(DebertaV2ForMaskedLM, tie_word_embeddings=tied)
        before = output(model)
        embeddings = model.resize_token_embeddings(41, pad_to_multiple_of=8)
        assert embeddings.num_embeddings == model.config.vocab_size == 48 and embeddings.padding_idx == 0
        assert torch.allclose(output(model)[..., :40], before, atol=1e-5) and output(model).shape[-1] == 48
        assert torch.allclose(embeddings.weight[45], embeddings.weight[:40].mean(0))
        model.save_pretrained(tmp_path)
        assert torch.equal(output(DebertaV2ForMaskedLM.from_pretrained(tmp_path)), output(model))
        model.resize_token_embeddings(40)
        assert torch.allclose(output(model), before, atol=1e-5)


def test_backend_by_name():
    model = tiny()
    expected = output(model)
    for name in ("eager", "reference", None):
        model.set_backend(name)
        assert torch.allclose(output(model), expected, atol=1e-5)
    model.set_backend("triton")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve this call"):
        output(model)
    with pytest.raises(ValueError, match="backend must be one of"):
        model.set_backend("fastest")


def test_layers_that_run_again():
    """The backward pass runs every nth layer again, and the two decoder layers if it runs the last layer again."""
    model = tiny(DebertaV2ForMaskedLM, num_hidden_layers=3, enhanced_mask_decoder=True).train()
    runs = [0, 0, 0]
    for index, layer in enumerate(model.deberta.encoder.layer):
        layer.register_forward_pre_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    for every, expected in ((None, [1, 1, 2]), (1, [2, 2, 4]), (2, [2, 1, 4]), (3, [2, 1, 2])):
        if every is not None:
            model.activation_checkpointing_enable(every_n_layers=every)
        runs[:] = [0, 0, 0]
        model(IDS, labels=IDS).loss.backward()
        assert runs == expected, every
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="every_n_layers must be at least 1, got 0"):
        model.activation_checkpointing_enable(every_n_layers=0)
    with pytest.raises(ValueError, match="offload=True is not supported"):
        model.activation_checkpointing_enable(offload=True)


def test_gradients_of_inputs():
    model = tiny()
    model.requires_grad_(False)
    model.disable_input_require_grads()
    for _ in range(2):
        model.enable_input_require_grads()
    assert model(IDS)[0].requires_grad
    pickle.dumps(model)
    model.disable_input_require_grads()
    assert not model(IDS)[0].requires_grad


def test_everything_public_is_there():
    for name in deberta_fast.__all__:
        assert hasattr(deberta_fast, name)
