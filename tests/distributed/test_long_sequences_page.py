"""The snippets of docs/long_sequences.md run, on two processes."""

import re
from pathlib import Path

import pytest
import torch
from training import build

PAGE = (Path(__file__).parents[2] / "docs" / "long_sequences.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(code):
    ids = torch.randint(1, 70, (2, 32), generator=torch.Generator().manual_seed(0))
    names = {"torch": torch, "input_ids": ids, "labels": ids[:, 0] % 2, "model": build("native")}
    exec(code, names | {"patched": build("patched")})


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
@pytest.mark.filterwarnings("ignore")
def test_snippet_runs(number, processes):
    processes.run(run, SNIPPETS[number])


def test_snippets_are_found():
    assert len(SNIPPETS) >= 6 and any("context_parallel(" in code for code in SNIPPETS)
