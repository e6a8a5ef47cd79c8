"""Far keys by plain flash attention, merged with near ones, give the right output for all sizes of blocks."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from deberta_fast import disentangled_attention

TABLE = dict(position_buckets=16, max_relative_positions=32)


@pytest.fixture
def far_flash(monkeypatch):
    pytest.importorskip("transformers")  # which other variants import
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return importlib.import_module("bench.far_flash")


def tensors(far_flash, queries=300, keys=300):
    torch.manual_seed(0)
    heads = [torch.randn(2, 3, n, 64) for n in (queries, keys, keys)]
    return far_flash.Tensors(*heads, *torch.randn(2, 3, 32, 64).unbind(0), *TABLE.values())


def expected(x):
    return disentangled_attention(*x[:5], **TABLE, backend="reference")


@pytest.mark.parametrize("align", [1, 64])
@pytest.mark.parametrize("block", [1, 50, 64, 128, 1000])
@pytest.mark.parametrize("queries, keys", [(300, 300), (40, 170), (170, 40)])
def test_is_disentangled_attention(block, queries, keys, align, far_flash, monkeypatch):
    if block == 1 and queries != 40:
        pytest.skip("slow, and covered by the other shape")
    monkeypatch.setattr(far_flash, "ALIGN", align)
    x = tensors(far_flash, queries, keys)
    torch.testing.assert_close(far_flash.attention(x, block, "eager"), expected(x), rtol=1e-5, atol=2e-6)


def test_most_keys_are_far(far_flash, monkeypatch):
    """On both sides, and in blocks with only one side: otherwise the test above would show little."""
    x = tensors(far_flash)
    monkeypatch.setattr(far_flash, "ALIGN", 1)
    sides = [(past, 300 - future) for _, _, past, future in far_flash._blocks(x, 50)]
    assert sides[0][0] == sides[-1][1] == 0 and all(past + behind > 150 for past, behind in sides)


@pytest.mark.parametrize("mistake", ["past", "future", "constant"])
def test_a_mistake_is_caught(mistake, far_flash, monkeypatch):
    """Far segments that are one key too long, and the constant of the other table row."""
    x, blocks, far = tensors(far_flash), far_flash._blocks, far_flash.far
    shift = {"past": (1, 0), "future": (0, -1)}.get(mistake, (0, 0))
    longer = lambda x, block: [(a, b, past + shift[0], future + shift[1]) for a, b, past, future in blocks(x, block)]
    monkeypatch.setattr(far_flash, "ALIGN", 1)
    monkeypatch.setattr(far_flash, "_blocks", longer)
    if mistake == "constant":
        monkeypatch.setattr(far_flash, "far", lambda x, *bounds: far(x, *bounds[:-1], 31 - bounds[-1]))
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(far_flash.attention(x, 50, "eager"), expected(x), rtol=1e-5, atol=2e-6)


def test_benchmark(far_flash, tmp_path):
    sizes = "--device cpu --tokens 64 --lengths 64 --heads 2 --blocks 16 32 --backends cpu --out".split()
    far_flash.main([*sizes, str(tmp_path)])
    rows = {row["variant"]: row for row in json.loads((tmp_path / "far-flash.json").read_text())["rows"]}
    names = [f"{name} {block}" for block in (16, 32) for name in ("cpu merged", "cpu near")]
    assert list(rows) == ["plain-flash", "cpu", *names, "far 16", "far 32"]
    assert all(row["ms"] > 0 for row in rows.values())
    assert all(row["difference"] < 0.01 for name, row in rows.items() if "merged" in name)
