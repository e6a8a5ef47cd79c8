"""Runs the benchmark of one small call's host time: checks what it writes, and what its variants compute."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def host(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module, threads = importlib.import_module("bench.host"), torch.get_num_threads()
    monkeypatch.setattr(module, "CALLS", 2)
    yield module
    torch.set_num_threads(threads)


def test_rows(host, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    host.main(["--seconds", "0", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert [(row["device"], row["pass"], row["position tables"]) for row in rows] == [
        ("cpu", passes, tables) for tables in ("both", "none") for passes in ("forward", "forward+backward")
    ]
    times = ["sdpa us", "dense us", "varlen us"]
    assert list(rows[0]) == ["device", "pass", "position tables", *times, "dense/sdpa", "varlen/sdpa"]
    for row in rows:
        # Even the shortest call takes longer than 0.1 microseconds, and none takes a second
        assert all(0.1 < row[column] < 1e6 for column in times)
        assert all(row[f"{x}/sdpa"] == pytest.approx(row[f"{x} us"] / row["sdpa us"]) for x in ("dense", "varlen"))
    text = (tmp_path / "host.md").read_text()
    assert text.startswith("# host") and f"- torch: {torch.__version__}" in text
    assert torch.get_num_threads() == 1 and len(capsys.readouterr().out.splitlines()) == len(rows)


def test_variants_compute_the_same(host):
    """Without position tables all compute plain attention; with them dense and packed calls and gradients agree."""
    heads_first = lambda packed: packed.transpose(0, 1).unsqueeze(0)
    plain = {name: call() for name, call in host.variants("cpu", "forward", tables=False).items()}
    torch.testing.assert_close(plain["dense"], plain["sdpa"])
    torch.testing.assert_close(heads_first(plain["varlen"]), plain["sdpa"])
    assert plain["dense"].is_inference() and plain["dense"].shape == (1, 2, 8, 64)

    with_tables = {name: call() for name, call in host.variants("cpu", "forward", tables=True).items()}
    torch.testing.assert_close(heads_first(with_tables["varlen"]), with_tables["dense"])
    assert not torch.allclose(with_tables["dense"], with_tables["sdpa"], atol=0.1)

    grads = {name: call() for name, call in host.variants("cpu", "forward+backward", tables=True).items()}
    assert [len(grads[name]) for name in ("sdpa", "dense", "varlen")] == [3, 5, 5]
    for dense, varlen in zip(grads["dense"], grads["varlen"]):
        torch.testing.assert_close(heads_first(varlen) if dense.dim() == 4 else varlen, dense)
