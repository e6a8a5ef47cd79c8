"""Runs the benchmark of long texts at small sizes: what it writes and refuses, and that its memory is the step's."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deberta_fast.op.backends import cpu

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
ROOT = Path(__file__).resolve().parents[2]
ALONE = ["hf", "patched", "native", "checkpointed", "but-attention"]
needs_extension = pytest.mark.skipif(cpu.NOT_LOADED is not None, reason=str(cpu.NOT_LOADED))
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux resets the peak")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def here(bench, monkeypatch):
    """Measures in this process, which is faster than in new ones, and wrong for memory alone."""
    long = bench("long")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setattr(long, "measured", lambda case: long.step_of(case, 0, ""))
    return long


def written(folder, name="long"):
    rows, text = json.loads((folder / f"{name}.json").read_text())["rows"], (folder / f"{name}.md").read_text()
    assert text.startswith(f"# {name}") and "- command: " in text and "- commit: " in text
    return rows, text


def small(folder, *variants, lengths=(48, 96)):
    return [
        "--size",
        "tiny",
        "--lengths",
        *map(str, lengths),
        "--variants",
        *variants,
        "--seconds",
        "0",
        "--out",
        str(folder),
    ]


def test_rows_and_summary(here, tmp_path, capsys):
    here.main(small(tmp_path, *ALONE, lengths=(96, 48)))
    rows, text = written(tmp_path)
    assert [(row["length"], row["variant"]) for row in rows] == [(n, name) for n in (48, 96) for name in ALONE]
    assert all(row["steps"] == 1 and row["s"] > 0 and row["difference"] < 1e-5 for row in rows)
    for row in rows:
        assert row["s/1000 tokens"] == pytest.approx(1000 * row["s"] / row["length"])
        # So little memory may be resident already, and the peak 0.
        assert row["peak MiB"] == pytest.approx(row["peak/least"] * row["length"] * 64 * 4 * 3 / 2**20, abs=1e-9)
    printed = capsys.readouterr().out
    for head in ("## s/1000 tokens", "## peak MiB", "## kept/least", "## Peak memory, 96 to 48 tokens"):
        assert head in text and head in printed


def fake(bench, seconds=1.0, loss=1.0, peak=100 << 20, kept=50 << 20):
    return bench("variants.long").Measured(seconds, kept, peak, loss, [2.0, 3.0])


def test_growth_is_of_the_two_longest(here, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(here, "measured", lambda case: fake(bench, peak=(case.length**2) << 10))
    here.main(small(tmp_path, "native", "checkpointed", lengths=(16, 32, 96)))
    line = written(tmp_path)[1].partition("## Peak memory, 96 to 32 tokens")[2].splitlines()[4]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["native", "9.00", "3.00"]


def test_variants_take_turns_while_there_is_time(here, bench, tmp_path, monkeypatch):
    order, seconds = [], {16: 0.1, 32: 1.0, 48: 100.0}
    measured = lambda case: order.append((case.length, case.variant)) or fake(bench, seconds[case.length])
    monkeypatch.setattr(here, "measured", measured)
    here.main([*small(tmp_path, "patched", "native", lengths=seconds), "--seconds", "6"])
    one = lambda length: [(length, "patched"), (length, "native")]
    assert order == one(16) * here.MOST_ROUNDS + one(32) * 3 + one(48)
    assert [row["steps"] for row in written(tmp_path)[0]] == [5, 5, 3, 3, 1, 1]


def test_medians(here, bench, tmp_path, monkeypatch):
    times = iter([3.0, 1.0, 2.0, 5.0, 4.0])
    monkeypatch.setattr(here, "measured", lambda case: fake(bench, next(times)))
    here.main([*small(tmp_path, "native", lengths=[16]), "--seconds", "100"])
    assert written(tmp_path)[0][0]["s"] == 3.0


def test_what_does_not_fit_fails_or_is_wrong_has_no_figures(here, bench, tmp_path, monkeypatch):
    calls = []

    def measured(case):
        calls.append(case.variant)
        if case.variant == "patched":
            raise RuntimeError("no | more\nof this")
        return fake(bench, seconds=1e-3, loss=1.01 if case.variant == "checkpointed" else 1.0)

    monkeypatch.setattr(here, "measured", measured)
    monkeypatch.setattr(here.timing, "free_memory", lambda: 30 << 20)
    here.main([*small(tmp_path, *ALONE, lengths=[1024]), "--seconds", "100"])
    rows = {row["variant"]: row for row in written(tmp_path)[0]}
    assert rows["hf"]["error"] == "not run: needs about 0.1 GiB, 0.0 are free" and "hf" not in calls
    assert rows["patched"]["error"] == "not run: RuntimeError: no / more" and calls.count("patched") == 1
    assert rows["checkpointed"]["error"].startswith("differs by 1.0e-02")
    assert not any("s" in rows[name] for name in ("hf", "patched", "checkpointed"))
    assert rows["native"]["s"] == 1e-3 and calls.count("native") == here.MOST_ROUNDS


@needs_extension
def test_profile(bench, tmp_path):
    bench("long").main(["--profile", "512", "--size", "tiny", "--out", str(tmp_path)])
    rows, _ = written(tmp_path, "long-profile")
    assert [row["length"] for row in rows] == [128] * 4 + [512] * 4
    assert all(row["s"] > 0 for row in rows) and sum(row["share"] for row in rows) == pytest.approx(2)


@needs_extension
@needs_linux
@pytest.mark.parametrize("variant", ["native", "checkpointed", "but-attention"])
def test_memory_is_that_of_the_counted_tensors(bench, monkeypatch, variant):
    """In a process of its own. What else is resident: tables, scratch memory of kernels and libraries."""
    long, mib = bench("long"), 1 << 20
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    case = long.Case(variant, "2-layers", 4096, 0.0, 1)
    found = long.measured(case)
    assert case.predicted() - 2 * mib < found.peak < case.predicted() + 25 * mib
    kept = {"native": 34, "checkpointed": 3, "but-attention": 5}[variant] * 4 * mib  # hidden states of 4 MiB
    assert kept - 2 * mib < found.kept < kept + 8 * mib


@needs_extension
@pytest.mark.parametrize("variant", ["ring-2", "heads-2"])
def test_two_processes_share_a_text(bench, variant):
    """Loss and gradients are those of one process; so is the sum of their memory, up to what travels."""
    long = bench("long")
    case = lambda name: long.Case(name, "tiny", 1024, 0.0, 1)
    one, two = long.step_of(case("native"), 0, ""), long.measured(case(variant))
    assert bench("variants.long").difference(two, one) < 1e-5 and two.seconds > 0 < two.peak


def test_gpu_table_on_a_cpu(bench, tmp_path, capsys):
    options = "--device cpu --size tiny --dtype float32 --lengths 48 96 --out".split()
    bench("long_gpu").main([*options, str(tmp_path)])
    rows, text = written(tmp_path)
    assert [(row["length"], row["variant"]) for row in rows] == [(n, name) for n in (48, 96) for name in ALONE]
    assert all("error" not in row and row["steps"] == 3 and row["difference"] < 1e-5 for row in rows)
    assert "## Peak memory, 96 to 48 tokens" in text and len(capsys.readouterr().out.splitlines()) == len(rows)


def test_gpu_table_leaves_out_what_does_not_fit(bench, tmp_path, monkeypatch):
    long_gpu = bench("long_gpu")
    monkeypatch.setattr(long_gpu.timing, "free_memory", lambda: 8 << 20)
    options = "--device cpu --size tiny --dtype float32 --lengths 1024 --variants hf checkpointed --out".split()
    long_gpu.main([*options, str(tmp_path)])
    rows = {row["variant"]: row for row in written(tmp_path)[0]}
    assert "not run: MemoryError: needs about 0 GiB" in rows["hf"]["error"] and rows["checkpointed"]["s"] > 0


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("bash") is None, reason="needs g++ and bash")
def test_gpu_stage_runs_dry(tmp_path):
    pytest.importorskip("triton")
    command = ["bash", ROOT / "bench/gpu.sh", "--dry", "--out", tmp_path, "long"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    rows, _ = written(tmp_path)
    assert [row["variant"] for row in rows] == ALONE and not any("error" in row for row in rows)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lengths", "0"], "argument --lengths: must be an integer of at least 1, got 0"),
        (["--threads", "-1"], "argument --threads: must be an integer of at least 1, got -1"),
        (["--variants", "nonsense"], "argument --variants: invalid choice: 'nonsense'"),
    ],
)
def test_bad_options(bench, capsys, options, message):
    with pytest.raises(SystemExit):
        bench("long").main(["--quick", *options])
    assert message in capsys.readouterr().err
