"""Runs the benchmarks for the CPU at small sizes, and checks what they write."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


def written(folder, name, lines_of_summary=0):
    """Returns rows and provenance of the JSON file, and checks that the Markdown file has them too."""
    record = json.loads((folder / f"{name}.json").read_text())
    text = (folder / f"{name}.md").read_text()
    assert text.startswith(f"# {name}") and f"- torch: {torch.__version__}" in text
    assert {"command", "commit", "date", "cpu", "cores", "torch", "deberta_fast"} <= record["provenance"].keys()
    if not torch.cuda.is_available():
        assert text.splitlines()[2].startswith(f"On {record['provenance']['cpu']}, {os.cpu_count()} cores, load ")
    assert sum(line.startswith("|") for line in text.splitlines()) == len(record["rows"]) + 2 + lines_of_summary
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
    rows, provenance = written(tmp_path, "operator", lines_of_summary=4)
    assert len(done.stdout.splitlines()) == len(rows) + 2
    assert provenance["command"].startswith(f"python {options}")
    assert [(row["pass"], row["batch"]) for row in rows] == [(p, b) for p in ("forward", "backward") for b in (32, 1)]
    times, ratios = ["sdpa ms", "cpu ms", "eager ms"], ["cpu/sdpa", "from", "to", "eager/cpu"]
    assert list(rows[0]) == ["dtype", "pass", "threads", "batch", "length", *times, "calls", *ratios]
    assert all(row[column] > 0 for row in rows for column in (*times, *ratios))

    rows, _ = written(tmp_path, "operator-memory")
    assert [(row["pass"], row["length"]) for row in rows] == [("forward", 512), ("forward+backward", 512)]
    tensor = 512 * 12 * 64 * 4 / (1 << 20)
    for row, tensors in zip(rows, (1, 4)):  # the output, and three gradients
        for variant in ("sdpa", "cpu"):
            assert row[f"{variant} MiB"] > 0.9 * tensors * tensor
            assert row[f"{variant} MiB/1000 tokens"] == pytest.approx(row[f"{variant} MiB"] / 0.512)


@needs_extension
def test_ratios_are_of_the_same_round(bench, monkeypatch):
    """The machine's speed may differ between rounds. The quotient of the medians would be 1.5."""
    taken = {"sdpa": [1e-3, 2e-3, 9e-3, 8e-3, 1e-3], "cpu": [3e-3, 2e-3, 27e-3, 8e-3, 3e-3], "eager": [6e-3] * 5}
    operator = bench("operator_cpu")
    monkeypatch.setattr(operator.timing, "rounds", lambda calls, seconds: taken)
    row = operator.time_row("float32", "forward", 1, 2, 16, seconds=0)
    assert [row[name] for name in ("sdpa ms", "cpu ms", "calls")] == pytest.approx([2, 3, 5])
    assert [row[name] for name in ("from", "cpu/sdpa", "to", "eager/cpu")] == pytest.approx([1, 3, 3, 2])
    table = operator.ratios([row, row | {"batch": 1, "cpu/sdpa": 2.0}]).splitlines()
    assert "2 x 16" in table[2] and "1 x 16" in table[2] and len(table) == 5
    assert "3.00 (1.00 to 3.00)" in table[4] and "2.00 (1.00 to 3.00)" in table[4]


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


CPUINFO = "processor : 0\nvendor_id : Some\nflags\t\t: fpu avx2 avx512f amx_tile\nbugs : none\n\nprocessor : 1\n"


def test_what_computes_is_named(bench, tmp_path, monkeypatch):
    """Processor, instructions, libraries, kernels, and variables that limit them."""
    timing = bench("timing")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO)
    monkeypatch.setattr(timing, "CPUINFO", cpuinfo)
    for name in timing.LIMITS:
        monkeypatch.delenv(name, raising=False)
    found = timing.arithmetic.__wrapped__()
    assert found["instructions"] == "avx2 yes, avx512f yes, avx512_bf16 no, amx_tile yes, amx_bf16 no"
    for library, there in (("MKL", torch.backends.mkl), ("oneDNN", torch.backends.mkldnn)):
        pattern = rf"\b{library} \d+\.\d" if there.is_available() else rf"no {library}\b"
        assert re.search(pattern, found["torch computes with"])
    assert found["torch computes with"].startswith(torch.backends.cpu.get_cpu_capability())
    names = [cpu.instruction_set(dtype) for dtype in (torch.float32, torch.bfloat16)]
    own = "no compiled kernels" if cpu.NOT_LOADED else f"{names[0]}, bfloat16 with {names[1]}"
    assert found["deberta_fast computes with"] == own
    assert found["cpu"] == timing.provenance()["cpu"] and "limits" not in found

    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    cpuinfo.unlink()
    limited = timing.arithmetic.__wrapped__()
    assert limited["limits"] == "ONEDNN_MAX_CPU_ISA=AVX2" and limited["instructions"] == "not known"


def test_a_library_that_is_switched_off_is_not_named(bench, monkeypatch):
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace(is_available=lambda: True, enabled=False))
    assert bench("timing").arithmetic.__wrapped__()["torch computes with"].endswith("no oneDNN")
