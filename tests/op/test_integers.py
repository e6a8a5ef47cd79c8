"""Integers that describe a call: cu_seqlens, max_seqlen, query_offset and the numbering of the tables. They are exact
at any size, and an argument that is not an integer is refused by name."""

import numpy
import pytest
import torch
from cases import ON_CPU, Case, make_inputs

import deberta_fast
from deberta_fast import disentangled_attention, disentangled_attention_varlen
from deberta_fast.op import call as calls
from deberta_fast.op.backends import cpu
from deberta_fast.op.relative_position import slot_table
from deberta_fast.op.schema import checked_cu_seqlens

TABLE = dict(position_buckets=16, max_relative_positions=32)
INT32 = 2**31 - 1
each_backend = pytest.mark.parametrize("backend", ON_CPU)


def packed(tokens=31, heads=2, size=16):
    random = torch.Generator().manual_seed(0)
    heads_of = [torch.randn(tokens, heads, size, generator=random).requires_grad_() for _ in range(3)]
    return [*heads_of, *(torch.randn(heads, 32, size, generator=random).requires_grad_() for _ in range(2))]


def wrapping(step: int, total: int) -> torch.Tensor:
    """Returns ends that wrap around 32 bits once: in 32 bits, their differences and the last end are right."""
    ends = numpy.append(numpy.arange(0, 2**32, step, dtype=numpy.int64), 2**32 + total) % 2**32
    return torch.from_numpy(ends.astype(numpy.uint32).view(numpy.int32).copy())


# cu_seqlens

WRONG = {
    "wrapping": wrapping(10**6, 31),
    "wrapping-once": torch.tensor([0, INT32, -INT32, 31], dtype=torch.int32),
    "falling": torch.tensor([0, 20, 10, 31], dtype=torch.int32),
    "beyond": torch.tensor([0, 40, 31], dtype=torch.int32),
    "negative": torch.tensor([0, -5, 31], dtype=torch.int32),
    "late": torch.tensor([1, 31], dtype=torch.int32),
    "short": torch.tensor([0, 30], dtype=torch.int32),
    "too-long": torch.tensor([0, 21, 31], dtype=torch.int32),
}
RIGHT = torch.tensor([0, 11, 11, 31], dtype=torch.int32)


@each_backend
@pytest.mark.parametrize("name", WRONG)
def test_wrong_ends_are_refused(name, backend):
    longest = 20 if name == "too-long" else INT32
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 31 in steps of 0 to max_seqlen="):
        disentangled_attention_varlen(*packed(), **TABLE, cu_seqlens=WRONG[name], max_seqlen=longest, backend=backend)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ends_are_found_on_a_device(name):
    """A device-side assertion evaluates the arithmetic that is tested here."""
    longest = 20 if name == "too-long" else INT32
    assert not calls._rises(WRONG[name], 31, longest) and calls._rises(RIGHT, 31, longest)


@pytest.mark.parametrize("name", [name for name in WRONG if name != "too-long"])
@pytest.mark.skipif(cpu.NOT_LOADED is not None, reason=str(cpu.NOT_LOADED))
def test_a_broken_promise_reads_no_memory(name):
    """The kernels do not need max_seqlen, but they check the ends, which say where the rows are."""
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to 31"):
        disentangled_attention_varlen(
            *packed(), **TABLE, cu_seqlens=WRONG[name], max_seqlen=INT32, check_values=False, backend="cpu"
        )


@each_backend
@pytest.mark.parametrize("written", [[0, 11, 11, 2**30], [0, 3, 9, 31], [5, 4, 3, 2]])
def test_backward_sees_what_forward_saw(written, backend):
    """torch does not notice writes by NumPy."""

    def gradients(write):
        leaves, ends = packed(), RIGHT.clone()
        output = disentangled_attention_varlen(*leaves, **TABLE, cu_seqlens=ends, max_seqlen=20, backend=backend)
        if write:
            ends.numpy()[:] = written
        return torch.autograd.grad(output.square().sum(), leaves)

    assert all(map(torch.equal, gradients(True), gradients(False)))


@pytest.mark.skipif(cpu.NOT_LOADED is not None, reason=str(cpu.NOT_LOADED))
def test_backward_looks_at_unchecked_ends_again():
    leaves, ends = packed(), RIGHT.clone()
    output = disentangled_attention_varlen(
        *leaves, **TABLE, cu_seqlens=ends, max_seqlen=20, check_values=False, backend="cpu"
    )
    ends.numpy()[1] = 2**30
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to 31"):
        output.sum().backward()


def test_checked_ends_are_a_copy():
    checked = checked_cu_seqlens(RIGHT, 31, 20)
    assert torch.equal(checked, RIGHT) and checked.data_ptr() != RIGHT.data_ptr()


def test_packed_models_keep_a_copy():
    config = deberta_fast.DebertaV2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = deberta_fast.DebertaV2Model(config), torch.arange(31)

    def gradient(write):
        ends = RIGHT.clone()
        output = model.forward_packed(ids, cu_seqlens=ends, max_seqlen=20)[0]
        if write:
            ends.numpy()[1:3] = 25
        return torch.autograd.grad(output.square().sum(), list(model.parameters()), allow_unused=True)

    assert all(x is y is None or torch.equal(x, y) for x, y in zip(gradient(True), gradient(False), strict=True))


# Arguments that are not integers


@each_backend
@pytest.mark.parametrize("wrong", [3.0, 3.5, "3", None, torch.tensor(3.5), torch.tensor([3, 4])], ids=repr)
@pytest.mark.parametrize(
    "name", ["query_offset", "first_slot", "position_buckets", "max_relative_positions", "max_seqlen"]
)
def test_no_integer(name, wrong, backend):
    options = dict(TABLE, cu_seqlens=RIGHT, max_seqlen=20, backend=backend) | {name: wrong}
    with pytest.raises(TypeError, match=f"^{name} must be an integer, got "):
        disentangled_attention_varlen(*packed(), **options)


@pytest.mark.parametrize("name", ["scale", "dropout_p"])
def test_no_number(name):
    with pytest.raises(TypeError, match=f"^{name} must be a number, got '0.5'"):
        disentangled_attention_varlen(*packed(), **TABLE, cu_seqlens=RIGHT, max_seqlen=20, **{name: "0.5"})


@each_backend
def test_other_kinds_of_integers(backend):
    options = dict(TABLE, query_offset=3, first_slot=0, max_seqlen=20)
    kinds = int, numpy.int32, numpy.int64, torch.tensor
    outputs = [
        disentangled_attention_varlen(
            *packed(), cu_seqlens=RIGHT, backend=backend, **{name: kind(x) for name, x in options.items()}
        )
        for kind in kinds
    ]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@each_backend
@pytest.mark.parametrize("longest", [2**31, 2**63, 10**30])
def test_a_longest_sequence_that_cannot_be(longest, backend):
    with pytest.raises(ValueError, match=f"^max_seqlen must be at most {INT32}, got {longest}$"):
        disentangled_attention_varlen(*packed(), **TABLE, cu_seqlens=RIGHT, max_seqlen=longest, backend=backend)


@each_backend
def test_the_longest_that_can_be(backend):
    outputs = [
        disentangled_attention_varlen(*packed(), **TABLE, cu_seqlens=RIGHT, max_seqlen=longest, backend=backend)
        for longest in (20, INT32)
    ]
    assert torch.equal(*outputs)


# Offsets


FAR = [2**27, 2**27 + 1, 2**31 - 1, 2**31, 2**62, 2**63 - 108, 2**63 - 8, 2**63 - 1, 2**63, 2**63 + 300, 10**30]


@each_backend
@pytest.mark.parametrize("sign", [1, -1], ids=["past", "future"])
@pytest.mark.parametrize("shape", [(16, 16), (40, 200), (200, 40)], ids=str)
def test_far_offsets_read_the_outermost_rows(shape, sign, backend):
    leaves = [x.requires_grad_() for x in make_inputs(Case("", *shape, size=16), torch.float32)[:5]]

    def results(offset):
        output = disentangled_attention(*leaves, **TABLE, query_offset=sign * offset, backend=backend)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    expected = results(1000)
    for offset in FAR:
        for got, wanted in zip(results(offset), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, msg=str(offset))


@pytest.mark.parametrize("numbering", [(16, 32, "hf"), (256, 512, "hf"), (-1, 40, "hf"), (3, 40, "ms"), (5, 40, "hf")])
@pytest.mark.parametrize("lengths", [(1, 1), (7, 300), (300, 7)], ids=str)
def test_a_near_offset_stands_for_a_far_one(numbering, lengths):
    table, given = slot_table(*numbering), object()
    for offset in (2**27 + 1, 10**30):
        for sign, row in ((1, table.slots[-1]), (-1, table.slots[0])):
            near = calls._near_offset(sign * offset, given, None, numbering, lengths)
            assert table.window(*lengths, near) == (row, row + 1) and abs(near) < 2**27
    assert calls._near_offset(10**30, None, None, numbering, lengths) == 0


@pytest.mark.skipif(cpu.NOT_LOADED is not None, reason=str(cpu.NOT_LOADED))
@pytest.mark.parametrize("offset", [2**63 - 1, -(2**63)])
def test_kernels_bear_any_offset(offset):
    """They do so even if no public function has replaced the offset by a near one."""
    inputs = make_inputs(Case("", 16, 200, size=16), torch.float32)
    sign = 1 if offset > 0 else -1

    def results(call):
        output, lse = deberta_fast.backends.forward(call, "cpu")
        return [output, lse, *deberta_fast.backends.backward(call, "cpu", output, lse, output, lse)]

    far, near = (results(inputs._replace(query_offset=x)) for x in (offset, sign * 1000))
    assert all(map(torch.equal, far, near))


def test_compiled_offsets_may_change():
    leaves = make_inputs(Case("", 16, 16, size=16), torch.float32)[:5]
    function = lambda offset: disentangled_attention(*leaves, **TABLE, query_offset=offset)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for offset in (0, 3, -20, 100, 2**40):
        torch.testing.assert_close(compiled(offset), function(offset))
