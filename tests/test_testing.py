"""``deberta_fast.testing``: it accepts the backends of this package, and rejects the mistakes that kernels make."""

from types import SimpleNamespace

import pytest
import torch

from deberta_fast import testing
from deberta_fast.op import backends
from deberta_fast.op.backends import cpu, eager

KINDS = [testing.Kind(), testing.Kind(packed=True, dropout=True)]


@pytest.mark.parametrize("backend", [eager, cpu], ids=["eager", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_of_the_package_pass(backend, dtype):
    verdicts = testing.assert_backend(backend, dtype=dtype, head_size=32, kinds=KINDS)
    assert [verdict.solved for verdict in verdicts.values()] == [3, 2]
    assert all(verdict.passed and 0 < verdict.share <= 1 and verdict.where for verdict in verdicts.values())


def changed(**functions):
    """The eager backend with other functions."""
    own = {name: getattr(eager, name) for name in ("why_not", "forward", "backward")}
    return SimpleNamespace(**own | functions)


def one_slot_off(call, output, lse):
    eager.forward(call._replace(pos_key=call.pos_key.roll(1, 1)), output, lse)


def other_sign(call, output, lse):
    eager.forward(call._replace(pos_query=-call.pos_query), output, lse)


def tables_swapped(call, output, lse):
    eager.forward(call._replace(pos_key=call.pos_query, pos_query=call.pos_key), output, lse)


def last_row_unwritten(call, output, lse):
    eager.forward(call, output, lse)
    output[:, :, -1] = torch.nan


def spoils_an_input(call, output, lse):
    eager.forward(call, output, lse)
    call.value.zero_()


def another_result_each_time(call, output, lse):
    eager.forward(call, output, lse)
    output[0, 0, 0, 0] += 1e-6 * torch.rand(())


def gradient_of_one_table_missing(call, output, lse, grad_output, grad_lse, grads):
    eager.backward(call, output, lse, grad_output, grad_lse, grads)
    grads[4].zero_()


@pytest.mark.parametrize(
    "mutant, message",
    [
        ({"forward": one_slot_off}, "output: max error"),
        ({"forward": other_sign}, "output: max error"),
        ({"forward": tables_swapped}, "output: max error"),
        ({"forward": last_row_unwritten}, "output is not finite"),
        ({"forward": spoils_an_input}, "value, an input, was written to"),
        ({"forward": another_result_each_time}, "output differs from run to run"),
        ({"backward": gradient_of_one_table_missing}, "grad_pos_query: max error"),
        ({"forward": lambda *_: 1 / 0}, "ZeroDivisionError"),
    ],
    ids=lambda value: getattr(next(iter(value.values())), "__name__", "") if isinstance(value, dict) else "",
)
def test_mistakes_are_found(mutant, message):
    with pytest.raises(AssertionError, match=f"c2p and p2c: problem 'short.*{message}"):
        testing.assert_backend(changed(**mutant), head_size=32, kinds=KINDS[:1])


def test_kinds_that_a_backend_refuses():
    """Refusals are no failures, unless nothing is left."""
    packed_only = changed(why_not=lambda call: [] if call.cu_seqlens is not None else ["only packed calls"])
    dense, packed = testing.assert_backend(packed_only, head_size=32, kinds=KINDS).values()
    assert not dense.passed and dense.reasons == ("only packed calls",) and packed.solved == 2
    with pytest.raises(AssertionError, match="c2p and p2c: refused: only packed calls"):
        testing.assert_backend(packed_only, kinds=KINDS[:1])
    with pytest.raises(AssertionError, match="no kinds"):
        testing.assert_backend(eager, kinds=[])
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got torch.float64"):
        testing.assert_backend(eager, dtype=torch.float64)


def test_backends_follow_the_protocol():
    for name, backend in backends.BACKENDS.items():
        missing = [part for part in ("why_not", "forward", "backward") if not hasattr(backend, part)]
        assert missing == (["forward", "backward"] if name == "reference" else [])
