"""The examples with long texts as their users run them, at toy sizes: the loss falls, and what they save loads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deberta_fast

pytest.importorskip("sentencepiece")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DOCUMENTS, LANGUAGE = "long_documents.py", "continue_masked_language.py"


def run(example: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(EXAMPLES / example), "--toy", "--device", "cpu", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def numbers(result: subprocess.CompletedProcess, pattern: str) -> list[tuple[float, ...]]:
    assert result.returncode == 0, result.stderr[-4000:]
    return [tuple(map(float, found)) for found in re.findall(pattern, result.stdout)]


LOSSES = r"loss ([\d.]+) at first, ([\d.]+) at last; ([\d.]+) of \d+ documents right"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    return folder, run(DOCUMENTS, "--out", str(folder))


def test_a_classifier_learns_packages(classifier):
    ((first, last, right),) = numbers(classifier[1], LOSSES)
    assert 1.6 < first < 2.0 and last < first - 0.2  # six packages: log 6 = 1.79
    assert right > 1 / 6


def test_the_classifier_can_be_loaded(classifier):
    folder, result = classifier
    assert result.returncode == 0
    tokenizer = deberta_fast.DebertaV2Tokenizer.from_pretrained(folder)
    model = deberta_fast.DebertaV2ForSequenceClassification.from_pretrained(folder)
    logits = model(**tokenizer("import asyncio", return_tensors="pt")).logits
    assert logits.shape == (1, 6) and torch.isfinite(logits).all()


def test_a_checkpoint_of_its_own_is_trained_on(classifier, tmp_path):
    """From the classifier that was learned, so its loss begins where that ended."""
    ((_, last, _),) = numbers(classifier[1], LOSSES)
    again = run(DOCUMENTS, "--checkpoint", str(classifier[0]), "--steps", "10", "--out", str(tmp_path))
    ((first, _, _),) = numbers(again, LOSSES)
    assert first < last + 0.2


@pytest.mark.parametrize("share", ["batches", "documents"])
def test_two_processes(share, tmp_path):
    result = run(DOCUMENTS, "--share", share, "--steps", "12", "--out", str(tmp_path), processes=2)
    ((first, last, _),) = numbers(result, LOSSES)
    assert last < first < 2.0
    assert result.stdout.count("saved: ") == 1
    deberta_fast.DebertaV2ForSequenceClassification.from_pretrained(tmp_path)


def test_masked_language_continues_at_length(tmp_path):
    """The short checkpoint and the longer one differ in weights, and in nothing else."""
    result = run(LANGUAGE, "--out", str(tmp_path))
    found = numbers(result, r"held-out loss at (\d+) tokens: ([\d.]+) before, ([\d.]+) after")
    assert [length for length, *_ in found] == [64, 512]
    assert all(after < before - 0.05 for _, before, after in found)
    short, long = (deberta_fast.DebertaV2ForMaskedLM.from_pretrained(x) for x in (tmp_path / "short", tmp_path))
    configs = [model.config.to_dict() for model in (short, long)]
    assert configs[0] == configs[1]
    assert {n: p.shape for n, p in short.named_parameters()} == {n: p.shape for n, p in long.named_parameters()}
    tokenizer = deberta_fast.DebertaV2Tokenizer.from_pretrained(tmp_path)
    ids = tokenizer("def main(): " * 200, return_tensors="pt")
    assert ids["input_ids"].shape[1] > 512 and torch.isfinite(long(**ids).logits).all()


def test_masks(monkeypatch):
    """15 % of the tokens, never [CLS] and [SEP]; of these 80 % become [MASK], 10 % another word, 10 % stay."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import continue_masked_language as example

    class Tokenizer:
        cls_token_id, sep_token_id, mask_token_id = 1, 2, 4
        __len__ = lambda self: 1000

    ids = torch.randint(5, 1000, (1, 100_000))
    ids[:, 0], ids[:, -1], ids[:, 500] = 1, 2, 2
    given, chosen = example.masked(ids, Tokenizer(), torch.Generator().manual_seed(0))
    assert torch.equal(given[~chosen], ids[~chosen]) and not chosen[ids < 5].any()
    share = lambda x: x.float().mean().item()
    assert share(chosen) == pytest.approx(0.15, abs=0.005)
    assert share(given[chosen] == 4) == pytest.approx(0.8, abs=0.02)
    assert share(given[chosen] == ids[chosen]) == pytest.approx(0.1, abs=0.02)
    assert given[chosen].min() >= 4 and given.max() < 1000


@pytest.mark.parametrize("example", [DOCUMENTS, LANGUAGE])
def test_errors_are_one_line(example, tmp_path):
    missing = run(example, "--checkpoint", str(tmp_path / "nothing"), "--out", str(tmp_path))
    assert missing.returncode == 1
    assert f"--checkpoint {tmp_path / 'nothing'}: no DeBERTa v2 or v3" in missing.stderr.splitlines()[-1]
    short = run(example, "--length", "4")
    assert short.returncode == 2 and "--length must be at least" in short.stderr.splitlines()[-1]
