"""The README's snippets run, and its files are there."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs(code):
    pytest.importorskip("transformers")
    from transformers import DebertaV2Config, DebertaV2Model

    config = DebertaV2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, relative_attention=True
    )
    torch.manual_seed(0)
    exec(code, {"model": DebertaV2Model(config)})


def test_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 180
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
