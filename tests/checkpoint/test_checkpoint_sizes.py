"""Configurations that fit no model, or not the weights beside them: an error names the field at once."""

import json
import math
import time
import warnings

import pytest
import torch
from native_models import build
from safetensors.torch import load_file, save_file

from deberta_fast import (
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
)
from deberta_fast.checkpoint import CheckpointError, check_layers

SLOW = 5  # seconds; a refusal that comes too late takes minutes


@pytest.fixture
def saved(tmp_path):
    """Writes a checkpoint with another config.json; returns its folder."""

    def save(name="v3", head="ForSequenceClassification", **changes):
        build(name, head).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        values = json.loads(path.read_text())
        for change, value in changes.items():
            values.pop(change, None) if value is None else values.update({change: value})
        path.write_text(json.dumps(values))
        return tmp_path

    return save


CONTRADICTED = [
    ("num_hidden_layers", 3, "num_hidden_layers must be at most 2, the layers that the file has, got 3"),
    ("num_hidden_layers", 9_999, "num_hidden_layers must be at most 2, the layers that the file has, got 9999"),
    ("num_hidden_layers", 20_000, "num_hidden_layers must be at most 10000, got 20000"),
    ("num_hidden_layers", 10**9, "num_hidden_layers must be at most 10000, got 1000000000"),
    ("num_labels", 10**9, "num_labels must be at most 4194304, got 1000000000"),
    ("z_steps", 10**9, "z_steps must be at most 1000, got 1000000000"),
    ("conv_kernel_size", 10**9 + 1, r"lacks .*conv.conv.weight, .*\(32, 32, 1000000001\) .*\(conv_kernel_size\)"),
    ("type_vocab_size", 10**9, r"token_type_embeddings.weight must be of shape \(1000000000, 32\), got \(2, 32\)"),
    ("max_relative_positions", 10**400, "max_relative_positions must be below 2\\*\\*31, got a number of 1329 bits"),
    ("hidden_size", 4 * 10**8, "does not fit"),
    ("hidden_size", 2**40, "hidden_size must be below 2\\*\\*31, got 1099511627776"),
    ("vocab_size", 10**9, r"word_embeddings.weight must be of shape \(1000000000, 32\), got \(70, 32\)"),
    ("intermediate_size", 10**9, "does not fit"),
    ("pooler_hidden_size", 10**9, "does not fit"),
    ("position_buckets", 30, r"rel_embeddings.weight must be of shape \(60, 32\), got \(32, 32\)"),
    ("embedding_size", 10**9, "does not fit"),
    ("attention_head_size", 10**8, "does not fit"),
]


@pytest.mark.parametrize("field, value, message", CONTRADICTED, ids=[f"{x}-{str(y)[:12]}" for x, y, _ in CONTRADICTED])
def test_contradicted(saved, field, value, message):
    changes = {"id2label": None, "label2id": None} if field == "num_labels" else {}
    folder = saved(**{field: value, **changes})
    began = time.perf_counter()
    with pytest.raises(ValueError, match=message) as raised:
        DebertaV2ForSequenceClassification.from_pretrained(folder)
    assert time.perf_counter() - began < SLOW
    assert str(folder) in str(raised.value) and len(str(raised.value)) < 10_000


@pytest.mark.parametrize(
    "field, lacking, value",
    [
        ("max_position_embeddings", "deberta.embeddings.position_embeddings.weight", 10**9),
        ("type_vocab_size", "deberta.embeddings.token_type_embeddings.weight", 10**9),
        ("pooler_hidden_size", "pooler.dense.weight", 10**9),
    ],
)
def test_too_large_to_initialise(saved, field, lacking, value):
    """Weights that the file lacks are initialised, and these would fill the memory."""
    folder = saved("v1", **{field: value})
    tensors = load_file(folder / "model.safetensors")
    kept = {x: tensor for x, tensor in tensors.items() if x != lacking and not x.startswith(("pooler", "classifier"))}
    save_file(kept, folder / "model.safetensors")
    began = time.perf_counter()
    with pytest.raises(ValueError, match=rf"{folder}.*lacks {lacking}, .*\({field}\), larger than all that the file"):
        DebertaForSequenceClassification.from_pretrained(folder)
    assert time.perf_counter() - began < SLOW


def test_asked_for_by_name(saved):
    """The caller may ask for more layers than the file has, and the file may lack one of its layers."""
    folder = saved()
    with pytest.warns(UserWarning, match="initialised, for the file lacks them: .*layer.2"):
        model = DebertaV2Model.from_pretrained(folder, num_hidden_layers=3)
    assert len(model.encoder.layer) == 3
    tensors = load_file(folder / "model.safetensors")
    save_file({x: y for x, y in tensors.items() if "layer.0." not in x}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="initialised, for the file lacks them: .*layer.0"):
        DebertaV2Model.from_pretrained(folder)
    with pytest.warns(UserWarning, match="not used: .*layer.1"):
        DebertaV2Model.from_pretrained(folder, num_hidden_layers=1)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.{}.output.dense.bias",
        "module.deberta.encoder.layer.{}.attention.self.q_bias",
        "generator.deberta.encoder.layer.{}.output.dense.bias",
        "tf_deberta_model/deberta/encoder/layer_._{}/output/dense/bias:0",
    ],
)
def test_layers_by_any_name(name):
    tensors = {name.format(number): torch.ones(1) for number in (0, 11, 3)}
    check_layers(tensors, 12, "file")
    check_layers({"embeddings.layer.weight": torch.ones(1)}, 13, "file")
    with pytest.raises(ValueError, match="^file does not fit .* num_hidden_layers must be at most 12, .* got 13"):
        check_layers(tensors, 13, "file")


def test_made_of_a_configuration_alone():
    config = DebertaV2Config(num_labels=100_000, num_hidden_layers=1000, hidden_size=24, z_steps=3)
    assert config.num_labels == 100_000 and config.num_hidden_layers == 1000


NOT_FINITE = [
    (field, value)
    for field in ("layer_norm_eps", "initializer_range", "hidden_dropout_prob", "pooler_dropout", "cls_dropout")
    for value in (math.nan, math.inf, -math.inf)
]


@pytest.mark.parametrize("field, value", NOT_FINITE)
def test_numbers_that_are_none(saved, field, value):
    with pytest.raises(ValueError, match=f"{field} must be finite, got {value}"):
        DebertaConfig(**{field: value})
    folder = saved(**{field: value})
    with pytest.raises(ValueError, match=f"config.json: {field} must be finite, got {value}"):
        DebertaV2Model.from_pretrained(folder)


def test_negative_initializer_range():
    with pytest.raises(ValueError, match="initializer_range must not be negative, got -0.1"):
        DebertaConfig(initializer_range=-0.1)


@pytest.mark.parametrize("depth", [150, 900, 10**5])
@pytest.mark.parametrize("kind", ["[]", "{}"])
def test_nested(saved, depth, kind):
    folder = saved()
    nest = "[" * depth + "]" * depth if kind == "[]" else '{"a":' * depth + "1" + "}" * depth
    (folder / "config.json").write_text('{"model_type": "deberta-v2", "mine": ' + nest + "}")
    with pytest.raises(ValueError, match="config.json is nested too deeply, at most 100 levels are read"):
        DebertaV2Model.from_pretrained(folder)


def test_a_number_of_many_digits(saved):
    folder = saved()
    (folder / "config.json").write_text('{"mine": ' + "1" * 10_000 + "}")
    with pytest.raises(ValueError, match="config.json is not valid JSON: Exceeds the limit"):
        DebertaV2Model.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_no_floating_point_numbers(saved, dtype, kind):
    folder = saved()
    name = "deberta.encoder.layer.0.attention.self.query_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / kind) if kind.endswith("safetensors") else torch.save(tensors, folder / kind)
    with pytest.raises(
        CheckpointError, match=f"{folder}: {kind}: .*{name} must be of a floating-point dtype, got {dtype}"
    ):
        DebertaV2ForSequenceClassification.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors[name] = torch.ones(32, 32, dtype=torch.float16)
        model = DebertaV2ForSequenceClassification.from_pretrained(None, config=build("v3").config, state_dict=tensors)
    assert model.dtype == torch.float32
