"""How a call reaches its backend: directly in eager mode, through the operators where a program is traced."""

import weakref

import pytest
import torch
from cases import BY_NAME, Case, make_inputs
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deberta_fast import backends, disentangled_attention, disentangled_attention_varlen
from deberta_fast.op import relative_position, schema
from deberta_fast.op.call import Call
from deberta_fast.op.relative_position import device_tables

TABLE = dict(position_buckets=16, max_relative_positions=32)
BACKENDS = [
    name
    for name in ("cpu", "eager")
    if not backends.BACKENDS[name].why_not(make_inputs(BY_NAME["L7-D8"], torch.float32))
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


class Operators(TorchDispatchMode):
    """Records the operators of this package that torch sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "deberta_fast":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def tensors(length=9, device="cpu", requires_grad=False):
    normal = lambda *shape: torch.randn(shape, device=device, requires_grad=requires_grad)
    return [*(normal(1, 2, length, 16) for _ in range(3)), *(normal(2, 32, 16) for _ in range(2))]


@pytest.fixture
def traced(monkeypatch):
    """The recorded answers to whether torch has to see an operator."""
    seen, is_traced = [], schema._is_traced
    monkeypatch.setattr(schema, "_is_traced", lambda tensors: seen.append(is_traced(tensors)) or seen[-1])
    return seen


@each_backend
def test_eager_calls_go_to_the_backend_directly(backend, traced):
    leaves = tensors(requires_grad=True)
    disentangled_attention(*leaves, **TABLE, backend=backend).sum().backward()
    with torch.inference_mode():
        disentangled_attention(*leaves, **TABLE, backend=backend)
    disentangled_attention(*map(torch.nn.Parameter, leaves), **TABLE, backend=backend)
    assert len(traced) == 4 and not any(traced)


@each_backend
def test_a_dispatch_mode_sees_the_operators(backend):
    leaves = tensors(requires_grad=True)
    expected = disentangled_attention(*leaves, **TABLE, backend=backend)
    wanted = torch.autograd.grad(expected.sum(), leaves)
    with Operators() as mode:
        output = disentangled_attention(*leaves, **TABLE, backend=backend)
        grads = torch.autograd.grad(output.sum(), leaves)
    assert mode.names == ["attention_forward", "attention_backward"]
    assert torch.equal(output, expected) and all(map(torch.equal, grads, wanted))
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = [x[0].transpose(0, 1).detach() for x in leaves[:3]]
    with Operators() as mode:
        disentangled_attention_varlen(*packed, cu_seqlens=ends, max_seqlen=5, backend=backend)
    assert mode.names == ["checked_cu_seqlens", "attention_forward"]


class Subclass(torch.Tensor):
    """Records the torch functions that are applied to it."""

    asked: list = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.asked.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_tensors_that_are_more_than_tensors_go_to_the_operators():
    query, *others = tensors()
    expected = disentangled_attention(query, *others, **TABLE)
    output = disentangled_attention(query.as_subclass(Subclass), *others, **TABLE)
    assert type(output) is Subclass and torch.equal(output.as_subclass(torch.Tensor), expected)
    assert any("attention_forward" in name for name in Subclass.asked)
    assert not any("fused" in name for name in Subclass.asked)
    on_meta = disentangled_attention(*tensors(device="meta"), **TABLE)
    assert on_meta.is_meta and on_meta.shape == (1, 2, 9, 16)


def test_fake_tensors_leave_no_trace():
    """The cached device tables, which later real calls read, contain no fake tensors."""
    relative_position._on_devices.clear()
    with FakeTensorMode():
        for backend in ("eager", "reference"):
            assert disentangled_attention(*tensors(), **TABLE, backend=backend).shape == (1, 2, 9, 16)
    assert not relative_position._on_devices
    disentangled_attention(*tensors(), **TABLE, backend="eager")
    assert all(type(x) is torch.Tensor for kept in relative_position._on_devices.values() for x in kept[:2])


# Results that are not requested are not computed


@each_backend
@pytest.mark.parametrize("wanted", range(5), ids=Call._fields[:5])
def test_the_gradient_of_one_tensor(wanted, backend, monkeypatch):
    """It is the same as when all gradients are requested. Tables' gradients are allocated only if requested."""
    made, new_gradients = [], Call.new_gradients
    monkeypatch.setattr(Call, "new_gradients", lambda *args: made.append(new_gradients(*args)) or made[-1])
    leaves = tensors(length=60, requires_grad=True)
    every = torch.autograd.grad(disentangled_attention(*leaves, **TABLE, backend=backend).square().sum(), leaves)
    one = [x.detach().requires_grad_(index == wanted) for index, x in enumerate(leaves)]
    output = disentangled_attention(*one, **TABLE, backend=backend)
    [alone] = torch.autograd.grad(output.square().sum(), [one[wanted]])
    assert torch.equal(alone, every[wanted])
    assert [x is not None for x in made[0]] == [True] * 5
    assert [x is not None for x in made[1]] == [True] * 3 + [wanted == 3, wanted == 4]


@each_backend
def test_cotangents_that_nobody_gave_take_one_element(backend, monkeypatch):
    given, backward = [], backends.BACKENDS[backend].backward
    module = backends.BACKENDS[backend]
    monkeypatch.setattr(module, "backward", lambda *args: given.append(args[3:5]) or backward(*args))
    leaves = tensors(length=60, requires_grad=True)
    output, lse = disentangled_attention(*leaves, **TABLE, backend=backend, return_lse=True)
    zeros = torch.zeros_like(lse)
    both = torch.autograd.grad([output, lse], leaves, [torch.ones_like(output), zeros], retain_graph=True)
    first = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(lse.sum(), leaves, retain_graph=True)
    lone = torch.autograd.grad([output, lse], leaves, [torch.zeros_like(output), torch.ones_like(lse)])
    assert all(map(torch.equal, first, both)) and all(map(torch.equal, second, lone))
    made_up = [x for x in (given[1][1], given[2][0]) if x is not None]
    assert len(made_up) == 1 + (backend != "cpu") and all(x.untyped_storage().nbytes() == 4 for x in made_up)


@each_backend
def test_the_log_sum_exp_is_made_where_it_is_wanted(backend, monkeypatch):
    made, new_lse = [], Call.new_lse
    monkeypatch.setattr(Call, "new_lse", lambda call: made.append(1) or new_lse(call))
    leaves = tensors(length=60)
    alone = disentangled_attention(*leaves, **TABLE, backend=backend)
    assert not made
    output, lse = disentangled_attention(*leaves, **TABLE, backend=backend, return_lse=True)
    assert made and torch.equal(alone, output) and lse.shape == (1, 2, 60)


def test_hooks_on_saved_tensors_see_all_of_them():
    """Checkpointing and offloading rely on these hooks, so no tensor may be saved without them."""
    packed = []
    leaves = tensors(requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x):
        output = disentangled_attention(*leaves, **TABLE, dropout_p=0.1)
    saved = [*(x.shape for x in leaves), (1,), output.shape, output.shape[:-1]]
    assert sorted(map(tuple, packed)) == sorted(map(tuple, saved))
    query = leaves[0] * 1
    alive = weakref.ref(query)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(force=True), torch.from_numpy):
        output = disentangled_attention(query, *leaves[1:], **TABLE)
    del query
    assert alive() is None and output.requires_grad


# Geometry


def test_device_tables_say_what_the_slot_table_says():
    for numbering in ((16, 32, "hf"), (16, 32, "ms"), (-1, 5, "hf"), (256, 512, "hf")):
        table = relative_position.slot_table(*numbering)
        slots, first = device_tables(*numbering, torch.device("cpu"))[:2]
        assert slots.tolist() == list(table.slots) and len(first) == table.rows + 1
        for row in range(table.rows):
            inside = range(max(first[row], -table.reach), min(first[row + 1], table.reach + 1))
            assert [d for d in range(-table.reach, table.reach + 1) if table.slot(d) == row] == list(inside)


def test_device_tables_are_made_once():
    first, again = (device_tables(16, 32, "hf", torch.device("cpu")) for _ in range(2))
    assert first is again
    with torch.inference_mode():
        assert not device_tables(18, 40, "hf", torch.device("cpu")).slots.is_inference()


def test_a_cold_capture_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="make one call like it before the capture"):
        device_tables(20, 44, "hf", torch.device("cuda", 0))


@pytest.mark.parametrize(
    "case", [Case("", 70, 70), Case("", 5, 300, offset=100), Case("", 40, 40, window=True)], ids=str
)
def test_far_rows_are_what_far_keys_read(case):
    call = make_inputs(case, torch.float32)
    table = call.table
    assert call.past_row == table.slot(10**6) - call.first_slot
    assert call.future_row == table.slot(-(10**6)) - call.first_slot
