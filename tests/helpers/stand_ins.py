"""Backends that replace those of an accelerator, and faults that tests put into them."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from deberta_fast.op import backends, proof, selection, speed
from deberta_fast.op.backends import eager


class StandIn(SimpleNamespace):
    """A backend that computes with ``eager`` and counts its forward passes; a fault changes its results."""

    def __init__(self, fault=None, reasons=()):
        super().__init__(calls=0, fault=fault, reasons=list(reasons))

    def why_not(self, call):
        return self.reasons

    def forward(self, call, output, lse):
        self.calls += 1
        lse, before = call.new_lse() if lse is None else lse, output.clone()
        eager.forward(self._changed(call), output, lse)
        self._spoil("forward", output=output, lse=lse, before=before)

    def backward(self, call, output, lse, grad_output, grad_lse, grads):
        eager.backward(self._changed(call), output, lse, grad_output, grad_lse, grads)
        self._spoil("backward", call=call, **dict(zip(proof.NAMES[2:], grads, strict=True)))

    def _changed(self, call):
        return getattr(self.fault, "call", lambda call: call)(call)

    def _spoil(self, where, **tensors):
        getattr(self.fault, where, lambda tensors: None)(SimpleNamespace(**tensors))


def fault(where, change):
    return SimpleNamespace(**{where: change})


def rolled(call):
    return call if call.pos_key is None else call._replace(pos_key=call.pos_key.roll(1, 1))


def raises(tensors):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def a_slot_too_far(tensors):
    """Shifts the gradient of one table by one row."""
    if tensors.grad_pos_query is not None:
        tensors.grad_pos_query.copy_(tensors.grad_pos_query.roll(1, 1))


class Race:
    """Two blocks race for one row: the row changes by less than the precision rule detects."""

    runs = 0

    def forward(self, tensors):
        self.runs += 1
        tensors.output[..., -1, :] *= 1 + 2 * torch.finfo(torch.float32).eps * (self.runs % 2)


def not_written(tensors):
    """The last row of a partial tile keeps its earlier content."""
    tensors.output[:, :, -1] = tensors.before[:, :, -1]


FAULTS = {
    "a wrong slot": (fault("call", rolled), r"output: max error \d.*, allowed \d"),
    "a dropped barrier": (fault("forward", lambda t: t.output[..., 32:48, :].zero_()), "output: max error"),
    "a NaN": (fault("backward", lambda t: t.grad_key[0, 0, 3, 2].fill_(torch.nan)), "grad_key is not finite"),
    "a row not written": (fault("forward", not_written), "output is not finite"),
    "an exception": (fault("forward", raises), "RuntimeError: Failed to find C compiler"),
    "a wrong gradient of a table": (fault("backward", a_slot_too_far), "grad_pos_query: max error"),
    "a row of the log-sum-exp": (fault("forward", lambda t: t.lse[..., 7].add_(0.5)), "lse: max error"),
    "an input written to": (fault("backward", lambda t: t.call.value[..., 0].add_(1.0)), "value, an input"),
    "a race": (Race(), "output differs from run to run"),
    "a row that sees nothing": (fault("forward", lambda t: t.output[-1].add_(1e-30)), "sees no key"),
}


@contextmanager
def cpu_as_accelerator(**milliseconds):
    """Makes CPU tensors count as an accelerator's whose backends are not checked yet.

    Speed measurements return ``milliseconds`` for the two fused backends. The context yields a function that installs
    stand-ins for these backends, by default correct ones.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "is_checked", lambda device: device.type == "cpu")
        patch.setattr(selection, "_exists", lambda device: device.type == "cpu")
        patch.setattr(speed, "of_backends", lambda names, *_: {name: {"": milliseconds[name]} for name in names})
        selection.set_backend_check(True)

        def install(cuda=None, triton=None):
            found = {"cuda": cuda or StandIn(), "triton": triton or StandIn()}
            for name, stand_in in found.items():
                patch.setitem(backends.BACKENDS, name, stand_in)
            return SimpleNamespace(**found)

        yield install
    selection.set_backend_check(True)
