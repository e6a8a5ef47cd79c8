"""The snippets of docs/clients.md run as they stand, and its table names the versions that are installed."""

import importlib.metadata
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny import folder
from transformers import set_seed

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text()
SNIPPETS = dict(re.findall(r"## (\S[^\n]*)\n\n```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name, tmp_path, monkeypatch, fused_calls):
    for label_count, path in ((2, "checkpoint"), (1, "reranker")):
        shutil.copytree(folder("v3", "ForSequenceClassification", num_labels=label_count), tmp_path / path)
    monkeypatch.chdir(tmp_path)
    set_seed(0)
    names = {"__name__": "snippet"}
    exec(SNIPPETS[name], names)
    if name in ("PEFT", "torchao"):  # these snippets do not run the model
        names["model"](input_ids=torch.tensor([[1, 7, 8, 2]]))
    assert fused_calls


def test_table_of_versions():
    rows = re.findall(r"^\| ([a-z0-9-]+) \| ([0-9][^ ]*) \|", PAGE, re.MULTILINE)
    assert len(rows) == 11
    for name, version in rows:
        assert importlib.metadata.version(name) == version, name
    assert len(SNIPPETS) == 10
