"""The README's snippets run, and its files are there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_models import build
from tokenizer_files import spm_folder

from deberta_fast import DebertaV2TokenizerFast

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the folder is that the snippets call "checkpoint"."""
    tokenizer = DebertaV2TokenizerFast.from_pretrained(spm_folder())
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    model = build("v3", "ForSequenceClassification", vocab_size=len(tokenizer), num_labels=3)
    model.save_pretrained(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs(code, folder):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = {"model": transformers.AutoModel.from_pretrained(folder / "checkpoint")}
    exec(code, names)
    if "answers" in names:
        assert [answer["label"] for answer in names["answers"]] and len(names["answers"]) == 2


def test_command_line_runs(folder):
    [command] = [x for x in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "deberta_fast run" in x]
    command = command.replace("python -m", f"{sys.executable} -m")
    output = subprocess.run(
        command, shell=True, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert output.returncode == 0, output.stderr
    assert json.loads(output.stdout)["label"].startswith("LABEL_")


def test_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 195
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
