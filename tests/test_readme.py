"""The snippets of README and docs run, and the files that they link to exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_models import build
from tokenizer_files import spm_folder

import deberta_fast
from deberta_fast import DebertaV2TokenizerFast

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
SNIPPETS = {
    f"{page}-{number}": code
    for page, text in PAGES.items()
    # tests/clients runs these, where their packages are; tests/distributed, on two processes; tests/pretraining
    if page not in ("clients", "long_sequences", "pretraining")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The directory in which the snippets run; it contains the folder that they call "checkpoint"."""
    tokenizer = DebertaV2TokenizerFast.from_pretrained(spm_folder())
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    model = build("v3", "ForSequenceClassification", vocab_size=len(tokenizer), num_labels=3)
    model.save_pretrained(tmp_path / "checkpoint")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name, folder):
    transformers = pytest.importorskip("transformers")
    code = SNIPPETS[name]
    if "cuda" in code and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if "onnx" in code:
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    names = {
        "torch": torch,
        "deberta_fast": deberta_fast,
        "tokenizer": DebertaV2TokenizerFast.from_pretrained(folder / "checkpoint"),
        "patched": transformers.AutoModel.from_pretrained(folder / "checkpoint"),
        "model": transformers.AutoModel.from_pretrained(folder / "checkpoint"),
    }
    if name.startswith("recipes"):
        names["model"] = deberta_fast.DebertaV2ForSequenceClassification.from_pretrained(folder / "checkpoint")
        deberta_fast.patch(names["patched"])
    exec(code, names)
    if "answers" in names:
        assert [answer["label"] for answer in names["answers"]] and len(names["answers"]) == 2


def test_command_line_runs(folder):
    [command] = [x for x in re.findall(r"```sh\n(.*?)```", PAGES["recipes"], re.DOTALL) if "deberta_fast run" in x]
    command = command.replace("python -m", f"{sys.executable} -m")
    output = subprocess.run(
        command, shell=True, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert output.returncode == 0, output.stderr
    assert json.loads(output.stdout)["label"].startswith("LABEL_")


def test_is_short_and_links_lead_somewhere():
    assert len(PAGES["README"].splitlines()) <= 195
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / ("" if page == "README" else "docs") / link).exists(), link
