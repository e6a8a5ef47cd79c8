"""The Triton backend without a GPU: compiled for GPUs that are not there, its plans, its refusals."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from bench.compile_report import CAPABILITIES, SHARED_LIMIT, compile_all, launches, plan_launches  # noqa: E402
from deberta_fast import disentangled_attention  # noqa: E402
from deberta_fast.op import speed  # noqa: E402
from deberta_fast.op.backends.triton import configuration  # noqa: E402
from deberta_fast.op.backends.triton.configuration import Target, Tiles  # noqa: E402
from deberta_fast.op.backends.triton.plan import Launch, Part, Plan  # noqa: E402
from deberta_fast.op.call import Call  # noqa: E402
from deberta_fast.op.problems import COMMON  # noqa: E402

MAIN = ("band_scores", "forward", "backward_key", "backward_rows", "backward_query", "backward_by_distance")


@pytest.fixture(scope="module")
def compiled():
    """By label and capability."""
    return compile_all(launches, CAPABILITIES)


@pytest.fixture(scope="module")
def v3(compiled):
    """The head size and dtype of DeBERTa-v3 in half precision."""
    return {key: result for key, result in compiled.items() if key[0].startswith("64 bfloat16 ")}


def test_every_configuration_fits_its_gpu(compiled):
    shared = {key: result.shared for key, (result, _) in compiled.items()}
    assert len({capability for _, capability in shared}) == len(CAPABILITIES)
    assert {key: size for key, size in shared.items() if size > SHARED_LIMIT[key[1]]} == {}


def test_no_spills(compiled, v3):
    """None at all where it matters most, elsewhere none inside a loop."""
    assert {key: n for key, (x, _) in v3.items() if (n := x.spill_stores + x.spill_loads)} == {}
    assert {key: n for key, (x, _) in compiled.items() if (n := sum(loop.spills for loop in x.loops))} == {}


def test_no_gather_in_a_loop(compiled):
    """No look-up table, no element alone: what loops read comes in vectors."""
    narrow = {
        (key, loop.function): loop.narrow_loads
        for key, (result, _) in compiled.items()
        if key[0].endswith(MAIN)
        for loop in result.loops
        if loop.narrow_loads
    }
    assert narrow == {}


def loops_per_score(v3, kernel, capability):
    result, tile = v3[f"64 bfloat16 {kernel}", capability]
    return [loop.per_score(*tile, result.warps) for loop in result.loops]


def test_instructions_a_score(v3):
    """On sm_90. Both peers take 44 for every score, and their products with the tables besides."""
    near, near_end, far, far_end = loops_per_score(v3, "forward", 90)
    assert far <= 12 and near <= 14 and far_end <= 14 and near_end <= 16
    [band] = loops_per_score(v3, "band_scores", 90)
    assert near + 2 * band <= 26  # with the two position scores that it reads
    far, near = loops_per_score(v3, "backward_key", 90)
    assert far <= 16 and near <= 19
    far, far_end, near = loops_per_score(v3, "backward_query", 90)
    assert far <= 10 and near <= 7
    assert loops_per_score(v3, "backward_rows", 90)[0] <= 7
    assert loops_per_score(v3, "backward_by_distance", 90)[0] <= 9


def test_far_tiles_use_no_band(v3):
    """They cost what plain attention costs: two products, K and V, nothing else."""
    for capability in (80, 90):
        near, _, far, _ = v3["64 bfloat16 forward", capability][0].loops
        assert 2 * far.mma == near.mma and 2 * far.async_copies == near.async_copies


OPTIONS = {
    "keys": dict(mask="keys"),
    "pairs": dict(mask="pairs"),
    "packed": dict(packed=True),
    "dropout": dict(dropout_p=0.1),
    "c2p": dict(p2c=False),
    "p2c": dict(c2p=False),
    "neither": dict(c2p=False, p2c=False),
    "head-size-80": dict(size=80),
    "float16": dict(dtype=torch.float16),
    "short": dict(length=100),
}


def variants(capability):
    costly = ("pairs", "dropout", "float16")  # of shared memory
    for name, options in OPTIONS.items():
        if capability == 86 and name not in costly:
            continue
        given = dict(size=64, dtype=torch.bfloat16) | options
        yield from plan_launches(name, capability, given.pop("size"), given.pop("dtype"), **given)


def test_every_option_compiles():
    """Masks, packing, dropout, absent tables: on sm_90, and what takes room on a GPU with little shared memory."""
    compiled = compile_all(variants, (86, 90))
    assert {label.split()[0] for label, capability in compiled if capability == 90} == set(OPTIONS)
    assert {key: x.shared for key, (x, _) in compiled.items() if x.shared > SHARED_LIMIT[key[1]]} == {}


def test_lengths_and_strides_compile_nothing_anew():
    """No integer of a launch is made a constant of the compiled kernel, nor is its divisibility."""
    planned = [p for options in ({}, {"mask": "keys"}, {"packed": True}) for p in plan_launches(
        "x", 90, 64, torch.bfloat16, **options)]  # fmt: skip
    for _, launch, _ in planned:
        for parameter in launch.kernel.params:
            value = launch.arguments[parameter.name]
            if isinstance(value, int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, (launch.kernel.__name__, parameter.name)


def test_constants_do_not_depend_on_the_length():
    """Three classes of length at most."""

    def constants(length):
        return {
            (launch.kernel.__name__, name, launch.arguments[name])
            for _, launch, _ in plan_launches("x", 90, 64, torch.bfloat16, length=length)
            for name in (p.name for p in launch.kernel.params if p.is_constexpr)
        }

    assert constants(7) == constants(127) and constants(128) == constants(255)
    assert constants(256) == constants(513) == constants(20000)


def test_parts_are_launched_as_compiled_for_the_first():
    """Triton looks up what it compiled once for each kernel of a part; grids have three numbers then."""

    class Kernel:
        def __init__(self):
            self.looked_up, self.launched = [], []

        def __getitem__(self, grid):
            def first(**arguments):
                self.looked_up.append((grid, arguments))
                return compiled

            return first

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: kernel.launched.append((grid, arguments))

    kernel, compiled = Kernel(), Compiled()
    first = Launch(kernel, (3, 2), {"x": "tensor", "first_head": 0, "first_batch": 0, "N": 64}, 4, 2, None, [])
    for part in (Part(0, 2, 0, 5), Part(2, 2, 0, 5), Part(4, 2, 0, 5)):
        first.of(part).run()
    first._replace(grid=(0, 2)).run()
    expected = {"x": "tensor", "first_head": 0, "first_batch": 0, "N": 64, "num_warps": 4, "num_stages": 2}
    assert kernel.looked_up == [((3, 2), expected)]
    assert kernel.launched == [((3, 2, 1), ("tensor", head, 0, 64)) for head in (2, 4)]


@pytest.fixture
def made(monkeypatch):
    """The bytes that a plan of meta tensors allocates."""
    sizes = {}

    def counting(allocate):
        def call(self, *arguments, **options):
            x = allocate(self, *arguments, **options)
            sizes[id(x)] = x, x.numel() * x.element_size()
            return x

        return call

    for name in ("new_empty", "new_zeros"):
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))

    def count(inputs):
        """Counts all besides results of forward, then of backward, and the launches."""
        output, lse = torch.empty_like(inputs.query), torch.empty(inputs.query.shape[:3], device="meta")
        grads = [torch.empty_like(x) for x in inputs[:5]]
        chosen = configuration.default(Target(90, 64, inputs.query.element_size()))
        for planned in (
            Plan(inputs, chosen, "ieee").forward(output, lse),
            Plan(inputs, chosen, "ieee").backward(output, lse, output, lse, grads),
        ):
            sizes.clear()
            count_of_launches = len(list(planned))
            yield sum(size for _, size in sizes.values()), count_of_launches

    return count


@pytest.mark.parametrize("length", [128, 512, 2048, 16384])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_workspace_is_bounded(length, packed, made):
    """Forward and backward of 16384 tokens, 12 heads of 64: all that is allocated besides results, at most 256 MiB."""
    batch, tokens = (1, 16384) if packed else (16384 // length, length)
    meta = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    query, key, value = (meta(batch, 12, tokens, 64) for _ in range(3))
    ends = meta(16384 // length + 1, dtype=torch.int32) if packed else None
    inputs = Call(
        query, key, value, meta(12, 512, 64), meta(12, 512, 64), None, ends, None,
        256, 512, "hf", 0, 0, length, 0.07, 0.0,
    )  # fmt: skip
    for size, count_of_launches in made(inputs):
        assert 16 << 20 < size <= 256 << 20 and count_of_launches >= 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", speed.SHAPES)
def test_timing_of_the_check_takes_little_memory(shape, dtype, made):
    """Inputs, results and workspace of what a process times before it chooses: at most 300 MB."""
    for kind in COMMON[0], COMMON[4]:
        call = speed.timed_call(shape, kind, dtype, 64, torch.device("meta"))
        tensors = sum(x.numel() * x.element_size() for x in call[:8] if x is not None)
        results = 2 * tensors  # output, the five gradients and log-sum-exps
        assert all(tensors + results + size <= 300e6 for size, _ in made(call))


def test_smaller_until_nothing_is_left():
    chosen, sizes = configuration.default(Target(90, 64, 2)), []
    while chosen is not None:
        tiles = chosen.backward_key
        sizes.append((tiles.rows + tiles.columns) * tiles.stages)
        assert min(tiles.rows, tiles.columns) >= 16
        assert chosen.alignment % tiles.rows == chosen.alignment % tiles.columns == 0
        chosen = chosen.smaller("backward_key")
    assert len(sizes) > 3 and sizes == sorted(sizes, reverse=True)


def test_a_configuration_that_was_set_is_chosen():
    target = Target(90, 64, 2)
    usual = configuration.choose(target)
    other = usual._replace(forward=Tiles(128, 64, 8, 3), alignment=128)
    configuration.set_configuration(target, other)
    assert configuration.choose(target) == other and configuration.choose(Target(90, 128, 2)) != other
    configuration.set_configuration(target, None)
    assert configuration.choose(target) == usual == configuration.default(target)


def test_named_without_a_gpu_it_says_why():
    x = torch.randn(1, 1, 5, 16)
    with pytest.raises(
        RuntimeError,
        match="backend 'triton' cannot serve this call: tensors must be on an NVIDIA, AMD or Intel GPU, got cpu",
    ):
        disentangled_attention(x, x, x, backend="triton")
