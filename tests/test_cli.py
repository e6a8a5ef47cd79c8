"""``python -m deberta_fast``: lines of JSON in, lines of JSON out."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from native_models import build
from tokenizer_files import sentences, spm_folder

import deberta_fast
from deberta_fast.cli import main
from deberta_fast.pipelines import pipeline
from deberta_fast.tokenization import DebertaV2TokenizerFast

TEXTS = [*sentences()[:30], "Zażółć ﬁ 日本語 \u2028"]
HEADS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@pytest.fixture(scope="module")
def folders():
    """Folders of models, by head."""
    with tempfile.TemporaryDirectory(prefix="command-line-") as folder:
        for head in HEADS:
            labels = {"id2label": {0: "contradiction", 1: "entailment"}} if "Sequence" in head else {}
            build("v3", head, vocab_size=1100, **labels).save_pretrained(f"{folder}/{head}")
            DebertaV2TokenizerFast.from_pretrained(spm_folder()).save_pretrained(f"{folder}/{head}")
        yield Path(folder)


def lines(items):
    return "".join(json.dumps(item) + "\n" for item in items)


CASES = [
    ("fill-mask", "ForMaskedLM", [f"[MASK] {x}" for x in TEXTS], ["--top-k", "2"], {"top_k": 2}),
    ("fill-mask", "ForMaskedLM", ["a [MASK]"], ["--targets", "▁with,▁class"], {"targets": ["▁with", "▁class"]}),
    ("text-classification", "ForSequenceClassification", TEXTS, [], {}),
    (
        "sentiment-analysis",
        "ForSequenceClassification",
        [{"text": a, "text_pair": b} for a, b in zip(TEXTS, TEXTS[1:])],
        ["--top-k", "all", "--function-to-apply", "sigmoid", "--truncation", "--max-length", "9", "--batch-size", "3"],
        {"top_k": None, "function_to_apply": "sigmoid", "truncation": True, "max_length": 9},
    ),
    (
        "zero-shot-classification",
        "ForSequenceClassification",
        [{"text": x} for x in TEXTS],
        ["--candidate-labels", "strings, classes", "--multi-label", "--hypothesis-template", "It is {}"],
        {"candidate_labels": ["strings", "classes"], "multi_label": True, "hypothesis_template": "It is {}"},
    ),
    (
        "token-classification",
        "ForTokenClassification",
        TEXTS,
        ["--aggregation-strategy", "simple", "--ignore-labels", "LABEL_0"],
        {"aggregation_strategy": "simple", "ignore_labels": ["LABEL_0"]},
    ),
    (
        "question-answering",
        "ForQuestionAnswering",
        [{"question": "What?", "context": x} for x in TEXTS],
        ["--max-seq-len", "40", "--doc-stride", "8", "--no-align-to-words", "--handle-impossible-answer"],
        {"max_seq_len": 40, "doc_stride": 8, "align_to_words": False, "handle_impossible_answer": True},
    ),
]


@pytest.mark.parametrize("task, head, items, arguments, options", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_results(task, head, items, arguments, options, folders, tmp_path):
    """The results are those of the pipeline, one per line."""
    (tmp_path / "in").write_text(lines(items), "utf-8")
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(["run", "--task", task, "--model", str(folders / head), *files, *arguments]) == 0
    expected = list(pipeline(task, folders / head)(iter(items), **options))
    got = (tmp_path / "out").read_bytes().decode().removesuffix("\n").split("\n")
    assert len(got) == len(items)
    for own, result in zip(map(json.loads, got), expected):
        assert same(own, result)
    assert "\\u" not in "".join(got)


def same(a, b):
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[x], b[x]) for x in a)
    return all(map(same, a, b)) if isinstance(a, list) else a == pytest.approx(b, abs=1e-6)


BAD = [
    ("nope", "line 3: expected JSON, a string in quotes or an object: Expecting value in column 1"),
    ("", "line 3: expected JSON, a string in quotes or an object: it is empty"),
    ("[1, 2]", "line 3: expected a JSON string or object, got [1, 2]"),
    ('{"txt": "a"}', "line 3: expected an object with text and text_pair, got one with 'txt'"),
    ('{"text": 3}', "line 3: text must be a string, got int"),
    ('"\\ud800"', "line 3: 'utf-8' codec can't encode"),
    ("[" * 100_000, "line 3: expected JSON, a string in quotes or an object: it is nested too deeply"),
]


@pytest.mark.parametrize("bad, message", BAD)
def test_bad_lines(bad, message, folders, tmp_path, capsys):
    """Lines before a bad one are answered, and the error names the bad line."""
    (tmp_path / "in").write_text(f'"a"\n"b"\n{bad}\n"c"\nnope\n')
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    model = str(folders / "ForSequenceClassification")
    assert main(["run", "--task", "text-classification", "--model", model, *files]) == 1
    assert capsys.readouterr().err.startswith(f"python -m deberta_fast: {message}")
    assert len((tmp_path / "out").read_text().splitlines()) == 2


def test_first_of_bad_lines(folders, tmp_path, capsys):
    """The error names the first bad line, even if a later one is found earlier."""
    items = ["[MASK]"] * 50
    items[30], items[40] = "none", {"txt": "a"}
    (tmp_path / "in").write_text(lines(items))
    files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert main(["run", "--task", "fill-mask", "--model", str(folders / "ForMaskedLM"), *files]) == 1
    assert "line 31: it has no mask token" in capsys.readouterr().err
    assert len((tmp_path / "out").read_text().splitlines()) == 30


def test_no_utf8(folders, tmp_path, capsys):
    (tmp_path / "in").write_bytes(b'"\xff"\n')
    model = str(folders / "ForSequenceClassification")
    assert main(["run", "--task", "text-classification", "--model", model, "--input", str(tmp_path / "in")]) == 1
    assert "line 1: expected UTF-8" in capsys.readouterr().err


def test_scores_that_are_no_numbers(folders, tmp_path, capsys):
    model = build("v3", "ForSequenceClassification", vocab_size=1100)
    model.classifier.bias.data.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    (tmp_path / "in").write_text('"a"\n')
    arguments = ["--model", str(tmp_path), "--tokenizer", str(folders / "ForMaskedLM"), "--input", str(tmp_path / "in")]
    assert main(["run", "--task", "text-classification", *arguments]) == 1
    assert "line 1: a score is infinite or no number" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--task", "text-classification", "--stride", "3"], 2, "text-classification has no stride; its options are"),
        (["--task", "zero-shot-classification"], 2, "needs --candidate-labels"),
        (["--task", "ner", "--aggregation-strategy", "best"], 2, "must be one of none, simple"),
        (["--task", "ner", "--input", "absent.jsonl"], 1, "No such file or directory: 'absent.jsonl'"),
        (["--task", "ner", "--device", "nowhere"], 1, "nowhere"),
        (["--task", "ner", "--batch-size", "0"], 1, "batch_size must be a number from 1 on, got 0"),
        (["--task", "ner", "--device", "cuda:99"], 1, "torch cannot use device 'cuda:99': "),
        (["--task", "ner", "--device", "xpu"], 1, "torch cannot use device 'xpu': "),
    ],
)
def test_misuse(arguments, status, message, folders, capsys):
    assert main(["run", "--model", str(folders / "ForTokenClassification"), *arguments]) == status
    assert message in capsys.readouterr().err


def test_parser(capsys):
    for arguments, status, message in [
        (["--version"], 0, f"deberta_fast {deberta_fast.__version__}"),
        (["--help"], 0, "answer lines of JSON with a model"),
        (["run", "--help"], 0, "--aggregation-strategy NAME"),
        ([], 2, "COMMAND"),
        (["run", "--task", "summarization", "--model", "x"], 2, "invalid choice: 'summarization'"),
    ]:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == status
        printed = capsys.readouterr()
        assert message in printed.out + printed.err


@contextlib.contextmanager
def process(folders):
    """A process that runs the command line; it is killed if it hangs."""
    command = [sys.executable, "-W", "ignore", "-m", "deberta_fast", "run", "--task", "fill-mask"]
    command += ["--model", str(folders / "ForMaskedLM"), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(Path(deberta_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, env=environment, text=True, encoding="utf-8", **pipes) as run:
        timer = threading.Timer(90, run.kill)
        timer.start()
        try:
            yield run
        finally:
            timer.cancel()
            run.kill()


def test_streams(folders):
    """Answers come while the input is open. An error ends the process. Without a terminal, there is no progress bar."""
    with process(folders) as run:
        for text in ("one [MASK]", "two [MASK]"):
            run.stdin.write(json.dumps(text) + "\n")
            run.stdin.flush()
            assert json.loads(run.stdout.readline())[0]["sequence"].startswith(text[:3])
        run.stdin.write('"three"\n')
        run.stdin.flush()
        assert run.wait(timeout=60) == 1
        assert run.stderr.read() == "python -m deberta_fast: line 3: it has no mask token ([MASK])\n"


def test_reader_that_stops(folders):
    """The reader closes the pipe after one line, as ``head`` does."""
    with process(folders) as run:
        run.stdin.write('"one [MASK]"\n')
        run.stdin.flush()
        run.stdout.readline()
        run.stdout.close()
        for _ in range(100):
            try:
                run.stdin.write('"more [MASK]"\n')
                run.stdin.flush()
            except BrokenPipeError:
                break
            time.sleep(0.1)
        assert run.wait(timeout=60) == 141
        assert run.stderr.read() == ""
        run.stdin = None


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_torch_was_built_without(device, folders, capsys, monkeypatch):
    def empty(*size, device):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "empty", empty)
    for command in (["run", "--task", "ner", "--model", str(folders / "ForTokenClassification")], ["check"]):
        assert main([*command, "--device", device]) == 1
        message = f"python -m deberta_fast: torch cannot use device '{device}': Torch not compiled with CUDA enabled\n"
        assert capsys.readouterr().err == message


@pytest.mark.parametrize("other", ["in", "link", "hard", "sub/../in", "relative"])
def test_output_is_not_the_input(other, folders, tmp_path, capsys, monkeypatch):
    text = '"a [MASK]"\n'
    (tmp_path / "in").write_text(text)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    os.link(tmp_path / "in", tmp_path / "hard")
    monkeypatch.chdir(tmp_path / "sub")
    name = "../in" if other == "relative" else str(tmp_path / other)
    files = ["--input", str(tmp_path / "in"), "--output", name]
    assert main(["run", "--task", "fill-mask", "--model", str(folders / "ForMaskedLM"), *files]) == 2
    assert "input and output are the same file, which" in capsys.readouterr().err
    assert (tmp_path / "in").read_text() == text
    with open(tmp_path / "in") as standard_input:
        command = [sys.executable, "-m", "deberta_fast", "run", "--task", "fill-mask", "--output", name]
        command += ["--model", str(folders / "ForMaskedLM")]
        environment = os.environ | {"PYTHONPATH": str(Path(deberta_fast.__file__).parents[1])}
        if other == "in":
            run = subprocess.run(command, stdin=standard_input, env=environment, capture_output=True, text=True)
            assert run.returncode == 2 and "are the same file" in run.stderr
    assert (tmp_path / "in").read_text() == text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("torch_parallel_for(begin, end) API call failed at ops.h, line 579"),
    ],
    ids=["python", "gpu", "cpu", "loop"],
)
def test_no_memory(error, folders, tmp_path, capsys, monkeypatch):
    def forward(*arguments, **options):
        raise error

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    (tmp_path / "in").write_text('"a [MASK]"\n')
    files = ["--model", str(folders / "ForMaskedLM"), "--input", str(tmp_path / "in"), "--device", "cpu"]
    assert main(["run", "--task", "fill-mask", *files]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("python -m deberta_fast: out of memory; a smaller --batch-size")
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("module", ["torch", "deberta_fast/cli.py"])
def test_interrupted_while_it_imports(module, tmp_path):
    """The signal arrives during the import of a module."""
    if module == "torch":
        (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
        command = ["-m", "deberta_fast", "--version"]
    else:
        hook = "import importlib.abc, os, signal, sys\n"
        hook += "class Finder(importlib.abc.MetaPathFinder):\n    def find_spec(self, name, path, target=None):\n"
        hook += "        if name == 'deberta_fast.cli':\n            os.kill(os.getpid(), signal.SIGINT)\n"
        hook += "sys.meta_path.insert(0, Finder())\n"
        (tmp_path / "sitecustomize.py").write_text(hook)
        command = ["-W", "ignore", "-m", "deberta_fast", "--version"]
    path = f"{tmp_path}{os.pathsep}{Path(deberta_fast.__file__).parents[1]}"
    run = subprocess.run(
        [sys.executable, *command], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")


def test_interrupted_while_it_works(folders):
    with process(folders) as run:
        run.stdin.write('"one [MASK]"\n')
        run.stdin.flush()
        run.stdout.readline()
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=60) == 130
        assert run.stderr.read() == ""


def test_other_programs_keep_their_ctrl_c():
    code = "import signal, deberta_fast; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    environment = os.environ | {"PYTHONPATH": str(Path(deberta_fast.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
