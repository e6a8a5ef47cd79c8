"""Values that models and configurations refuse, and the messages of the errors."""

import pytest
import torch
from native_models import build

from deberta_fast import DebertaConfig, DebertaV2Config

IDS = torch.ones(2, 5, dtype=torch.long)
CALLS = {
    "neither": ("Model", {}, "exactly one of input_ids and inputs_embeds"),
    "both": (
        "Model",
        dict(input_ids=IDS, inputs_embeds=torch.ones(2, 5, 32)),
        "exactly one of input_ids and inputs_em",
    ),
    "ids": ("Model", dict(input_ids=IDS[0]), r"input_ids must be of shape \(B, L\) with L at least 1, got \(5,\)"),
    "no-tokens": ("Model", dict(input_ids=IDS[:, :0]), r"input_ids must be of shape .* got \(2, 0\)"),
    "embeddings": (
        "Model",
        dict(inputs_embeds=torch.ones(2, 5)),
        r"inputs_embeds must be of shape \(B, L, embedding_size\) with L at least 1, got \(2, 5\)",
    ),
    "no-choices": ("ForMultipleChoice", dict(), "exactly one of input_ids and inputs_embeds must be given"),
    "mask": (
        "Model",
        dict(input_ids=IDS, attention_mask=IDS[:, 1:]),
        r"attention_mask must be of shape \(2, 5\), or pairwise \(2, 5, 5\) or \(2, 1, 5, 5\), got \(2, 4\)",
    ),
    "mask-per-head": ("ForMaskedLM", dict(input_ids=IDS, attention_mask=torch.ones(2, 4, 5, 5)), r"got \(2, 4, 5, 5\)"),
    "token-labels": (
        "ForTokenClassification",
        dict(input_ids=IDS, labels=IDS[:, 1:]),
        r"labels must be of shape \(2, 5\), got \(2, 4\)",
    ),
    "masked-labels": (
        "ForMaskedLM",
        dict(input_ids=IDS, labels=IDS[0]),
        r"labels must be of shape \(2, 5\), got \(5,\)",
    ),
    "labels": (
        "ForSequenceClassification",
        dict(input_ids=IDS, labels=torch.ones(2, 3)),
        r"labels must be of shape \(2, 2\) or \(2,\), got \(2, 3\)",
    ),
    "batch-of-labels": (
        "ForSequenceClassification",
        dict(input_ids=IDS, labels=torch.ones(3, dtype=torch.long)),
        r"labels must be of shape \(2, 2\) or \(2,\), got \(3,\)",
    ),
}


@pytest.mark.parametrize("head, inputs, message", CALLS.values(), ids=CALLS)
def test_calls_are_refused(head, inputs, message):
    with pytest.raises(ValueError, match=message):
        build("v3", head)(**inputs)


def test_labels_are_refused_by_problem_type():
    for problem, labels in (("regression", [1, 2]), ("multi_label_classification", [1, 0])):
        model = build("v3", "ForSequenceClassification", problem_type=problem, num_labels=3)
        with pytest.raises(ValueError, match=r"labels must be of shape \(2, 3\), got \(2,\)"):
            model(IDS, labels=torch.tensor(labels))


TYPES = {
    "type": (DebertaConfig, dict(hidden_size=768.0), "hidden_size must be of type int, got 768.0"),
    "bool-for-int": (DebertaConfig, dict(hidden_size=True), "hidden_size must be of type int, got True"),
    "int-for-bool": (DebertaConfig, dict(relative_attention=1), "relative_attention must be of type bool, got 1"),
    "several-types": (DebertaV2Config, dict(pad_token_id="0"), r"pad_token_id must be of type int \| None, got '0'"),
}
VALUES = {
    "vocabulary": (DebertaConfig, dict(vocab_size=0), "vocab_size must be at least 1, got 0"),
    "num_labels": (DebertaConfig, dict(num_labels=0), "num_labels must be at least 1, got 0"),
    "pooler": (DebertaConfig, dict(pooler_hidden_size=0), "pooler_hidden_size must be at least 1, got 0"),
    "layers": (DebertaConfig, dict(num_hidden_layers=-1), "num_hidden_layers must not be negative, got -1"),
    "z_steps": (DebertaConfig, dict(z_steps=-2), "z_steps must not be negative, got -2"),
    "dropout": (DebertaConfig, dict(cls_dropout=1.0), r"cls_dropout must be in \[0, 1\), got 1.0"),
    "padding": (DebertaV2Config, dict(vocab_size=9, pad_token_id=9), "pad_token_id must be below vocab_size, 9, got 9"),
    "heads": (
        DebertaConfig,
        dict(num_attention_heads=7),
        "hidden_size must be a multiple of num_attention_heads, 7, got 768",
    ),
    "terms": (DebertaConfig, dict(pos_att_type="c2p|c2c"), "pos_att_type may hold c2p and p2c, got 'c2c'"),
    "activation": (DebertaConfig, dict(hidden_act="step"), "activation must be one of .*gelu.*, got 'step'"),
    "pooler-activation": (DebertaConfig, dict(pooler_hidden_act="x"), "activation must be one of .*, got 'x'"),
    "conv-activation": (DebertaV2Config, dict(conv_act="y"), "activation must be one of .*, got 'y'"),
    "problem": (
        DebertaConfig,
        dict(problem_type="ranking"),
        "problem_type must be one of .*regression.*, got 'ranking'",
    ),
    "far": (DebertaV2Config, dict(far_negative="far"), "far_negative must be one of .*, got 'far'"),
    "labels": (DebertaConfig, dict(id2label={0: "a"}, num_labels=2), "num_labels is 2, and id2label names 1 labels"),
    "v1-buckets": (DebertaConfig, dict(position_buckets=4), "v1 has no position_buckets, got 4: see DebertaV2Config"),
    "v1-conv": (DebertaConfig, dict(conv_kernel_size=3), "v1 has no conv_kernel_size, got 3"),
    "v1-shared": (DebertaConfig, dict(share_att_key=True), "neither share_att_key nor norm_rel_ebd"),
    "v1-norm": (DebertaConfig, dict(norm_rel_ebd="layer_norm"), "neither share_att_key nor norm_rel_ebd"),
    "v2-talking": (DebertaV2Config, dict(talking_head=True), "talking_head belongs to DeBERTa v1"),
    "even-conv": (DebertaV2Config, dict(conv_kernel_size=4), "conv_kernel_size must be odd, got 4"),
    "groups": (
        DebertaV2Config,
        dict(conv_kernel_size=3, conv_groups=7),
        "conv_groups must divide hidden_size, 1536, got 7",
    ),
}


@pytest.mark.parametrize("kind, values, message", VALUES.values(), ids=VALUES)
def test_values_are_refused(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


@pytest.mark.parametrize("kind, values, message", TYPES.values(), ids=TYPES)
def test_types_are_refused(kind, values, message):
    with pytest.raises(TypeError, match=message):
        kind(**values)


def test_configurations_of_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no config.json in"):
        DebertaConfig.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    for text, message in (
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json must hold a JSON object, got list"),
        ('{"model_type": "bert"}', "config.json: model_type is 'bert', and DebertaConfig describes a 'deberta'"),
        ('{"vocab_size": -4}', "config.json: vocab_size must be at least 1, got -4"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            DebertaConfig.from_pretrained(tmp_path)
    file.write_text('{"hidden_size": "768"}')
    with pytest.raises(TypeError, match="config.json: hidden_size must be of type int, got '768'"):
        DebertaConfig.from_pretrained(tmp_path)


def test_configurations_round_trip(tmp_path):
    config = DebertaV2Config(
        pos_att_type="P2C | c2p", pooler_hidden_size=9, id2label={"1": "b", "0": "a"}, pad_token_id=None,
        some_tool={"of": [1, 2]}, cls_dropout=0.2,
    )  # fmt: skip
    assert config.pos_att_type == ["p2c", "c2p"] and config.id2label == {0: "a", 1: "b"} and config.num_labels == 2
    assert config.label2id == {"a": 0, "b": 1} and config.some_tool == {"of": [1, 2]}
    config.save_pretrained(tmp_path)
    again = DebertaV2Config.from_pretrained(tmp_path)
    assert again == config and again.pad_token_id is None and again.to_dict() == config.to_dict()
    assert DebertaV2Config.from_pretrained(tmp_path, num_labels=4).id2label == {i: f"LABEL_{i}" for i in range(4)}
    assert config != DebertaV2Config() and config != DebertaConfig()
    microsoft = DebertaV2Config.from_dict({"padding_idx": 5, "pooling": {"dropout": 0.3, "hidden_act": "tanh"}})
    assert (microsoft.pad_token_id, microsoft.pooler_dropout, microsoft.pooler_hidden_act) == (5, 0.3, "tanh")
