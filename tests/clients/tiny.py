"""Folders of small random DeBERTas with real tokenizers, and the comparison of results."""

import functools
import tempfile
from pathlib import Path

import hf_models
import pytest
import torch
import transformers
from tokenizer_files import byte_level_folder, spm_folder

# For float32 sums of the same terms in another order, forward and backward through two layers; see assert_close.
TOLERANCE = 1e-5
# For results after training steps. Trainers get SGD: Adam scales up gradients that are zero except for rounding.
TRAINED = 1e-4

NAMES = ["v1", "v2", "v3"]
names = pytest.mark.parametrize("name", NAMES)
OPTIONS = {"padded": {}, "unpad": {"unpad": True}, "constant": {"unpad": True, "constant_weights": True}}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
# Every model and all options, but not all combinations.
MODELS_AND_OPTIONS = ["v1-padded", "v1-constant", "v2-unpad", "v3-padded", "v3-unpad", "v3-constant"]
models = pytest.mark.parametrize(
    "name, options", [(x[:2], OPTIONS[x[3:]]) for x in MODELS_AND_OPTIONS], ids=MODELS_AND_OPTIONS
)

TEXTS = [
    "A sequence type is a list.",
    "Ann went from London to the class with two strings, and imported a module there before the statement ended.",
    "Strings!",
    "The operation with the same object raises an exception, as Bob said in Rome.",
]


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="clients-")


@functools.cache
def tokenizer(name: str = "v3"):
    """A tokenizer of transformers: byte-level BPE for v1, sentencepiece for v2 and v3."""
    kind = transformers.DebertaTokenizerFast if name == "v1" else transformers.DebertaV2TokenizerFast
    return kind.from_pretrained(byte_level_folder() if name == "v1" else spm_folder(), model_max_length=128)


@functools.cache
def folder(name: str = "v3", head: str = "Model", **changes) -> str:
    """A checkpoint as Hugging Face saves it, with its tokenizer. ``changes`` are settings of the configuration."""
    path = Path(_temporary().name) / f"{name}-{head}-{len(list(Path(_temporary().name).iterdir()))}"
    with torch.random.fork_rng():  # only the first call draws, so it must not change what the test draws
        model = hf_models.build(name, head, vocab_size=len(tokenizer(name)), pad_token_id=0, **changes)
    model.save_pretrained(path)
    tokenizer(name).save_pretrained(path)
    return str(path)


def batch(name: str = "v3", side: str = "right", **changes) -> dict:
    """TEXTS as tensors, with padding on one side."""
    encoded = tokenizer(name)(TEXTS, padding=True, padding_side=side, return_tensors="pt")
    return {**encoded, **changes}


def gradients(model: torch.nn.Module) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weights(model: torch.nn.Module) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(got, expected, tolerance: float = TOLERANCE) -> None:
    """Compares tensors and numbers in dicts, lists and tuples; anything else must be equal.

    Errors are relative to a tensor's largest value, or to a twentieth of the largest value in its dict or list if that
    is more: some gradients are zero except for rounding.
    """
    _assert_close(got, expected, tolerance, 0.0, "")


def _assert_close(got, expected, tolerance, scale, where):
    if isinstance(expected, torch.Tensor | float):
        atol = tolerance * max(_largest(expected), scale / 20)
        message = lambda text: f"{where}: {text}"
        torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), rtol=0, atol=atol, msg=message)
    elif isinstance(expected, list | tuple) or hasattr(expected, "keys"):
        got, expected = [dict(x) if hasattr(x, "keys") else dict(enumerate(x)) for x in (got, expected)]
        assert list(got) == list(expected), where
        scale = max([_largest(x) for x in expected.values() if isinstance(x, torch.Tensor | float)], default=0.0)
        for key in expected:
            _assert_close(got[key], expected[key], tolerance, scale, f"{where}.{key}")
    else:
        assert got == expected, where


def _largest(x) -> float:
    x = torch.as_tensor(x)
    return float(x.abs().max()) if x.numel() else 0.0
