"""Checks the help and the dry run of bench/cpu.sh, so that a typing error costs no time on a machine lent for it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deberta_fast.op.backends import cpu

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench/cpu.sh"
STAGES = {
    stage: int(seconds)
    for stage, seconds in re.findall(r"([\w-]+):(\d+)", re.search(r"^all='([^']*)'$", SCRIPT.read_text(), re.M)[1])
}

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("bash") is None, reason="needs bash on Linux"
)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or cpu.NOT_LOADED is not None, reason=f"needs g++ and the extension: {cpu.NOT_LOADED}"
)


def run(*arguments, script=SCRIPT):
    return subprocess.run(
        ["bash", script, *map(str, arguments)], capture_output=True, text=True, timeout=1800,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Runs all stages dry. Returns the folder that they fill, and what they print."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dry")
    done = run("--dry", "--out", folder)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    return folder, done.stdout


def test_help_names_every_stage():
    unknown = run("nonsense")
    assert unknown.returncode == 2 and all(f" {stage}:" in unknown.stderr for stage in STAGES)
    shown = run("--help")
    assert shown.returncode == 0 and [name for name in STAGES if not re.search(rf"\b{name} ", shown.stdout)] == []


def test_limits_keep_the_promise():
    assert sum(STAGES.values()) <= 20 * 60 and "20 minutes in all" in SCRIPT.read_text()


@pytest.mark.parametrize("stage", ["operator:", "operator:x", "operator-", "perator", "operator:9 9"])
def test_stages_that_are_not_there(stage):
    assert run("--dry", stage).returncode == 2


@needs_compiler
def test_every_stage_runs(dry):
    told = (dry[0] / "stages.txt").read_text()
    assert [line.split()[0] for line in told.splitlines()] == list(STAGES)
    assert all(" ok: " in line for line in told.splitlines()) and told in dry[1]


TABLES = {
    "machine": {"ms", "GFLOP/s", "oneDNN's kernels"},
    "operator": {"sdpa ms", "cpu ms", "eager ms", "cpu/sdpa"},
    "operator-long": {"sdpa ms", "cpu ms", "cpu/sdpa"},
    "attention": {"eager ms", "patched ms", "native ms", "plain ms"},
    "memory": {"eager MiB", "patched MiB", "native MiB", "plain MiB"},
    "encoder-models": {"ms", "tokens/s", "x eager", "x bert", "x modernbert"},
    "encoder-long": {"ms", "tokens/s", "x eager", "x bert", "x modernbert"},
    "encoder-training": {"ms", "tokens/s", "x eager", "x bert", "x modernbert"},
    "host": {"sdpa us", "dense us", "varlen us"},
}
MISSING = {"onnxruntime"}  # where it is not installed


@needs_compiler
@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_its_rows(name, dry):
    record = json.loads((dry[0] / f"{name}.json").read_text())
    rows = [row for row in record["rows"] if not ("error" in row and row["variant"] in MISSING)]
    assert rows and all(TABLES[name] <= row.keys() and "error" not in row for row in rows)
    assert (dry[0] / f"{name}.md").read_text().splitlines()[2].startswith(f"On {record['provenance']['cpu']}, ")


@needs_compiler
def test_both_dtypes_are_measured(dry):
    for name in TABLES.keys() - {"attention", "memory", "host"}:
        rows = json.loads((dry[0] / f"{name}.json").read_text())["rows"]
        assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    reports = json.loads((dry[0] / "check.json").read_text())["reports"]
    assert reports["bfloat16"]["passed"]


PLANTED = {
    "build": ("setup.py -q build_ext --build-lib", "setup.py -q build_ex --build-lib"),
    "machine": ("bench machine --threads", "bench machine --treads"),
    "operator": ("operator_cpu --lengths 512 2048 128", "operator_cpu --lenghts 512 2048 128"),
    "encoder-long": ("bert-onednn modernbert onnxruntime", "bert-onednn modernbert onxruntime"),
}


@needs_compiler
@pytest.mark.parametrize("stage", PLANTED)
def test_a_typing_error_is_caught(stage, tmp_path):
    right, wrong = PLANTED[stage]
    text = SCRIPT.read_text()
    assert text.count(right) == 1
    spoiled = tmp_path / "cpu.sh"
    spoiled.write_text(re.sub(r"^root=.*$", f"root={ROOT}", text.replace(right, wrong), count=1, flags=re.MULTILINE))
    done = run("--dry", "--out", tmp_path / "results", stage, script=spoiled)
    assert done.returncode == 1 and f"{stage} " in done.stdout and "FAILED" in done.stdout
