"""Checks the help and the dry run of bench/gpu.sh without a GPU, so that a typing error costs no time on one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench/gpu.sh"
MINUTES = {"first": 8, "second": 4}

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("bash") is None, reason="needs bash on Linux"
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def run(*arguments, script=SCRIPT):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DEBERTA_FAST")}
    return subprocess.run(
        ["bash", script, *map(str, arguments)], capture_output=True, text=True, timeout=1800,
        env=environment | {"PYTHON": sys.executable},
    )  # fmt: skip


def stages_of(name):
    """Returns the stages of first or second, with their seconds."""
    listed = re.search(f"^{name}='(.*)'$", SCRIPT.read_text(), re.MULTILINE)[1]
    return {stage: int(seconds) for stage, seconds in (entry.split(":") for entry in listed.split())}


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Runs all stages of first and second dry. Returns the folder that they fill, and what they print."""
    for package in ("triton", "transformers"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("dry")
    done = run("--dry", "--out", folder / "results", "--archive", folder / "all.tar.gz", "first", "second")
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    return folder, done.stdout


def rows_of(dry, name):
    return json.loads((dry[0] / "results" / f"{name}.json").read_text())["rows"]


def test_help_names_every_stage():
    """An unknown stage lists them too; both work without a GPU."""
    unknown = run("nonsense")
    stages = set(unknown.stderr.split("there are: ")[1].split())
    assert unknown.returncode == 2 and stages > {"first", "second", "build", "tests", "kernels", "plots"}
    assert stages > stages_of("first").keys() | stages_of("second").keys()
    shown = run("--help")
    assert shown.returncode == 0 and [stage for stage in stages if not re.search(rf"\b{stage}\b", shown.stdout)] == []


@pytest.mark.parametrize("name", MINUTES)
def test_limits_keep_the_promise(name):
    limits = stages_of(name)
    assert sum(limits.values()) <= 60 * MINUTES[name]
    assert f"in at most {MINUTES[name]}" in SCRIPT.read_text()


@needs_compiler
def test_every_stage_runs(dry):
    folder, printed = dry
    told = (folder / "results/stages.txt").read_text()
    assert [line.split()[0] for line in told.splitlines()] == [*stages_of("first"), *stages_of("second")]
    assert all(" ok: " in line for line in told.splitlines()) and told in printed
    assert (folder / "all.tar.gz").stat().st_size > 1000


NO_KERNEL = {"plain-cudnn", "plain-efficient"}  # torch has no such kernels for a CPU
PEERS = {"disentangled-flash", "flashdeberta"}  # where they are not installed
TABLES = {
    "g1": {"cuda", "triton", "plain-flash", *NO_KERNEL},
    "g1-flex": {"flex", "plain-flash"},
    "layer": {f"patched-{name}" for name in ("cuda", "cuda-mask", "triton", "triton-mask")} | PEERS,
    "peak": {"cuda", "triton", "plain-flash", "hf-eager"},
    "encoders": {"eager", "patched", "native", "modernbert"},
    "cuda-workspace": {"cuda"},
    "far-flash": {"plain-flash", "cuda", "triton", "cuda merged 8", "triton merged 8", "cuda near 8", "far 8"},
}


@needs_compiler
@pytest.mark.parametrize("name", TABLES)
def test_every_variant_has_its_rows(name, dry):
    rows = rows_of(dry, name)
    found = {row["variant"] for row in rows}
    assert TABLES[name] <= found
    failed = {row["variant"]: row["error"] for row in rows if "error" in row}
    assert failed.keys() <= NO_KERNEL | PEERS, failed
    assert all("ms" in row or "MiB" in row for row in rows if row["variant"] not in failed)
    assert all(row["difference"] < 0.02 for row in rows if "difference" in row and not row["variant"].startswith("mod"))


@needs_compiler
def test_other_results(dry):
    results = dry[0] / "results"
    for name in ("check", "check-full"):
        record, text = json.loads((results / f"{name}.json").read_text()), (results / f"{name}.txt").read_text()
        assert record["provenance"]["torch"] and record["reports"]["bfloat16"]["passed"]
        assert all(report["passed"] and dtype in text for dtype, report in record["reports"].items())
        passed = {row["name"] for report in record["reports"].values() for row in report["rows"] if row["passed"]}
        assert {"cuda", "triton", "eager"} <= passed
    assert [row["MiB"] for row in rows_of(dry, "cuda-workspace")] == [0, 24, 32, 40, 160]
    assert all("ms" in row for name in ("triton-bands", "triton-tiles") for row in rows_of(dry, name))
    assert [(results / f"cuda-ncu-L16.{kind}").exists() for kind in ("csv", "txt")] == [True] * 2
    heads, units, values = (results / "cuda-ncu-L16.csv").read_text().splitlines()
    assert "gpu__time_duration.sum" in heads and "forward_kernel" in values
    for tool in ("memcheck", "racecheck"):
        assert [("SUMMARY" in (results / f"cuda-{tool}-{i}.txt").read_text()) for i in range(2)] == [True] * 2


PLANTED = {
    "g1": ("--variants cuda triton plain --name g1", "--varaints cuda triton plain --name g1"),
    "ncu": ("bench cuda_kernels ncu", "bench cuda-kernels ncu"),
    "encoders": ("--shapes full variable", "--shapes full varying"),
    "sanitize": ("--print-limit 1000", "--print-limits 1000"),
    "check": ("run bench.check $on --quick", "run bench.check $on --quik"),
    "build": ("sys.exit(cuda.MISSING)", "sys.exit(cuda.LACKING)"),
}


@needs_compiler
@pytest.mark.parametrize("stage", PLANTED)
def test_a_typing_error_is_caught(stage, dry, tmp_path):
    right, wrong = PLANTED[stage]
    text = SCRIPT.read_text()
    assert text.count(right) == 1
    spoiled = tmp_path / "gpu.sh"
    spoiled.write_text(re.sub(r"^root=.*$", f"root={ROOT}", text.replace(right, wrong), count=1, flags=re.MULTILINE))
    done = run("--dry", "--out", tmp_path / "results", stage, script=spoiled)
    assert done.returncode == 1 and f"{stage} " in done.stdout and "FAILED" in done.stdout


def test_tools_that_stand_in_refuse_unknown_options():
    bench = ROOT / "bench/dry/bin"
    status = lambda *words: subprocess.run([bench / words[0], *words[1:]], capture_output=True).returncode
    assert status("ncu", "--section", "Occupancy", "-f", "true") == 0
    assert status("ncu", "--sections", "Occupancy", "true") == 1
    assert status("compute-sanitizer", "--tool", "memcheck", "true") == 0
    assert status("compute-sanitizer", "--tool", "memchek", "true") == 1
    assert status("compute-sanitizer", "--tool", "memcheck", "false") == 1
