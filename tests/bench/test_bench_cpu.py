"""Runs the benchmarks for the CPU at small sizes, and checks what they write."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deberta_fast.op.backends import cpu

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
needs_extension = pytest.mark.skipif(cpu.NOT_LOADED is not None, reason=str(cpu.NOT_LOADED))


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"bench.{name}")


def written(folder, name):
    """Returns rows and provenance of the JSON file, and checks that the Markdown file has them too."""
    record = json.loads((folder / f"{name}.json").read_text())
    text = (folder / f"{name}.md").read_text()
    assert text.startswith(f"# {name}") and f"- torch: {torch.__version__}" in text
    assert {"command", "commit", "date", "cpu", "cores", "torch", "deberta_fast"} <= record["provenance"].keys()
    assert sum(line.startswith("|") for line in text.splitlines()) == len(record["rows"]) + 2
    return record["rows"], record["provenance"]


def test_encoder(bench, tmp_path, capsys):
    options = "--quick --levels encoder --lengths 24 --memory-length 0 --seconds 0 --out"
    bench("cpu").main([*options.split(), str(tmp_path)])
    rows, _ = written(tmp_path, "encoder")
    assert len(capsys.readouterr().out.splitlines()) == len(rows) and not (tmp_path / "memory.json").exists()
    passes = ("forward", "forward+backward")
    assert [(row["pass"], row["batch"], row["length"]) for row in rows] == [(p, 1, n) for p in passes for n in (16, 24)]
    ratios = ["eager/patched", "eager/native", "eager/plain"]
    columns = ["eager ms", "patched ms", "native ms", "plain ms", *ratios]
    assert list(rows[0]) == ["pass", "threads", "batch", "length", *columns]
    assert all(row[column] > 0 for row in rows for column in columns)


@needs_extension
def test_operator(tmp_path):
    options = "-m bench.operator_cpu --quick --lengths 64 --memory-lengths 512 --seconds 0 --out"
    command = [sys.executable, *options.split(), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, provenance = written(tmp_path, "operator")
    assert len(done.stdout.splitlines()) == len(rows) + 2
    assert provenance["command"].startswith(f"python {options}")
    assert [(row["pass"], row["batch"]) for row in rows] == [(p, b) for p in ("forward", "backward") for b in (32, 1)]
    columns = ["sdpa ms", "cpu ms", "eager ms", "cpu/sdpa", "eager/cpu"]
    assert list(rows[0]) == ["dtype", "pass", "threads", "batch", "length", *columns]
    assert all(row[column] > 0 for row in rows for column in columns)
    assert all(row["cpu/sdpa"] == pytest.approx(row["cpu ms"] / row["sdpa ms"]) for row in rows)

    rows, _ = written(tmp_path, "operator-memory")
    assert [(row["pass"], row["length"]) for row in rows] == [("forward", 512), ("forward+backward", 512)]
    tensor = 512 * 12 * 64 * 4 / (1 << 20)
    for row, tensors in zip(rows, (1, 4)):  # the output, and three gradients
        for variant in ("sdpa", "cpu"):
            assert row[f"{variant} MiB"] > 0.9 * tensors * tensor
            assert row[f"{variant} MiB/1000 tokens"] == pytest.approx(row[f"{variant} MiB"] / 0.512)


@needs_extension
def test_operator_without_eager(bench, monkeypatch):
    monkeypatch.setattr(bench("operator_cpu"), "EAGER_LONGEST", 16)
    row = bench("operator_cpu").time_row("bfloat16", "backward", 1, 1, 24, seconds=0)
    assert row["cpu/sdpa"] > 0 and row["eager ms"] is None and row["eager/cpu"] is None


@pytest.mark.parametrize("name", ["cpu", "operator_cpu", "encoder"])
@pytest.mark.parametrize("option", ["--lengths", "--threads"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_sizes_below_one_are_refused(bench, capsys, name, option, value):
    with pytest.raises(SystemExit):
        bench(name).main(["--quick", f"{option}={value}"])
    assert f"argument {option}: must be an integer of at least 1, got {value}" in capsys.readouterr().err
