"""The words in which people ask Hugging Face's pipelines for a device, a dtype, a tokenizer."""

import inspect

import pytest
import torch
from native_models import build
from tokenizer_files import sentences, spm_folder

from deberta_fast import tokenization
from deberta_fast.pipelines import TASKS, pipeline

TEXTS = [text for text in sentences() if 20 < len(text) < 150][:5]


@pytest.fixture
def folder(tmp_path):
    parts()[0].save_pretrained(tmp_path)
    parts()[1].save_pretrained(tmp_path)
    return tmp_path


def parts():
    model = build("v3", "ForSequenceClassification", vocab_size=1100)
    return model, tokenization.DebertaV2TokenizerFast.from_pretrained(spm_folder(), model_max_length=512)


@pytest.fixture
def expected():
    return pipeline("text-classification", *parts())(TEXTS)


def close(got, expected, tolerance=1e-5):
    same = lambda x, y: x["label"] == y["label"] and abs(x["score"] - y["score"]) < tolerance
    return len(got) == len(expected) and all(map(same, got, expected))


MEANT = {
    "minus-one": dict(device=-1),
    "cpu": dict(device="cpu"),
    "device": dict(device=torch.device("cpu")),
    "map": dict(device_map="cpu"),
    "map-of-one": dict(device_map={"": "cpu"}),
    "dtype": dict(torch_dtype="float32"),
    "two-dtypes": dict(torch_dtype="float32", dtype=torch.float32),
    "framework": dict(framework="pt", trust_remote_code=True, use_fast=True, batch_size=2),
    "kwargs": dict(model_kwargs={"attn_implementation": "eager", "low_cpu_mem_usage": True}),
    "kwargs-device": dict(model_kwargs={"device_map": "cpu", "torch_dtype": torch.float32}),
}


@pytest.mark.parametrize("arguments", MEANT.values(), ids=MEANT)
def test_of_a_folder(arguments, folder, expected):
    run = pipeline("text-classification", folder, **arguments)
    assert run.model.device.type == "cpu" and run.model.dtype == torch.float32 and run.tokenizer.is_fast
    assert close(run(TEXTS), expected)


@pytest.mark.parametrize("arguments", [x for x in MEANT.values() if "model_kwargs" not in x], ids=str)
def test_of_a_loaded_model(arguments, expected):
    assert close(pipeline("text-classification", *parts(), **arguments)(TEXTS), expected)


def test_other_kinds(folder, expected):
    run = pipeline("text-classification", folder, use_fast=False, torch_dtype="bfloat16")
    assert type(run.tokenizer) is tokenization.DebertaV2Tokenizer and run.model.dtype == torch.bfloat16
    assert close(run(TEXTS), expected, 0.05)
    assert pipeline("text-classification", *parts(), torch_dtype="bfloat16").model.dtype == torch.bfloat16
    assert pipeline("text-classification", *parts(), dtype="auto").model.dtype == torch.float32
    run = pipeline("text-classification", folder, model_kwargs={"id2label": {0: "no", 1: "yes"}})
    assert {x["label"] for x in run(TEXTS[0], top_k=None)} == {"no", "yes"}
    run = pipeline("text-classification", folder, model_kwargs={"attn_implementation": "eager"})
    assert run.model.deberta.encoder.layer[0].attention.self.backend == "eager"


def test_of_a_subfolder(folder, tmp_path, expected):
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file():
            path.rename(tmp_path / "outer" / "inner" / path.name)
    for arguments in (dict(subfolder="inner"), dict(model_kwargs={"subfolder": "inner"})):
        assert close(pipeline("text-classification", tmp_path / "outer", **arguments)(TEXTS), expected)


def test_several_devices(folder, expected):
    pytest.importorskip("accelerate")
    places = {"deberta": "cpu", "pooler": "cpu", "dropout": "cpu", "classifier": "cpu"}
    for run in (
        pipeline("text-classification", folder, device_map=places),
        pipeline("text-classification", *parts(), device_map=places),
    ):
        assert run.model.hf_device_map == places and close(run(TEXTS), expected)


REFUSED = {
    "framework": (dict(framework="tf"), ValueError, "framework must be \"pt\", got 'tf'"),
    "unknown": (dict(nothing=1), TypeError, "has no nothing; its options are top_k, .*; pipeline takes .* device_map"),
    "device-twice": (dict(device=0, device_map="cpu"), ValueError, "device_map says where .* and so does device"),
    "twice": (dict(dtype="auto", model_kwargs={"dtype": "auto"}), ValueError, "dtype must be given once"),
    "of-the-model": (dict(model_kwargs={"nothing": 1}), TypeError, "has no nothing; from_pretrained takes"),
    "dtypes": (dict(dtype="float16", torch_dtype="bfloat16"), ValueError, "torch_dtype is dtype by its older name"),
}


@pytest.mark.parametrize("arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_refused(folder, arguments, error, message):
    with pytest.raises(error, match=message):
        pipeline("text-classification", folder, **arguments)
    with pytest.raises(ValueError, match="model_kwargs load a model, and it is loaded already"):
        pipeline("text-classification", *parts(), model_kwargs={"variant": "fp16"})


def test_features(tmp_path):
    model, tokenizer = build("v3", "Model", vocab_size=1100), parts()[1]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, run = pipeline("feature-extraction", tmp_path), pipeline("feature-extraction", model, tokenizer)
    texts = [*TEXTS, TEXTS[0] * 2]
    for text, lists, tensor in zip(texts, loaded(texts), run(texts, return_tensors=True), strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(tensor, alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(lists), alone, atol=1e-5, rtol=1e-5)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes and not tensor.requires_grad
    assert torch.equal(run(TEXTS[0], return_tensors=True), torch.tensor(run(TEXTS[0])))
    assert len(run(texts[-1], truncation=True, max_length=7)[0]) == 7
    with pytest.raises(TypeError, match="feature-extraction needs a DebertaModel or its V2"):
        pipeline("feature-extraction", *parts())
    assert "feature-extraction" in TASKS and "feature-extraction" in inspect.getdoc(pipeline)
