"""Runs the benchmarks for GPUs on the CPU: checks what they write, and what a stopped run keeps."""

import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
SMALL = "--device cpu --dtype float32 --tokens 32 --lengths 16 32".split()


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"bench.{name}")


def written(folder, name):
    """Returns the rows of the JSON file, and checks that the Markdown file has them and the provenance too."""
    record = json.loads((folder / f"{name}.json").read_text())
    text = (folder / f"{name}.md").read_text()
    assert text.startswith(f"# {name}") and f"- torch: {torch.__version__}" in text
    assert {"command", "commit", "date", "torch", "deberta_fast"} <= record["provenance"].keys()
    assert sum(line.startswith("|") for line in text.splitlines()) >= len(record["rows"]) + 2
    return record["rows"]


def test_attention(bench, tmp_path, capsys):
    names = ["eager", "plain-flash", "plain-cudnn", "hf-eager"]
    bench("attention_gpu").main([*SMALL, "--heads", "2", "--variants", *names, "--out", str(tmp_path)])
    rows = written(tmp_path, "attention-float32")
    assert len(rows) == 2 * 3 * len(names)
    by_name = {name: [row for row in rows if row["variant"] == name] for name in names}
    assert all(
        "ms" not in row and "RuntimeError" in row["error"] for row in by_name["plain-cudnn"]
    )  # no such thing here
    for name in ("eager", "plain-flash", "hf-eager"):
        assert all(row["ms"] > 0 and row["TFLOP/s"] > 0 and row["x plain"] > 0 for row in by_name[name])
    assert all(row["difference"] < 1e-5 for row in by_name["hf-eager"])
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


@pytest.mark.parametrize(
    "options, name",
    [
        (["--padding", "0.5", "--passes", "backward"], "attention-padding-float32"),
        (["--dropout", "0.1", "--passes", "forward"], "attention-dropout-float32"),
        (["--memory", "--passes", "forward"], "memory-float32"),
        (["--host", "--lengths", "16", "--repeats", "2"], "host-float32"),
    ],
)
def test_other_tables_of_attention(options, name, bench, tmp_path):
    bench("attention_gpu").main([*SMALL, "--heads", "2", "--variants", "eager", "hf", *options, "--out", str(tmp_path)])
    rows = written(tmp_path, name)
    assert not [row["error"] for row in rows if "error" in row]
    found = {row["variant"] for row in rows}
    assert found == {"eager-mask", "eager-packed", "hf-eager"} if "padding" in name else {"eager", "hf-eager"}


def test_layer(bench, tmp_path):
    names = ["hf-eager", "patched-eager", "patched-mask", "flashdeberta"]
    bench("layer_gpu").main([*SMALL[:-1], "--passes", "forward", "--variants", *names, "--out", str(tmp_path)])
    rows = {row["variant"]: row for row in written(tmp_path, "layer-float32")}
    assert list(rows) == names
    for name in names[:3]:
        assert rows[name]["ms"] > 0 and rows[name]["x eager"] > 0 and rows[name]["difference"] < 1e-5
    assert "error" in rows["flashdeberta"]  # not installed, or without a GPU


def test_a_stopped_run_keeps_its_rows(bench, tmp_path, monkeypatch):
    attention_gpu, device = bench("attention_gpu"), bench("device")
    measure, saved, calls = device.Device.measure, [], []
    save = device.timing.save

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(device.Device, "measure", stopping)
    monkeypatch.setattr(
        device.timing, "save", lambda name, rows, *rest: (saved.append(len(rows)), save(name, rows, *rest))
    )
    with pytest.raises(KeyboardInterrupt):
        attention_gpu.main([*SMALL, "--heads", "2", "--variants", "eager", "hf", "--out", str(tmp_path)])
    assert saved == [1, 2, 3, 4]
    assert [row["pass"] for row in written(tmp_path, "attention-float32")] == ["forward"] * 2 + ["backward"] * 2


def test_charts(bench, tmp_path):
    pytest.importorskip("matplotlib")
    bench("attention_gpu").main([*SMALL, "--heads", "2", "--variants", "eager", "plain", "--out", str(tmp_path)])
    bench("plots").main([str(tmp_path)])
    assert (tmp_path / "attention-float32.png").stat().st_size > 5000


def test_kernels_are_told_apart(bench):
    """In a profile of two calls, of which the second is slower."""
    name = "void deberta_fast::cuda::(anonymous namespace)::{}<64, false>(deberta_fast::cuda::Call)".format
    call = [("spin_kernel(long)", 1e3), (name("prepare_kernel"), 2.0), (name("prepare_kernel"), 3.0)]
    call.append(("_ZN12deberta_fast4cuda12_GLOBAL__N_114forward_kernelILi64EEEvNS0_11ForwardCallE", 100.0))
    events = call + [(kernel, 3 * time) for kernel, time in call]
    assert bench("cuda_kernels").per_kernel(events, 2) == {"prepare_kernel": (2, 10.0), "forward_kernel": (1, 200.0)}


def test_kernels_of_a_backend_that_cannot_serve(bench, tmp_path):
    with pytest.raises(SystemExit, match="cannot serve this call: .*tensors must be on an NVIDIA GPU"):
        bench("cuda_kernels").main(["--device", "cpu", "--tokens", "32", "--lengths", "16", "--out", str(tmp_path)])
