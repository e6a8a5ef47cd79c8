"""The example of int8 linear layers as its users run it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "int8.py"


def test_prints_a_table(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--quick"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    heads, _, *lines = [line.strip("|").split("|") for line in result.stdout.splitlines() if line.startswith("|")]
    rows = [dict(zip((head.strip() for head in heads), (cell.strip() for cell in line), strict=True)) for line in lines]
    assert [row["linear layers"] for row in rows] == ["float32", "bfloat16", "int8"] * 2
    for row in rows:
        exact, error = row["linear layers"] == "float32", float(row["relative difference of states"])
        assert error == 0 if exact else 0 < error < 0.2
        assert float(row["same predictions"]) == 1 if exact else float(row["same predictions"]) > 0.3
