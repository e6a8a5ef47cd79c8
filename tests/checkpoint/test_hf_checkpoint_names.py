"""Checkpoints of Hugging Face's own models, read and written; `make test-oldest` runs this with transformers 4.48."""

import json
import logging

import native_models
import pytest
import torch
import transformers
from checkpoint_files import HEADS
from hf_models import randomise
from safetensors.torch import load_file

from deberta_fast.checkpoint import read_tensors, to_hf, to_native, write_tensors
from deberta_fast.checkpoint.hub import Source

HEAD = "lm_predictions.lm_head."
LARGE = dict(position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True, conv_kernel_size=3, conv_groups=2)
CONFIGS = {
    "v1": (1, {}),
    "v1-talking": (1, dict(talking_head=True, position_biased_input=False, pos_att_type=["c2p"])),
    "v1-narrow": (1, dict(embedding_size=6, relative_attention=False)),
    "v2": (2, dict(position_biased_input=False)),
    "v2-everything": (2, LARGE),
    "v2-narrow": (2, dict(embedding_size=6, pos_att_type=["p2c"])),
}
TASKS = ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"]
MODELS = [
    (name, task, {}) for name in CONFIGS for task in TASKS if CONFIGS[name][0] == 2 or task != "ForMultipleChoice"
]
MODELS += [
    (name, "ForMaskedLM", dict(legacy=legacy, tie_word_embeddings=tied))
    for name in CONFIGS
    for legacy in (True, False)
    for tied in (True, False)
    # The head without ``legacy`` takes no narrow embeddings, and transformers 4 ties its dense layer to the embeddings.
    if legacy or ("narrow" not in name and not (tied and transformers.__version__.startswith("4.")))
]
IDS = ["-".join(map(str, (name, task, *changes.values()))) for name, task, changes in MODELS]


def build(name, task, changes):
    version, config = CONFIGS[name]
    prefix = "Deberta" if version == 1 else "DebertaV2"
    common = dict(
        vocab_size=20, hidden_size=8, num_attention_heads=HEADS, num_hidden_layers=2, intermediate_size=12,
        max_position_embeddings=16, type_vocab_size=2, relative_attention=True, pos_att_type=["c2p", "p2c"],
    )  # fmt: skip
    config = getattr(transformers, prefix + "Config")(**{**common, **config, **changes})
    return randomise(getattr(transformers, prefix + task)(config)).eval(), version


def expected_names(model, version):
    """The parameter names of this package's model for the same configuration."""
    names = set()
    v1 = {"q_bias": "query_proj.bias", "v_bias": "value_proj.bias", "pos_proj.weight": "pos_key_proj.weight",
          "pos_q_proj.weight": "pos_query_proj.weight", "pos_q_proj.bias": "pos_query_proj.bias"}  # fmt: skip
    for name in model.state_dict():
        start, _, last = name.partition("attention.self.")
        if version == 1 and last == "in_proj.weight":
            names |= {f"{start}attention.self.{x}_proj.weight" for x in ("query", "key", "value")}
        elif version == 1 and last in v1:
            names.add(f"{start}attention.self.{v1[last]}")
        elif name.startswith("cls."):
            last = name.removeprefix("cls.predictions.").removeprefix("transform.")
            if last != "decoder.bias" and (last != "decoder.weight" or not model.config.tie_word_embeddings):
                names.add(HEAD + last)
        else:
            names.add(name)
    return names


def assert_hugging_face_loads(folder, model, unexpected=()):
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert set(info.pop("unexpected_keys")) <= set(unexpected) and not any(info.values())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    ids = torch.arange(1, 10).view(1, 9)
    ids = ids.unsqueeze(1).expand(-1, 2, -1) if "Choice" in type(model).__name__ else ids
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(input_ids=ids)[0], model(input_ids=ids)[0])


def tie_bias(model):
    """Makes the two biases of the head equal: if nothing is tied, transformers 5 adds only the decoder's."""
    if hasattr(model, "cls"):
        model.cls.predictions.bias.data.copy_(model.cls.predictions.decoder.bias.data)


@pytest.mark.parametrize("name, task, changes", MODELS, ids=IDS)
def test_there_and_back(tmp_path, name, task, changes):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model, version = build(name, task, changes)
    tie_bias(model)
    model.save_pretrained(tmp_path / "theirs")
    tensors, file = read_tensors(Source(tmp_path / "theirs"))
    assert file == "model.safetensors"
    expected = expected_names(model, version)
    native, ignored = to_native(tensors, version=version, heads=HEADS, expected=expected, part="discriminator")
    assert native.keys() == expected and not ignored
    back = to_hf(native, version=version, heads=HEADS, legacy=model.config.legacy)
    bias = "cls.predictions.decoder.bias"
    if not model.config.tie_word_embeddings and model.config.legacy and bias not in tensors:  # transformers 4
        assert torch.equal(back.pop(bias), model.state_dict()[bias])
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[x], tensors[x]) for x in back)

    back = to_hf(native, version=version, heads=HEADS, legacy=model.config.legacy)
    write_tensors(back, tmp_path / "ours", max_shard_bytes=3000)
    assert len(json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())["weight_map"]) == len(back)
    model.config.save_pretrained(tmp_path / "ours")
    assert_hugging_face_loads(tmp_path / "ours", model)


def test_their_bin_files_and_their_shards(tmp_path):
    model, _ = build("v2", "ForMaskedLM", {})
    model.save_pretrained(tmp_path / "sharded", max_shard_size="3KB")
    assert read_tensors(Source(tmp_path / "sharded"))[1] == "model.safetensors.index.json"
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    expected = expected_names(model, 2)
    for folder in (tmp_path / "sharded", tmp_path):
        tensors, _ = read_tensors(Source(folder))
        native, ignored = to_native(tensors, version=2, heads=HEADS, expected=expected, part="generator")
        assert native.keys() == expected and not ignored
        assert torch.equal(native[HEAD + "bias"], model.cls.predictions.bias)


def test_positions_that_they_do_not_add(tmp_path):
    """The enhanced mask decoder's positions are saved, and transformers ignores them."""
    positions = "deberta.embeddings.position_embeddings.weight"
    for name in ("v1-talking", "v2"):
        model, version = build(name, "ForMaskedLM", {})
        tensors, _ = to_native(
            model.state_dict(), version=version, heads=HEADS, expected=expected_names(model, version), part="generator"
        )
        tensors[positions] = torch.ones(16, 8)
        write_tensors(to_hf(tensors, version=version, heads=HEADS, legacy=True), tmp_path)
        model.config.save_pretrained(tmp_path)
        assert positions in load_file(tmp_path / "model.safetensors")
        assert_hugging_face_loads(tmp_path, model, unexpected=[positions])


@torch.no_grad()
def test_v1_projections_are_theirs():
    """Query, key and value of each head equal those that transformers' attention splits from in_proj."""
    model, _ = build("v1", "Model", {})
    native, _ = to_native(
        model.state_dict(), version=1, heads=HEADS, expected=expected_names(model, 1), part="discriminator"
    )
    attention, states = model.encoder.layer[1].attention.self, torch.randn(1, 5, 8)
    theirs = attention.transpose_for_scores(attention.in_proj(states)).chunk(3, dim=-1)
    for kind, their in zip(("query", "key", "value"), theirs):
        ours = states @ native[f"encoder.layer.1.attention.self.{kind}_proj.weight"].T
        torch.testing.assert_close(ours.view(1, 5, HEADS, -1).transpose(1, 2), their)
    for bias, kind in (("q_bias", "query"), ("v_bias", "value")):
        assert torch.equal(getattr(attention, bias), native[f"encoder.layer.1.attention.self.{kind}_proj.bias"])


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_shards_are_found_by_transformers(tmp_path, size):
    """transformers loads our shards, although every save gives them new names."""
    model = native_models.build("v3")
    for _ in range(2):
        model.save_pretrained(tmp_path, max_shard_size=size)
        found = transformers.AutoModel.from_pretrained(tmp_path)
        ids = torch.arange(1, 9)[None]
        torch.testing.assert_close(found(ids)[0], model(ids)[0], atol=1e-5, rtol=1e-5)
    found.save_pretrained(tmp_path, max_shard_size=size)  # leaves no file of our save
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(ids)[0], model(ids)[0], atol=1e-5, rtol=1e-5)
    files = {x.name for x in tmp_path.iterdir() if x.suffix == ".safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"].values() if index.exists() else ["model.safetensors"]
    assert files == set(listed) and (size == "1GB") != index.exists()
