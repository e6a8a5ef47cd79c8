"""The Triton backend in Triton's interpreter, on CPU tensors.

``test_triton_interpreted.py`` runs this file in a process of its own: TRITON_INTERPRET=1 has to be set before Triton
is imported.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import BY_NAME, CASES, DROPOUT_SEED, TENSORS, Case, as_dtype, forward_and_gradients, make_inputs
from comparison import (
    HALF_CASES,
    compare,
    mistake_far_distances,
    public,
    reversed_distance,
    shifted_slot,
    swapped_tables,
)
from interpreted import serve_cpu, without_vain_work
from triton import OutOfResources
from triton.runtime import interpreter

import deberta_fast
from deberta_fast import disentangled_attention, disentangled_attention_varlen
from deberta_fast.op.backends import reference, triton
from deberta_fast.op.backends.triton import configuration, plan
from deberta_fast.op.backends.triton.launch import Launch, Workspace
from deberta_fast.op.dropout import keep_mask

serve_cpu()
TABLE = dict(position_buckets=16, max_relative_positions=32)
FAR_L300 = replace(BY_NAME["far-L700"], name="far-L300", query_length=300, key_length=300)


def quick(name_or_case) -> Case:
    """Returns a case with as few heads as it needs."""
    case = BY_NAME[name_or_case] if isinstance(name_or_case, str) else name_or_case
    return replace(case, heads=2 if case.mask == "heads" else 1)


def draws(case) -> int:
    """Returns one draw for large cases, since the interpreter takes milliseconds for every step of a loop."""
    return 4 if case.query_length * case.key_length < 100**2 else 1


def run(name_or_case, dtype=torch.float32, change=lambda inputs: inputs):
    inputs = change(make_inputs(quick(name_or_case), dtype))
    return forward_and_gradients(public("triton"), as_dtype(inputs, dtype))


def assert_equal_but_for_rounding(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(autouse=True)
def nothing_in_vain(monkeypatch):
    restore = without_vain_work(monkeypatch.setattr)
    yield
    restore()


@pytest.fixture(autouse=True)
def checked_promises(monkeypatch):
    """Checks that the alignment that kernels promise to the compiler is true.

    A false promise is a fault on a GPU, but has no other effect here.
    """

    def checked(handle, name, values):
        if name == "tt.divisibility":
            (multiple,) = set(values)
            assert (handle.data % multiple == 0).all(), f"{handle.data} promised to be multiples of {multiple}"

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", checked)


@pytest.fixture(autouse=True)
def checked_addresses(monkeypatch):
    """Checks that kernels access only their arguments.

    An access out of bounds is a fault on a GPU, but would show only by luck here.
    """
    ranges = []
    run_launch, builder = Launch.run, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def run_within(launch, tensors, special):
        used = [x.untyped_storage() for x in launch.tensors(tensors) if x is not None]
        ranges[:] = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in used]
        run_launch(launch, tensors, special)

    def check(pointers, mask):
        used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.int64)
        if used.size:
            low, high = used.min(), used.max()
            assert any(start <= low and high < stop for start, stop in ranges), "out of bounds"

    def checked_load(self, pointers, mask, *arguments):
        check(pointers, mask)
        return load(self, pointers, mask, *arguments)

    def checked_store(self, pointers, value, mask, *arguments):
        check(pointers, mask)
        return store(self, pointers, value, mask, *arguments)

    monkeypatch.setattr(Launch, "run", run_within)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)


@pytest.fixture(autouse=True)
def poisoned_workspace(monkeypatch):
    """Fills the workspace that kernels have to write first: what they read before shows."""
    allocate = Workspace.allocate

    def poisoned(workspace, like):
        made = allocate(workspace, like)
        return made if workspace.zero else made.fill_(torch.nan if made.is_floating_point() else -(1 << 20))

    monkeypatch.setattr(Workspace, "allocate", poisoned)


def test_serves_cpu_tensors():
    assert triton.why_not(make_inputs(BY_NAME["one-token"], torch.float32)) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_is_as_precise_as_eager(case):
    compare(public("triton"), quick(case), torch.float32, draws(case))


IN_FLOAT16 = ("one-token", "ragged-L129-D64", "holes-L200")  # only the scale of bands depends on which of the two it is
IN_HALF = [(name, torch.bfloat16) for name in HALF_CASES if name != "v3-table-L1100"]


@pytest.mark.parametrize("name, dtype", [*IN_HALF, *((name, torch.float16) for name in IN_FLOAT16)])
def test_half_is_as_precise_as_eager(name, dtype):
    compare(public("triton"), quick(name), dtype, draws(BY_NAME[name]))


def configured(monkeypatch, alignment, rows, columns, step=None):
    tiles = configuration.Tiles(rows, columns, 4, 1)
    chosen = configuration.Configuration(alignment, *[tiles] * 5)
    monkeypatch.setattr(configuration, "choose", lambda target: chosen)
    if step:
        monkeypatch.setattr(plan, "step_of", lambda length: step)


TILES = [(32, 16, 32, 1), (64, 64, 32, 8), (128, 64, 128, 2)]  # alignment, rows, columns, step


@pytest.mark.parametrize(
    "name, alignment, rows, columns, step",
    [*(("far-L300", *tiles) for tiles in TILES), ("dropout-L140", *TILES[0]), ("left-padding-L200", *TILES[1])],
)
def test_any_tiles_give_the_same(name, alignment, rows, columns, step, monkeypatch):
    """The dropout mask is the same too."""
    case = FAR_L300 if name == "far-L300" else name
    usual = run(case)
    configured(monkeypatch, alignment, rows, columns, step)
    assert_equal_but_for_rounding(run(case), usual)


@pytest.mark.parametrize("name", ["holes-L200", "mask-per-head-L70"])
def test_one_head_of_one_batch_row_at_a_time(name, monkeypatch):
    usual = run(name)
    monkeypatch.setattr(plan, "_limits", plan.Limits(1, 1))
    parts = run(name)
    assert all(torch.equal(parts[key], usual[key]) for key in usual if "pos" not in key)
    assert_equal_but_for_rounding(parts, usual)


def test_runs_are_bit_equal():
    first, second = run("holes-L200"), run("holes-L200")
    assert all(torch.equal(first[name], second[name]) for name in first)


LENGTHS = [5, 130, 1, 0, 64, 0]


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}, {"mask": True}], ids=["plain", "dropout", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_sequences(dtype, options, monkeypatch):
    """Results equal those of the eager backend, which takes the sequences one by one."""
    options, total = dict(options), sum(LENGTHS)
    mask = (torch.arange(total) % 7 != 2) if options.pop("mask", False) else None
    ends = torch.tensor([0, *LENGTHS]).cumsum(0, dtype=torch.int32)
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(total, 2, 16, generator=random).to(dtype) for _ in range(3)]
    tensors += [torch.randn(2, 32, 16, generator=random).to(dtype) for _ in range(2)]

    def results(backend):
        torch.manual_seed(DROPOUT_SEED)
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        output, lse = disentangled_attention_varlen(
            *leaves, **TABLE, cu_seqlens=ends, max_seqlen=max(LENGTHS), attention_mask=mask, return_lse=True,
            backend=backend, **options,
        )  # fmt: skip
        grads = torch.autograd.grad(torch.cos(output.float()).sum() + lse.nan_to_num(neginf=0).sin().sum(), leaves)
        return [output, lse, *grads]

    tolerance = 2e-5 if dtype == torch.float32 else 5e-2
    for got, expected in zip(results("triton"), results("eager")):
        scale = expected.float().nan_to_num(neginf=0).abs().max().item() or 1.0
        torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=tolerance * scale)


def test_dropout_is_the_mask_of_keep_mask():
    """The values are the rows of an identity matrix, so the output shows every probability."""
    length, p = 64, 0.4
    query, key = torch.randn(2, 2, 3, length, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    value = torch.eye(length).expand_as(key)
    torch.manual_seed(DROPOUT_SEED)
    output = disentangled_attention(query, key, value, dropout_p=p, backend="triton")
    seed = torch.randint(0, 2**63 - 1, (1,), generator=torch.Generator().manual_seed(DROPOUT_SEED))
    heads = torch.arange(6).view(2, 3, 1, 1)
    keep = keep_mask(seed, heads, torch.arange(length)[:, None], (0, length), p)
    assert torch.equal(output != 0, keep)
    assert abs(keep.double().mean() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5


def test_what_is_not_finite_stays_in_its_row():
    """Padding tokens, which no valid token sees, are full of infinities."""
    inputs = make_inputs(quick("left-padding-L200"), torch.bfloat16)
    clean, _ = public("triton")(inputs)
    padded = ~inputs.mask[1, 0, 0]
    for name in ("query", "key"):
        getattr(inputs, name)[1][:, padded] = torch.inf
    output, _ = public("triton")(inputs)
    assert torch.equal(output[1][:, ~padded], clean[1][:, ~padded]) and torch.equal(output[0], clean[0])


def test_half_precision_survives_large_weights():
    inputs = make_inputs(Case("large", 70, 70, batch=1, heads=1), torch.float16)
    inputs = inputs._replace(query=inputs.query * 300, pos_key=inputs.pos_key * 60)
    exact = forward_and_gradients(reference.attention, as_dtype(inputs, torch.float32))
    got = forward_and_gradients(public("triton"), as_dtype(inputs, torch.float16))
    torch.testing.assert_close(got["output"].float(), exact["output"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("odd", [3, 5])
def test_rows_that_are_no_multiple_of_16_bytes_apart(odd):
    case = quick("ragged-L129-D64")

    def spread(inputs):
        wide = {name: torch.zeros(*getattr(inputs, name).shape[:-1], 64 + odd) for name in TENSORS}
        for name, x in wide.items():
            x[..., odd:] = getattr(inputs, name)
        return inputs._replace(**{name: x[..., odd:] for name, x in wide.items()})

    inputs = make_inputs(case, torch.float32)
    (one, _), (other, _) = (public("triton")(x) for x in (spread(inputs), inputs))
    assert torch.equal(one, other)


def test_compiles_without_graph_breaks():
    attend = lambda *tensors: disentangled_attention(*tensors, **TABLE, backend="triton")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 33, 47):
        tensors = [torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3)]
        tensors += [torch.randn(2, 32, 16, requires_grad=True) for _ in range(2)]
        one, other = (torch.autograd.grad(torch.cos(f(*tensors)).sum(), tensors) for f in (compiled, attend))
        assert all(torch.equal(x, y) for x, y in zip(one, other))


def test_benchmark_of_the_kernels(tmp_path, monkeypatch):
    from bench import device, triton_kernels

    def once(self, build, seconds):
        return {name: device.Taken(self.seconds(make(), queued=False), 1) for name, make in build.items()}

    monkeypatch.setattr(device.Device, "measure", once)
    sizes = ["--lengths", "16", "--tokens", "16", "--heads", "1", "--device", "cpu", "--out", str(tmp_path)]
    triton_kernels.main(["kernels", *sizes])
    rows = json.loads((tmp_path / "triton-kernels.json").read_text())["rows"]
    names = [row["kernel"] for row in rows]
    assert len(names) == 12 and "backward: backward_rows" in names and all("ms" in row for row in rows)


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_patched_model(name):
    """Hugging Face's model with padding, forward and backward."""
    pytest.importorskip("transformers")
    import hf_models

    model = hf_models.build(name, num_hidden_layers=1)
    inputs = hf_models.tokens("right")
    expected = hf_models.results(model, inputs)
    got = hf_models.results(deberta_fast.patch(model, backend="triton"), inputs)
    hf_models.assert_close(got, expected, 1e-4)


def test_what_does_not_fit_shrinks(monkeypatch):
    """Kernels pretend to need more shared memory than there is, until their tiles are small enough."""
    monkeypatch.setattr(configuration, "_chosen", {})
    run_launch = Launch.run

    def run_if_it_fits(launch, tensors, special):
        if launch.configured in ("forward", "backward_key"):
            size = launch.numbers["BLOCK_M"] * launch.numbers["BLOCK_N"]
            if size > 32 * 64:
                raise OutOfResources(size, 32 * 64, "shared memory")
        run_launch(launch, tensors, special)

    usual = run("L7-D8")
    monkeypatch.setattr(Launch, "run", run_if_it_fits)
    assert_equal_but_for_rounding(run("L7-D8"), usual)
    (shrunk,) = configuration._chosen.values()
    assert shrunk.forward == shrunk.backward_key == configuration.Tiles(64, 32, 4, 1)
    assert shrunk.backward_query == configuration.Tiles(64, 64, 4, 1)


def test_refuses_with_reasons():
    x = torch.randn(1, 1, 5, 20)
    with pytest.raises(RuntimeError, match="head size must be a multiple of 8 up to 256, got 20"):
        disentangled_attention(x, x, x, backend="triton")
    x = torch.randn(1, 1, 5, 16)
    with pytest.raises(RuntimeError, match="scale must be positive"):
        disentangled_attention(x, x, x, scale=-1.0, backend="triton")
    with pytest.raises(RuntimeError, match="dtype must be"):
        disentangled_attention(*[x.double()] * 3, backend="triton")


@pytest.mark.parametrize("mutate", [shifted_slot, swapped_tables, reversed_distance])
def test_a_wrong_table_is_caught(mutate):
    with pytest.raises(AssertionError, match="error"):
        compare(lambda inputs: public("triton")(mutate(inputs)), quick("ragged-L129-D64"), torch.float32, 1)


@pytest.mark.parametrize("mistake", [{"far_past": -16}, {"far_future": 16}], ids=["past", "future"])
def test_a_far_segment_one_block_too_long_is_caught(mistake, monkeypatch):
    mistake_far_distances(monkeypatch, **mistake)
    configured(monkeypatch, 16, 16, 16)
    with pytest.raises(AssertionError, match="error"):
        compare(public("triton"), quick(replace(FAR_L300, query_length=100, key_length=100)), torch.float32, 1)
