"""The bfloat16 kernels on AMX tiles. On a processor without AMX an emulator executes the tile instructions."""

import os

import amx
import amx_functions
import pytest
import torch
from cases import BY_NAME, Case, make_inputs
from comparison import compare, public

from deberta_fast import disentangled_attention
from deberta_fast.op.backends import cpu

NATIVE = "amx" in cpu.instruction_sets()
FLAGS = ["avx512bw", "avx512dq", "avx512vl", "avx512_bf16"]


def why_not() -> str | None:
    if cpu.NOT_LOADED is not None or NATIVE:
        return cpu.NOT_LOADED
    if not amx.processor_has(*FLAGS):
        return "the kernels on AMX tiles need a processor with AVX512_BF16 too"
    return amx.why_not() or (None if "amx" in cpu.built_sets() else "built without the kernels on AMX tiles")


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

NAMES = """one-token L7-D8 ragged-L129-D64 ragged-L129-D64-c2p-only ragged-L129-D64-p2c-only ragged-L129-D64-neither
    far-L700 left-padding-L200 holes-L200 whole-row-padded-L140 pairwise-mask-L150 mask-per-head-L70
    long-query-Lq300-Lk70 negative-offset-all-far table-window-L20 fused-qkv-views-L129-D24 D80-L65 dropout-L140
    no-keys""".split()


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return None if NATIVE else amx.Emulator(amx.build(tmp_path_factory.mktemp("amx")))


@pytest.fixture
def tiles(emulator):
    """The kernels on AMX tiles are in use. On an emulator, a test must have multiplied tiles."""
    with cpu.using("amx"):
        before = emulator and emulator.counts()["tdpbf16ps"]
        yield emulator
        assert NATIVE or emulator.counts()["tdpbf16ps"] > before


@pytest.mark.parametrize("name", NAMES)
def test_named_cases(name, tiles):
    compare(public("cpu"), BY_NAME[name], torch.bfloat16, draws=1)


def small_call():
    inputs = make_inputs(Case("", 40, 40, batch=1, heads=2, size=32), torch.bfloat16)
    query, key, value, pos_key, pos_query = (x.requires_grad_() for x in inputs[:5])

    def call():
        output = disentangled_attention(
            query, key, value, pos_key, pos_query, position_buckets=inputs.position_buckets,
            max_relative_positions=inputs.max_relative_positions, backend="cpu",
        )  # fmt: skip
        return output, *torch.autograd.grad(output.float().sum(), (query, key, value, pos_key, pos_query))

    return call


def test_tiles_are_released(tiles):
    """A thread with configured tiles costs the operating system 8 KiB more at every switch."""
    small_call()()
    assert NATIVE or not tiles.configured()


def test_the_configuration_of_others_is_put_back(tiles, tmp_path):
    """torch's own products may have configured tiles in this thread and expect them as they left them."""
    functions = amx_functions.load(amx_functions.build(tmp_path))
    before, after = amx_functions.CONSTANT.copy(), amx_functions.CONSTANT * 0
    functions("configure", before)
    try:
        small_call()()
        functions("read_configuration", after)
    finally:
        functions("release")
    assert (after == before).all()


def test_in_a_forked_process(tiles):
    """The kernel's permission and the choice of kernels are inherited."""
    call = small_call()
    expected = call()
    child = os.fork()
    if child == 0:
        same = all(torch.equal(x, y) for x, y in zip(call(), expected, strict=True))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_do_not_change_a_bit(tiles):
    call, results = small_call(), []
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(call())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
