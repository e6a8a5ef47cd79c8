"""Runs the benchmark of pretraining at small sizes: what it writes, what it draws, and what it refuses to time."""

import importlib
import json
import math
import statistics
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return lambda name="pretraining": importlib.import_module(f"bench.{name}")


def run(bench, folder, *options):
    bench().main(["--quick", "--device", "cpu", "--out", str(folder), *options])
    return json.loads((folder / "pretraining.json").read_text())["rows"]


def test_rows(bench, tmp_path, capsys):
    rows = run(bench, tmp_path)
    shapes = [(row["length"], row["variant"], row["tokens"], row["steps"]) for row in rows]
    assert shapes == [(length, name, 256, 2) for length in (96, 32) for name in ("hf", "packed")]
    for hf, packed in zip(rows[::2], rows[1::2]):
        assert packed["fill"] == 1 > hf["fill"] > 0.3 and packed["difference"] < 1e-5
        assert packed["x hf"] == pytest.approx(hf["ms"] / packed["ms"])
        assert packed["tokens/s"] == pytest.approx(256 / packed["ms"] * 1000)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    text = (tmp_path / "pretraining.md").read_text()
    assert "Generator of 1 layers, discriminator of 2, 64 wide" in text and "- command: " in text


def test_another_loss_is_not_timed(bench, tmp_path, monkeypatch):
    from deberta_fast.models.model import DebertaModel

    monkeypatch.setattr(DebertaModel, "enhanced_mask_decoder", lambda model, states, *_: states)
    hf, packed = run(bench, tmp_path, "--lengths", "32")
    assert packed["error"].startswith("not run: ArithmeticError: differs by") and "ms" not in packed and hf["ms"] > 0


def test_what_does_not_fit_is_not_run(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench("timing"), "free_memory", lambda: 4 << 20)
    hf, packed = run(bench, tmp_path, "--lengths", "96")
    assert "not run: MemoryError: needs about 0 GiB, 0 are free" in hf["error"]
    assert "ms" not in hf and "x hf" not in packed


def test_documents(bench):
    here = bench()
    batches = here.texts(512, 100_000, 1000)
    sizes = [len(text.input_ids) for batch in batches for text in batch]
    assert [sum(len(text.input_ids) for text in batch) for batch in batches] == [100_000] * here.BATCHES
    # Documents beyond 512 tokens leave a full sequence and a rest, which make the others' median a little smaller.
    assert max(sizes) == 512 and 160 < statistics.median(sizes) < 230
    normal = statistics.NormalDist(math.log(here.MEDIAN), here.SPREAD)
    long = 1 - normal.cdf(math.log(512))
    full = sum(size == 512 for size in sizes) / len(sizes)
    assert long < full < 2 * long
    text = batches[0][0]
    assert torch.equal(text.hidden_ids == here.MASK, text.masked)
    assert int(text.masked.sum()) == round(0.15 * len(text.masked))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lengths", "0"], "argument --lengths: must be an integer of at least 1, got 0"),
        (["--layers", "1"], "argument --layers: must be at least 2, got 1"),
        (["--vocab", "5"], "argument --vocab: must be at least 6, got 5"),
    ],
)
def test_bad_options(bench, capsys, options, message):
    with pytest.raises(SystemExit):
        bench().main(["--quick", *options])
    assert message in capsys.readouterr().err
