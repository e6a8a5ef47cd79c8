"""Every command and snippet of docs/pretraining.md, in order, at toy size."""

import json
import re
import shlex
import shutil
from pathlib import Path

import torch
from pretraining_run import MODEL, texts

from deberta_fast import DebertaV2Config
from deberta_fast.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "pretraining.md"
TOY = [f"model={json.dumps(MODEL)}", "data.length=64", "training.batch_tokens=256", "training.micro_batch_tokens=256"]
TOY += ["training.steps=4", "training.warmup_steps=1", "training.device=cpu", "rtd.generator_layers=1"]


def blocks():
    return re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    documents = [json.loads(line)["text"] for line in texts(tmp_path).read_text().splitlines()]
    Path("texts/a.txt").write_text("\n\n".join(documents))
    Path("held-out.txt").write_text("\n\n".join(documents[:9]))
    Path("continue.yaml").write_text("objective: rtd\n")
    namespace = {}
    for language, block in blocks():
        if language == "python":
            run_snippet(block, namespace)
            continue
        for line in block.strip().splitlines():
            program, *arguments = shlex.split(line)[2:]
            assert program == "deberta_fast"
            assert main(toy(arguments)) == 0, line + "\n" + capsys.readouterr().err
    assert Path("exported/discriminator/model.safetensors").is_file() and Path("joined/pytorch_model.bin").is_file()
    for run in ("run", "mlm", "continued"):
        assert Path(run, "losses.png").is_file() and Path(run, "checkpoints/step-00000004").is_dir()
    shutil.rmtree("run")


def toy(arguments):
    if arguments[0] == "train-tokenizer":
        return [x if x != "128000" else "300" for x in arguments]
    if arguments[0] == "tokenize":
        return [x if x != "8" else "1" for x in arguments]
    if arguments[0] == "pretrain":
        return [*arguments, *(x for x in TOY if not (x.startswith("model=") and "continue.yaml" in arguments))]
    return arguments


def run_snippet(block, namespace):
    if "sift" in block:
        namespace["batch"] = dict(input_ids=torch.tensor([[1, 7, 8, 2], [1, 9, 7, 2]]), labels=torch.tensor([0, 1]))
    exec(compile(block, "docs/pretraining.md", "exec"), namespace)
    if "num_labels" in block:
        assert isinstance(namespace["model"].config, DebertaV2Config) and namespace["model"].config.hidden_size == 32
