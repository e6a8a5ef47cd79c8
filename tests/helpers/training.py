"""A few training steps of native and patched models, on one process or several, and the comparison of both."""

import importlib

import native_models
import torch
from native_models import inputs_of

import deberta_fast

CLASSIFIER = "ForSequenceClassification"
KINDS = ("native", "patched")
MODELS = [(kind, name) for kind in KINDS for name in ("v1", "v2", "v3")]


def build(kind: str, name: str = "v3", head: str = CLASSIFIER, **changes) -> torch.nn.Module:
    """A model in training mode: "native", "patched", "unpadded" (patched with unpad), or "hf"."""
    if kind == "native":
        return native_models.build(name, head, **changes).train()
    model = importlib.import_module("hf_models").build(name, head, **changes).train()
    return model if kind == "hf" else deberta_fast.patch(model, unpad=kind == "unpadded")


def batches(number: int, rank: int | None = None, head: str = CLASSIFIER, rows: int = 2, ranks: int = 2) -> list[dict]:
    """Padded batches with labels: one process's ``rows``, or those of all processes if rank is None."""
    found = []
    for step in range(number):
        whole = inputs_of(head, labels=True, batch=rows * ranks)
        mine = slice(None) if rank is None else slice(rows * rank, rows * (rank + 1))
        found.append({name: x.roll(step, 0)[mine] for name, x in whole.items()})
    return found


def full(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def by_name(model: torch.nn.Module, of=lambda parameter: parameter) -> dict[str, torch.Tensor]:
    """The parameters, or their gradients, under the names of the unwrapped model."""
    wrappers = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
    found = {}
    for name, parameter in model.named_parameters():
        for wrapper in wrappers:
            name = name.replace(wrapper, "")
        if of(parameter) is not None:
            found[name] = full(of(parameter))
    return found


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return by_name(model, lambda parameter: parameter.grad)


def adamw(model: torch.nn.Module, kind=torch.optim.AdamW, **keywords) -> torch.optim.Optimizer:
    """Its eps exceeds the rounding of gradients that are otherwise zero, of which AdamW would make whole steps."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else model
    return kind(parameters, lr=1e-2, eps=1e-2, **keywords)


def train(model: torch.nn.Module, data: list[dict], optimizer=None, backward=None) -> dict:
    """Returns the losses of this process, the gradients of the first step and the weights after the last one."""
    optimizer, losses, first = optimizer or adamw(model), [], None
    for batch in data:
        loss = model(**batch).loss
        loss.backward() if backward is None else backward(loss)
        losses.append(loss.detach())
        first = gradients(model) if first is None else first
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.stack(losses), "gradients": first, "weights": by_name(model)}


def assert_same(got: dict, expected: dict, tolerance: float = 2e-6) -> None:
    """Every tensor differs by less than tolerance (1 + its largest element)."""
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        if isinstance(x, dict):
            assert_same(got[name], x, tolerance)
        else:
            torch.testing.assert_close(got[name], x, rtol=0, atol=tolerance * float(1 + x.abs().max()), msg=name)


def assert_ranks(found: list[dict], expected: dict, tolerance: float = 2e-6) -> None:
    """Every rank has one process's gradients and weights, and the mean of the ranks' losses is one process's."""
    losses = torch.stack([got.pop("losses") for got in found]).mean(0)
    torch.testing.assert_close(losses, expected["losses"], rtol=0, atol=tolerance)
    for got in found:
        assert_same(got, {name: expected[name] for name in ("gradients", "weights")}, tolerance)
