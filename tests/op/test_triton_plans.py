"""Plans of the Triton backend are kept, and their kernels launched directly: exactly for the calls that they fit."""

import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")

from bench import triton_host  # noqa: E402
from deberta_fast.op.backends.triton import configuration, launch, plan  # noqa: E402
from deberta_fast.op.backends.triton.configuration import Target, Tiles  # noqa: E402
from deberta_fast.op.call import Call  # noqa: E402

B, H, L, D, ROWS = 2, 2, 40, 16, 64
CONFIGURATION = configuration.default(Target(90, D, 2))


def empty(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.empty(shape, dtype=dtype, device=device)


def new_call(dtype=torch.bfloat16, device="cpu", **changes):
    given = dict(dtype=dtype, device=device)
    heads, tables = [empty(B, H, L, D, **given) for _ in range(3)], [empty(H, ROWS, D, **given) for _ in range(2)]
    base = Call(*heads, *tables, None, None, None, 32, 64, "hf", 0, 0, L, 0.1, 0.0)
    return base._replace(**changes)


def plan_for(call, backward=False, configured=CONFIGURATION, precision="ieee", results=None):
    output, lse = call.new_output(), call.new_lse()
    grads = [output, lse, *(torch.empty_like(x) for x in call[:5] if x is not None)] if backward else []
    given = plan.given_tensors(call, *(results or (output, lse, *grads)))
    return plan.plan_of(call, given, plan.settings(configured, precision))


OTHERS = {
    "query's rows": dict(query=empty(B, H, L + 1, D)),
    "query's strides": dict(query=empty(B, L, H, D).transpose(1, 2)),
    "key's strides": dict(key=empty(B, L, H, D).transpose(1, 2)),
    "value's strides": dict(value=empty(B, H, L, 2 * D)[..., :D]),
    "a table's strides": dict(pos_key=empty(ROWS, H, D).transpose(0, 1)),
    "no pos_key": dict(pos_key=None),
    "no pos_query": dict(pos_query=None),
    "padding mask": dict(mask=empty(B, 1, 1, L, dtype=torch.bool)),
    "pairwise mask": dict(mask=empty(B, 1, L, L, dtype=torch.bool)),
    "packed": dict(query=empty(1, H, L, D), cu_seqlens=empty(3, dtype=torch.int32)),
    "seed": dict(seed=empty(1, dtype=torch.int64), dropout_p=0.5),
    "seed with an origin": dict(seed=empty(5, dtype=torch.int64), dropout_p=0.5),
    "dropout_p": dict(seed=empty(1, dtype=torch.int64), dropout_p=0.25),
    "position_buckets": dict(position_buckets=16),
    "max_relative_positions": dict(max_relative_positions=128),
    "far_negative": dict(far_negative="ms"),
    "first_slot": dict(first_slot=1),
    "query_offset": dict(query_offset=3),
    "max_seqlen": dict(max_seqlen=L + 1),
    "scale": dict(scale=0.2),
    "dtype": dict(dtype=torch.float16),
    "device": dict(device="meta"),
}


def test_a_plan_serves_the_calls_of_its_forms_only():
    """Every other argument has a plan of its own, which a later call finds again."""
    made = {"usual": plan_for(new_call()), "backward": plan_for(new_call(), backward=True)}
    made |= {name: plan_for(new_call(**changes)) for name, changes in OTHERS.items()}
    call = new_call()
    usual = call.new_output(), call.new_lse()
    made["output's strides"] = plan_for(call, results=(empty(B, H, L, D), usual[1]))
    made["lse's strides"] = plan_for(call, results=(usual[0], empty(B, H, 2 * L, dtype=torch.float32)[..., :L]))
    made["precision"] = plan_for(call, precision="tf32")
    made["tiles"] = plan_for(call, configured=CONFIGURATION._replace(forward=Tiles(32, 32, 4, 1)))
    assert len(set(map(id, made.values()))) == len(made) and made["precision"].values["PRECISION"] == "tf32"
    assert plan_for(new_call()) is made["usual"] and plan_for(new_call(), backward=True) is made["backward"]
    assert all(plan_for(new_call(**changes)) is made[name] for name, changes in OTHERS.items())


@pytest.mark.parametrize("name", ["_limits", "SHARES", "step_of"])
def test_settings_of_the_module_are_compared(name, monkeypatch):
    usual = plan_for(new_call())
    others = {"_limits": plan.Limits(1, 1), "SHARES": 4, "step_of": lambda length: 8}
    monkeypatch.setattr(plan, name, others[name])
    assert plan_for(new_call()) is not usual


def test_plans_are_few_and_keep_no_tensor():
    call = new_call(mask=empty(B, 1, 1, L, dtype=torch.bool))
    given = plan.given_tensors(call, call.new_output(), call.new_lse())
    planned = plan.plan_of(call, given, plan.settings(CONFIGURATION, "ieee"))
    tensors = planned.tensors(given)
    held = [weakref.ref(x) for x in tensors if x is not None and x is not given[8] and x is not given[9]]
    assert len(held) >= 10
    del call, given, tensors
    gc.collect()
    assert not any(reference() is not None for reference in held)
    assert plan.kept_plan.cache_info().maxsize == plan.KEPT


class Kernel:
    """Stands in for Triton's: counts what is looked up, and what is launched without."""

    arg_names = ("query", "key", "first_head", "first_batch", "N")

    def __init__(self):
        self.looked_up, self.launched = [], []

    def __getitem__(self, grid):
        def first(**arguments):
            self.looked_up.append((grid, arguments))
            return Compiled(self)

        return first


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((self, grid, arguments))


def test_a_kernel_is_looked_up_once():
    """Other calls, and launches for other parts, launch what was found for the first; grids have three numbers."""
    kernel, numbers = Kernel(), {"first_head": 0, "first_batch": 0, "N": 64, "unused": 1}
    first = launch.new_launch(kernel, (3, 2, 1), numbers, Tiles(0, 0, 4, 2), None)
    tensors = [empty(8), empty(8)]
    special = launch.specialisation(tensors)
    for part in (plan.Part(0, 2, 0, 5), plan.Part(2, 2, 0, 5), plan.Part(4, 2, 0, 5)):
        plan._for_part(first, part).run(tensors, special)
    others = [empty(8), empty(8)]
    first.run(others, launch.specialisation(others))
    [(grid, arguments)] = kernel.looked_up
    expected = dict(query=tensors[0], key=tensors[1], first_head=0, first_batch=0, N=64, num_warps=4, num_stages=2)
    assert grid == (3, 2, 1) and arguments == expected
    expected = [(*tensors, 2), (*tensors, 4), (*others, 0)]
    assert [(x[1], x[2]) for x in kernel.launched] == [((3, 2, 1), (*head, 0, 64)) for head in expected]


def test_alignment_is_compared(monkeypatch):
    """Triton compiles a kernel for pointers at multiples of 16 bytes, on AMD also for storage below 2 GiB."""
    kernel, numbers = Kernel(), {"first_head": 0, "first_batch": 0, "N": 64}
    made = launch.new_launch(kernel, (1, 1, 1), numbers, Tiles(0, 0, 4, 2), None)
    aligned, odd = empty(16), empty(16)[1:]
    run = lambda *tensors: made.run(tensors, launch.specialisation(tensors))
    for looked_up, tensors in enumerate([(aligned, aligned), (aligned, odd), (odd, aligned), (odd, odd)], 1):
        for _ in range(2):
            run(*tensors)
            assert len(kernel.looked_up) == looked_up
    assert len({compiled for compiled, *_ in kernel.launched}) == 4
    small, large = empty(8, device="meta"), empty(2**30, device="meta")
    assert launch.specialisation([small]) == launch.specialisation([large])
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert launch.specialisation([small]) != launch.specialisation([large])


def test_a_launch_without_programs_is_left_out():
    call = new_call(**{name: empty(0, H, L, D) for name in ("query", "key", "value")})
    assert [x.kernel.__name__ for x in plan_for(call).launches] == ["prepare"]
    assert [x.kernel.__name__ for x in plan_for(call, backward=True).launches] == ["prepare", "backward_by_row"]
    assert plan_for(new_call(pos_key=None, pos_query=None)).launches[0].kernel.__name__ == "forward"


def test_benchmark_of_the_host():
    found = triton_host.rows(1, 2, 8)
    assert [(row["pass"], row["launches"]) for row in found] == [("forward", 3), ("backward", 7)]
    assert all(0 < row["us"] < row["first us"] for row in found)
