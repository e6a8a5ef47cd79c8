"""Arguments and attributes of models and configurations that Hugging Face has under the same names."""

import json

import pytest
import torch
from native_models import EMD, build, inputs_of, names, settings

import deberta_fast
from deberta_fast import DebertaV2Config, DebertaV2ForMaskedLM, DebertaV2Model
from deberta_fast.checkpoint import write_tensors

IDS = torch.tensor([[5, 7, 9, 11], [6, 8, 10, 3]])


@pytest.fixture
def folder(tmp_path):
    build("v3").save_pretrained(tmp_path)
    return tmp_path


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in mine.items())


MEANINGLESS = dict(low_cpu_mem_usage=True, weights_only=True, trust_remote_code=True, force_download=True)
DEVICES = ["cpu", torch.device("cpu"), "auto", {"": "cpu"}, None]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_one_device(folder, device, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    model = DebertaV2Model.from_pretrained(folder, device_map=device, **MEANINGLESS)
    assert same(model, build("v3")) and model.device.type == "cpu" and not hasattr(model, "hf_device_map")


def test_the_accelerator_that_there_is(folder, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    assert DebertaV2Model.from_pretrained(folder, device_map="auto").device.type == "meta"


@names
def test_several_devices(name, tmp_path):
    pytest.importorskip("accelerate")
    model, inputs = build(name, "ForSequenceClassification"), inputs_of("ForSequenceClassification", labels=True)
    model.save_pretrained(tmp_path)
    places = {
        "deberta.embeddings": "cpu",
        "deberta.encoder": "cpu",
        "pooler": "cpu",
        "dropout": "cpu",
        "classifier": "cpu",
    }
    spread = type(model).from_pretrained(tmp_path, device_map=places)
    assert spread.hf_device_map == places and same(spread, model)
    got, expected = spread(**inputs), model(**inputs)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)


@pytest.mark.parametrize("kind", ["torch_dtype", "dtype"])
def test_dtypes(folder, kind, tmp_path):
    for given, expected in (("auto", torch.float32), (torch.bfloat16, torch.bfloat16), ("float16", torch.float16)):
        assert DebertaV2Model.from_pretrained(folder, **{kind: given}).dtype == expected
    build("v3").half().save_pretrained(tmp_path / "half")
    assert DebertaV2Model.from_pretrained(tmp_path / "half").dtype == torch.float32
    assert DebertaV2Model.from_pretrained(tmp_path / "half", **{kind: "auto"}).dtype == torch.float16
    assert DebertaV2Model.from_pretrained(folder, torch_dtype="float16", dtype=torch.float16).dtype == torch.float16


def test_subfolder(folder):
    build("v3", initializer_range=0.5).bfloat16().save_pretrained(folder / "one" / "two")
    model = DebertaV2Model.from_pretrained(folder, subfolder="one/two", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert DebertaV2Config.from_pretrained(folder, subfolder="one/two") == model.config


def test_files_by_kind_and_variant(folder):
    model = build("v3")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    torch.save({name: x * 2 for name, x in model.state_dict().items()}, folder / "pytorch_model.bin")
    twice = DebertaV2Model.from_pretrained(folder)
    assert not same(twice, model) and same(DebertaV2Model.from_pretrained(folder, use_safetensors=False), twice)
    assert same(DebertaV2Model.from_pretrained(folder, variant="fp16"), model)
    assert same(DebertaV2Model.from_pretrained(folder, variant="fp16", use_safetensors=True), model)
    with pytest.raises(FileNotFoundError, match="looked for model.safetensors, model.safetensors.index.json; there"):
        DebertaV2Model.from_pretrained(folder, use_safetensors=True)
    with pytest.raises(FileNotFoundError, match="pytorch_model.fp16.bin, pytorch_model.bin.fp16.index.json"):
        DebertaV2Model.from_pretrained(folder, variant="fp16", use_safetensors=False)


def test_shards_of_a_variant(folder, tmp_path):
    """The shards have the names that Hugging Face's save_pretrained(variant="fp16") gives them."""
    model, place = build("v3"), tmp_path / "shards"
    write_tensors(model.state_dict(), place, max_shard_bytes=9000, config=model.config.to_json_string())
    index = json.loads((place / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        (place / shard).rename(place / shard.replace("model", "model.fp16", 1))
    index["weight_map"] = {x: shard.replace("model", "model.fp16", 1) for x, shard in index["weight_map"].items()}
    (place / "model.safetensors.index.json").unlink()
    (place / "model.safetensors.fp16.index.json").write_text(json.dumps(index))
    assert same(DebertaV2Model.from_pretrained(place, variant="fp16"), model)


def test_backends(folder):
    for name in ("eager", "reference", "cpu"):
        for model in (
            DebertaV2Model.from_pretrained(folder, attn_implementation=name),
            DebertaV2Model._from_config(build("v3").config, attn_implementation=name),
        ):
            assert {layer.attention.self.backend for layer in model.encoder.layer} == {name}
    model = DebertaV2Model._from_config(build("v3").config, torch_dtype="bfloat16")
    assert model.dtype == torch.bfloat16


REFUSED = {
    "map": (dict(device_map="balanced"), ValueError, "device_map must be .* got 'balanced'"),
    "map-of-nothing": (dict(device_map=3.5), ValueError, "device_map must be .* got 3.5"),
    "two-devices": (dict(device_map="cpu", device="cpu"), ValueError, "device_map says where .* and so does device"),
    "two-dtypes": (dict(torch_dtype="float16", dtype="bfloat16"), ValueError, "torch_dtype is dtype by its older name"),
    "implementation": (dict(attn_implementation="sdpa"), ValueError, "attn_implementation .* one of .*eager.* 'sdpa'"),
    "files": (
        dict(weights="model.safetensors", variant="fp16"),
        ValueError,
        "weights='model.saf.*' names a file",
    ),
    "unknown": (
        dict(hidden_sise=3, quantisation=None),
        TypeError,
        "has no hidden_sise, quantisation; from_pretrained takes .* device_map, .* subfolder",
    ),
    "subfolder": (dict(subfolder="nowhere"), FileNotFoundError, "no subfolder 'nowhere'"),
}


@pytest.mark.parametrize("arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_refused(folder, arguments, error, message):
    with pytest.raises(error, match=message):
        DebertaV2Model.from_pretrained(folder, **arguments)


def test_configurations_of_another_library(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DebertaV2Config(**settings("v3"))
    words = "takes a deberta_fast.DebertaV2Config, got transformers.DebertaV2Config; deberta_fast.*from_dict"
    with pytest.raises(TypeError, match=words):
        DebertaV2Model(theirs)
    with pytest.raises(TypeError, match=words):
        DebertaV2Model.from_pretrained(folder, config=theirs)
    with pytest.raises(TypeError, match="got transformers.BertConfig$"):
        DebertaV2Model(transformers.BertConfig())
    made = DebertaV2Config.from_dict(theirs.to_dict())
    assert made.to_dict().items() >= DebertaV2Config(**settings("v3")).to_dict().items()
    DebertaV2Model(made)


def test_saving(tmp_path):
    model = build("v3")
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    model.save_pretrained(tmp_path / "yes", safe_serialization=True, save_function=torch.save, push_to_hub=False)
    assert same(DebertaV2Model.from_pretrained(tmp_path / "yes"), model)
    for arguments, message in (
        (dict(safe_serialization=False), "must be True"),
        (dict(push_to_hub=True), "upload_fol"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "refused", **arguments)
    assert not (tmp_path / "refused").exists()


def test_new_rows_are_drawn_or_the_mean():
    torch.manual_seed(0)
    for tied in (True, False):
        model = build("v3", "ForMaskedLM", tie_word_embeddings=tied, initializer_range=0.5)
        old = model.get_input_embeddings().weight.clone()
        model.resize_token_embeddings(400, mean_resizing=False)
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            assert 0.45 < module.weight[70:].std() < 0.55 and module.weight[70:].mean().abs() < 0.05
        model.resize_token_embeddings(70, mean_resizing=False)
        assert torch.equal(model.get_input_embeddings().weight, old)
        model.resize_token_embeddings(72, mean_resizing=True)
        torch.testing.assert_close(model.get_input_embeddings().weight[71], old.mean(0))
        assert model(**inputs_of("ForMaskedLM")).logits.shape[-1] == 72


def test_what_configurations_have(folder):
    config = DebertaV2Config.from_pretrained(folder)
    assert config.name_or_path == config._name_or_path == str(folder)
    assert config.to_dict() == {**build("v3").config.to_dict(), "architectures": ["DebertaV2Model"]}
    assert config.get_text_config() is config.get_text_config(decoder=True) is config
    assert "_name_or_path" not in config.to_dict() and "name_or_path" not in config.to_dict()
    config.update({"hidden_act": "relu", "num_labels": 5, "fancy": [1], "model_type": "deberta-v2"})
    assert (config.hidden_act, config.num_labels, config.fancy, config.name_or_path) == ("relu", 5, [1], str(folder))
    before = config.to_dict()
    for bad in ({"hidden_act": "golu", "fancy": 2}, {"hidden_size": 33}, {"model_type": "deberta"}):
        with pytest.raises(ValueError):
            config.update(bad)
    assert config.to_dict() == before
    assert DebertaV2Config().to_diff_dict() == {"model_type": "deberta-v2"}
    assert DebertaV2Config(hidden_act="tanh").to_diff_dict() == {"model_type": "deberta-v2", "hidden_act": "tanh"}
    for name in ("_name_or_path", "name_or_path"):
        assert DebertaV2Config.from_dict({name: "a/b"}).name_or_path == "a/b"


def test_what_models_have(folder):
    model = DebertaV2Model.from_pretrained(folder)
    assert model.name_or_path == str(folder) and build("v3").name_or_path == ""
    parameters = sum(x.numel() for x in model.parameters())
    assert model.get_memory_footprint() == 4 * parameters
    assert model.half().get_memory_footprint(return_buffers=False) == 2 * parameters
    with pytest.raises(TypeError, match="peft.get_peft_model"):
        model.add_adapter(object())
    with pytest.raises(ValueError, match="huggingface_hub.upload_folder"):
        model.push_to_hub("a/b")
    assert DebertaV2ForMaskedLM(DebertaV2Config(**settings("v3"), **EMD)).config.name_or_path == ""
    assert deberta_fast.DebertaV2Model is DebertaV2Model
