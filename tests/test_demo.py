"""The demo as its users run it: what it prints and writes, and that it refuses wrong answers."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo.py"

# A mutant: every call of the patched model reads the position table one row off.
ONE_ROW_OFF = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from deberta_fast.models import attention
right = attention.attend
attention.attend = lambda *heads, pos_key, **rest: right(*heads, pos_key=pos_key.roll(1, dims=1), **rest)
demo = sys.argv[2]
sys.argv = sys.argv[2:]
runpy.run_path(demo, run_name="__main__")
"""


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments, "--quick", "--device", "cpu"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_prints_a_table_and_writes_it_with_a_plot(tmp_path):
    result = run(str(DEMO), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    for column in ("length", "batch", "HF eager ms", "patched ms", "HF eager MiB", "patched MiB", "largest difference"):
        assert column in table[0]
    rows = json.loads((tmp_path / "demo-output" / "demo.json").read_text())["rows"]
    assert len(table) == 2 + len(rows) and max(row["batch"] for row in rows) > 1
    assert all(row["HF eager ms"] > 0 and row["patched ms"] > 0 for row in rows)
    longest = max(rows, key=lambda row: row["length"] * row["batch"])
    assert longest["HF eager MiB"] > longest["patched MiB"] > 0
    assert (tmp_path / "demo-output" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_refuses_answers_that_read_a_neighbouring_row(tmp_path):
    result = run("-c", ONE_ROW_OFF, str(DEMO.parents[1]), str(DEMO), folder=tmp_path)
    assert result.returncode == 1
    assert "answers are wrong" in result.stderr and "more than twice HF eager's error against float64" in result.stderr
    assert not (tmp_path / "demo-output").exists()


def test_names_a_folder_without_a_checkpoint(tmp_path):
    main = runpy.run_path(str(DEMO), run_name="demo")["main"]
    with pytest.raises(SystemExit, match="expected a folder with a config.json"):
        main(["--model", str(tmp_path)])
