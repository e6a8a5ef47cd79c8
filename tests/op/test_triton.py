"""The Triton backend without a GPU: kernels compiled for absent GPUs, its plans, its refusals."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from bench.compile_report import CAPABILITIES, SHARED_LIMIT, compile_all, launches, plan_launches  # noqa: E402
from deberta_fast import disentangled_attention  # noqa: E402
from deberta_fast.op import speed  # noqa: E402
from deberta_fast.op.backends.triton import configuration, plan  # noqa: E402
from deberta_fast.op.backends.triton.configuration import Target, Tiles  # noqa: E402
from deberta_fast.op.call import Call  # noqa: E402
from deberta_fast.op.problems import COMMON  # noqa: E402

MAIN = ("band_scores", "forward", "backward_key", "backward_rows", "backward_query", "backward_by_distance")


@pytest.fixture(scope="module")
def compiled():
    """The compiled kernels by label and capability."""
    return compile_all(launches, CAPABILITIES)


def test_every_configuration_fits_its_gpu(compiled):
    shared = {key: result.shared for key, result in compiled.items()}
    assert len({capability for _, capability in shared}) == len(CAPABILITIES)
    assert {key: size for key, size in shared.items() if size > SHARED_LIMIT[key[1]]} == {}


# Loads and stores of spilled registers in each kernel that has some, by capability, with Triton 3.6. All are outside of
# innermost loops, except one of "32 bfloat16 backward_by_distance".
SPILLS = {
    "128 bfloat16 forward": {80: 114, 86: 114, 90: 112, 100: 26, 120: 106},
    "128 bfloat16 backward_prepare": {100: 2, 120: 2},
    "128 bfloat16 backward_key": {80: 22, 90: 188},
    "128 bfloat16 backward_query": {90: 62, 100: 9},
    "256 bfloat16 forward": {80: 57, 90: 243},
    "32 bfloat16 backward_by_distance": {100: 2},
    "64 float32 tf32 backward_key": {80: 6, 86: 6, 120: 4},
    "64 float32 ieee backward_key": {86: 15, 120: 9},
    "64 float32 ieee backward_query": {90: 4, 100: 2},
    "128 float32 tf32 backward_key": {120: 6},
    "256 float32 tf32 forward": {80: 41},
}


def test_no_spills(compiled):
    """Nothing spills with the head size and dtype of DeBERTa-v3; other kernels spill no more than was measured."""
    spills = {key: x.spill_stores + x.spill_loads for key, x in compiled.items()}
    allowed = {(label, capability): n for label, counts in SPILLS.items() for capability, n in counts.items()}
    assert {key: n for key, n in spills.items() if n > allowed.get(key, 0)} == {}
    assert not any(label.startswith("64 bfloat16 ") for label in SPILLS)


# Global loads of one or two bytes in bfloat16 by kernel and head size, on sm_100 and on others; all outside of loops.
# A gather of single elements adds one for each score of a thread, 16 or more.
NARROW_LOADS = {
    "forward": {32: (40, 16), 64: (40, 24), 128: (72, 40), 256: (2, 2)},
    "backward_key": {32: (24, 24), 64: (20, 32), 128: (3, 20), 256: (3, 3)},
    "backward_query": {32: (32, 24), 64: (48, 32), 128: (2, 48), 256: (2, 2)},
}


def test_no_gather_in_a_loop(compiled):
    """Loops read vectors, not single elements of a look-up table."""
    for (label, capability), kernel in compiled.items():
        size, dtype, *_, name = label.split()
        if name in MAIN:
            allowed = NARROW_LOADS.get(name, {}).get(int(size), (0, 0)) if dtype == "bfloat16" else (0, 0)
            assert kernel.narrow_loads <= allowed[capability != 100], (label, capability)


# Instructions and products on tensor cores of each kernel, head size 64 in bfloat16, with Triton 3.6.
COUNTS = {
    80: {
        "band_scores": (827, 32),
        "forward": (3464, 384),
        "backward_key": (2550, 160),
        "backward_rows": (895, 32),
        "backward_query": (1555, 112),
        "backward_by_distance": (1209, 32),
    },
    90: {
        "band_scores": (750, 4),
        "forward": (2995, 48),
        "backward_key": (2330, 32),
        "backward_rows": (867, 4),
        "backward_query": (1911, 28),
        "backward_by_distance": (1098, 4),
    },
}


@pytest.mark.parametrize("capability", COUNTS)
def test_instructions(compiled, capability):
    """Bounds the machine code of each kernel to 3 % above the measured counts.

    Counts are of whole kernels, each instruction once, in a loop or not. Far tiles of forward compute only the two
    products of plain attention, half as many as near ones, so a position term that reaches their loops shows in mma.
    """
    for name, (instructions, mma) in COUNTS[capability].items():
        kernel = compiled[f"64 bfloat16 {name}", capability]
        assert kernel.instructions <= 1.03 * instructions and kernel.mma == mma, (name, kernel)


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
    costly = ("pairs", "dropout", "float16")  # they take much shared memory
    for name, options in OPTIONS.items():
        if capability == 86 and name not in costly:
            continue
        given = dict(size=64, dtype=torch.bfloat16) | options
        yield from plan_launches(name, capability, given.pop("size"), given.pop("dtype"), **given)


def test_every_option_compiles():
    """Every option compiles for sm_90, and those that take much shared memory also for sm_86, which has little."""
    compiled = compile_all(variants, (86, 90))
    assert {label.split()[0] for label, capability in compiled if capability == 90} == set(OPTIONS)
    assert {key: x.shared for key, x in compiled.items() if x.shared > SHARED_LIMIT[key[1]]} == {}


def test_lengths_and_strides_compile_nothing_anew():
    """No integer of a launch is made a constant of the compiled kernel, nor is its divisibility."""
    planned = [p for options in ({}, {"mask": "keys"}, {"packed": True}) for p in plan_launches(
        "x", 90, 64, torch.bfloat16, **options)]  # fmt: skip
    for _, launch in planned:
        for parameter in launch.kernel.params:
            value = launch.arguments[parameter.name]
            if isinstance(value, int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, (launch.kernel.__name__, parameter.name)


def test_constants_do_not_depend_on_the_length():
    """There are at most three classes of length."""

    def constants(length):
        return {
            (launch.kernel.__name__, name, launch.arguments[name])
            for _, launch in plan_launches("x", 90, 64, torch.bfloat16, length=length)
            for name in (p.name for p in launch.kernel.params if p.is_constexpr)
        }

    assert constants(7) == constants(127) and constants(128) == constants(255)
    assert constants(256) == constants(513) == constants(20000)


def plans(inputs):
    """Yields the tensors and the plan of forward, then of backward."""
    output, lse = torch.empty_like(inputs.query), torch.empty(inputs.query.shape[:3], device=inputs.query.device)
    grads = [torch.empty_like(x) for x in inputs[:5]]
    settings = plan.settings(configuration.default(Target(90, 64, inputs.query.element_size())), "ieee")
    for results in ((output, lse), (output, lse, output, lse, *grads)):
        given = plan.given_tensors(inputs, *results)
        yield given, plan.plan_of(inputs, given, settings)


def v3_call(length, packed=False, tokens=16384):
    """Returns a call with 12 heads of size 64 and v3's tables, on the meta device."""
    meta = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    batch, rows = (1, tokens) if packed else (tokens // length, length)
    query, key, value = (meta(batch, 12, rows, 64) for _ in range(3))
    ends = meta(tokens // length + 1, dtype=torch.int32) if packed else None
    return Call(
        query, key, value, meta(12, 512, 64), meta(12, 512, 64), None, ends, None,
        256, 512, "hf", 0, 0, length, 0.07, 0.0,
    )  # fmt: skip


@pytest.fixture
def made(monkeypatch):
    """Counts the bytes that a plan of meta tensors allocates."""
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
        """Yields the bytes besides results and the number of launches, for forward, then for backward."""
        for given, planned in plans(inputs):
            sizes.clear()
            planned.tensors(given)
            yield sum(size for _, size in sizes.values()), len(planned.launches)

    return count


@pytest.mark.parametrize("length", [128, 512, 2048, 16384])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_workspace_is_bounded(length, packed, made):
    """Forward and backward of 16384 tokens and 12 heads of size 64 allocate at most 160 MiB besides results."""
    for size, count_of_launches in made(v3_call(length, packed)):
        assert 16 << 20 < size <= 160 << 20 and count_of_launches >= 3


LAUNCHES = {128: (7, 17), 512: (25, 62), 2048: (25, 62), 8192: (25, 62)}


@pytest.mark.parametrize("length", LAUNCHES)
def test_launches(length):
    """A launch serves both position terms, and a part has enough programs for an H200."""
    assert tuple(len(planned.launches) for _, planned in plans(v3_call(length))) == LAUNCHES[length]
    for _, planned in plans(v3_call(length)):
        programs = {launch.grid[0] * launch.grid[1] for launch in planned.launches if launch.configured == "forward"}
        assert all(n >= 256 for n in programs)


def test_parts_keep_their_bands_in_the_second_level_cache():
    sizes = lambda: {x.shape[0] * x.shape[1] for x in made_by(v3_call(512), "c2p", "p2c")}
    usual = sizes()
    assert sum(2 * n for n in usual) <= 16 << 20  # bytes of one of two equal bands
    plan.limit_band_bytes(128 << 20)
    try:
        assert sizes() == {4 * n for n in usual}
    finally:
        plan.limit_band_bytes()
    assert sizes() == usual


def made_by(inputs, *names):
    """Returns the workspaces of forward with these names."""
    _, planned = next(plans(inputs))
    return [planned.workspaces[name] for name in names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", speed.SHAPES)
def test_timing_of_the_check_takes_little_memory(shape, dtype, made):
    """Inputs, results and workspace of the calls that a process times before its choice take at most 300 MB."""
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
