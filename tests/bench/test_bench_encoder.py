"""Runs the benchmark of whole encoders at small sizes: checks what it writes, and what it refuses to time."""

import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
TINY = "--models tiny --lengths 24 --tokens 72 --seconds 0 --device cpu --dtypes float32 --out".split()
OURS = ("patched", "patched-unpad", "native", "native-packed")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture
def measured(bench, tmp_path):
    """Returns the rows of a run by variant, only those of variable lengths."""

    def run(*variants, passes="forward"):
        bench("encoder").main([*TINY, str(tmp_path), "--variants", *variants, "--passes", passes])
        rows = json.loads((tmp_path / "encoder-models.json").read_text())["rows"]
        return {row["variant"]: row for row in rows if row["lengths"] == "variable"}

    return run


def test_rows(bench, tmp_path, capsys):
    timing = bench("timing")
    names = ["eager", *OURS, "bert", "bert-onednn", "modernbert", "native-graph", "int8"]
    bench("encoder").main([*TINY, str(tmp_path), "--variants", *names, "--name", "models"])
    record, text = json.loads((tmp_path / "models.json").read_text()), (tmp_path / "models.md").read_text()
    rows = record["rows"]
    shapes = [(row["pass"], row["batch"], row["lengths"], row["tokens"]) for row in rows if row["variant"] == "eager"]
    assert shapes == [
        ("forward", 3, "variable", 39), ("forward", 3, "full", 72), ("forward", 1, "full", 24),
        ("forward+backward", 3, "variable", 39), ("forward+backward", 3, "full", 72),
    ]  # fmt: skip
    assert [row["variant"] for row in rows[:9]] == [*names[:8], "int8"]  # a graph needs a GPU
    assert "int8" not in {row["variant"] for row in rows if row["pass"] == "forward+backward"}
    assert not {row["variant"] for row in rows if row["lengths"] == "full"} & {"patched-unpad", "native-packed"}
    assert all("error" not in row and row["calls"] == 2 for row in rows)
    assert all(row["difference"] < 1e-5 for row in rows if row["variant"] in (*OURS, "bert-onednn"))
    times = {row["variant"]: row["ms"] for row in rows[:9]}
    for row in rows[:9]:
        assert row["x eager"] == pytest.approx(times["eager"] / row["ms"])
        assert row["x bert"] == pytest.approx(min(times["bert"], times["bert-onednn"]) / row["ms"])
        assert row["x modernbert"] == pytest.approx(times["modernbert"] / row["ms"])
        assert row["tokens/s"] == pytest.approx(39 / row["ms"] * 1000)
    for one in ("forward", "forward+backward"):
        assert f"## tiny, {one}: ms (x eager)" in text and f"## tiny, {one}: tokens/s (x bert)" in text
    cell = f"{timing.cell(rows[0]['tokens/s'])} ({rows[0]['x bert']:.2f}x)"
    assert cell in text.partition("tokens/s (x bert)")[2]
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_wrong_answers_are_not_timed(bench, measured, monkeypatch):
    """Neither wrong states, nor right ones with wrong gradients."""
    variants = bench("variants.model")

    def without_a_term(encoders, batch):
        twin = variants.deberta_fast.patch(variants.models.sharing_parameters(encoders.deberta))
        for layer in twin.encoder.layer:
            layer.attention.self.pos_att_type = ["c2p"]
        return variants.padded(twin, batch)

    def twice_the_gradient(encoders, batch):
        forward = variants.padded(encoders.native(), batch)
        return lambda: (states := forward()) * 2 - states.detach()

    for name, build in (("patched", without_a_term), ("native", twice_the_gradient)):
        monkeypatch.setitem(variants.VARIANTS, name, variants.VARIANTS[name]._replace(build=build))
    rows = measured("eager", "patched", "native", "native-packed", passes="forward+backward")
    for name in ("patched", "native"):
        assert "ms" not in rows[name] and "ArithmeticError: differs by" in rows[name]["error"]
    assert rows["eager"]["ms"] > 0 and rows["native-packed"]["x eager"] > 0


def test_what_does_not_fit_or_fails_is_left_out(bench, measured, monkeypatch):
    variants = bench("variants.model").VARIANTS
    build, calls = variants["patched"].build, []

    def failing_later(encoders, batch):
        forward = build(encoders, batch)

        def run():
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("no | more\nof this")
            return forward()

        return run

    monkeypatch.setattr(bench("timing"), "free_memory", lambda: 1 << 10)
    monkeypatch.setitem(variants, "patched", variants["patched"]._replace(build=failing_later))
    rows = measured("eager", "patched", "native", "modernbert")
    assert "not run: MemoryError: needs about 0 GiB" in rows["eager"]["error"]
    assert rows["patched"]["error"] == "not run: RuntimeError: no / more" and "ms" not in rows["patched"]
    assert rows["native"]["ms"] > 0 and "x eager" not in rows["native"] and rows["native"]["x modernbert"] > 0


def test_order(bench):
    """The most wanted cases come first; a quick look is short; nothing is added to what is asked for."""
    encoder = bench("encoder")

    def cases(options):
        return [(case.dtype, case.passes, case.length) for case in encoder._cases(encoder._options(options.split()))]

    on_gpu = cases("--device cuda")
    assert on_gpu[0] == ("bfloat16", "forward", 512) and ("float32", "forward+backward", 512) in on_gpu
    assert not [case for case in on_gpu if case[0] == "float32" and case[2] != 512]
    assert set(cases("--device cpu --quick")) == {("float32", "forward", 128)}
    assert {case[2] for case in cases("--device cuda --dtypes float32 --lengths 64")} == {64}
    assert {case[0] for case in cases("--device cpu")} == {"float32", "bfloat16"}


def test_no_row_is_begun_too_late(bench, tmp_path, capsys):
    bench("encoder").main([*TINY, str(tmp_path), "--limit", "0"])
    assert capsys.readouterr().out == "out of time before forward of 3 x 24, float32\n"


def test_bert_is_of_deberta_s_size(bench):
    """Width, depth and heads, so that it differs only in its positions."""
    variants = bench("variants.model")
    encoders = variants.Encoders("tiny", torch.float32, "cpu")
    bert, deberta = encoders.bert(), encoders.deberta
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"):
        assert getattr(bert.config, name) == getattr(deberta.config, name)
    count = lambda model: sum(parameter.numel() for parameter in model.encoder.layer.parameters())
    assert count(bert) == count(deberta) and bert.config._attn_implementation == "sdpa"


def test_a_training_step_of_bert_drops_old_gradients(bench):
    variants = bench("variants.model")
    encoders, batch = variants.Encoders("tiny", torch.float32, "cpu"), variants.Batch(3, 24, True, "cpu")
    step = variants.build_call(encoders, "bert", "forward+backward", batch)
    step()
    first = encoders.bert().get_parameter(variants.GRADIENTS[0]).grad.clone()
    step()
    assert first.norm() > 0
    torch.testing.assert_close(encoders.bert().get_parameter(variants.GRADIENTS[0]).grad, first)


def test_bert_without_positions_is_left_out(bench, measured, monkeypatch):
    """An index beyond its table would end the process on a GPU."""
    monkeypatch.setattr(bench("variants.model"), "BERT_POSITIONS", 23)
    rows = measured("eager", "bert", "bert-onednn", "modernbert")
    assert rows.keys() == {"eager", "modernbert"} and "x bert" not in rows["eager"]


def test_bert_s_linear_layers_are_ours(bench, monkeypatch):
    """bert-onednn calls the product of native models, for all six of a layer; bert does not."""
    variants, shapes = bench("variants.model"), []
    product = variants.onednn_linear.product
    monkeypatch.setattr(variants.onednn_linear, "product", lambda x, *w: shapes.append(x.shape) or product(x, *w))
    encoders, batch = variants.Encoders("tiny", torch.float32, "cpu"), variants.Batch(3, 24, True, "cpu")
    for name, calls in (("bert", 0), ("bert-onednn", 12)):
        variants.build_call(encoders, name, "forward", batch)()
        assert len(shapes) == calls


def test_onnxruntime_at_other_lengths_than_exported(bench, measured):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    row = measured("eager", "onnxruntime")["onnxruntime"]
    assert row["difference"] < 1e-5 and row["x onnxruntime"] == 1


@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
def test_packed_modernbert(bench, monkeypatch, passes):
    """It agrees with the padded one, at a length beyond its window, with dense attention in place of the GPU's."""

    def dense(query, key, value, ends, _, longest, __, *, scale, window_size):
        sequence = torch.bucketize(torch.arange(len(query)), ends, right=True)
        distance = torch.arange(len(query)).unsqueeze(1) - torch.arange(len(query))
        seen = sequence.unsqueeze(1) == sequence
        if window_size[0] >= 0:
            seen &= (distance <= window_size[0]) & (-distance <= window_size[1])
        inputs = (x.transpose(0, 1) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*inputs, seen, scale=scale).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", dense)
    variants = bench("variants.model")
    encoders, batch = variants.Encoders("tiny", torch.float32, "cpu"), variants.Batch(3, 200, True, "cpu")
    states = [variants.build_call(encoders, name, passes, batch)() for name in ("modernbert", "modernbert-packed")]
    torch.testing.assert_close(states[1], batch.packed(states[0]), atol=1e-5, rtol=1e-5)
