"""Loading: a model is made without memory, and the tensors of a checkpoint become its parameters."""

import contextlib
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .error import CheckpointError
from .names import to_native

# PyTorch's "encoder.layer.3.", Keras's "encoder/layer_._3/"
_LAYER = re.compile(r"encoder[./]layer(?:\.|_\._)(\d{1,9})[./]")
# A tensor that a file lacks may have as many numbers without a question.
_SMALL = 2**27
_SIZES = {
    "position_embeddings.weight": "max_position_embeddings",
    "token_type_embeddings.weight": "type_vocab_size",
    "rel_embeddings.weight": "max_relative_positions",
    "conv.conv.weight": "conv_kernel_size",
    "pooler.dense.weight": "pooler_hidden_size",
    "pooler.dense.bias": "pooler_hidden_size",
    "classifier.weight": "num_labels",
    "classifier.bias": "num_labels",
}


class LoadingInfo(NamedTuple):
    """What ``from_pretrained`` did with the names of a checkpoint and of the model.

    Attributes:
        file: the file that was read.
        loaded: parameters that it gave.
        missing: parameters that it lacks; they are initialised.
        unexpected: tensors that the model has no place for.
        ignored: tensors that are known to belong to other models or other libraries.
        mismatched: tensors of another shape, with ignore_mismatched_sizes; their parameters are initialised.
    """

    file: str
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    ignored: list[str]
    mismatched: list[str]


@contextlib.contextmanager
def without_memory():
    """Models that are made inside lie on the meta device, for ``fill``."""
    with torch.device("meta"), _WithoutNumbers():
        yield


class _WithoutNumbers(TorchFunctionMode):
    """Nothing is drawn: on the meta device there is nowhere to put it, and torch would import its compiler for that."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.normal_ or getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def check_layers(tensors: dict[str, torch.Tensor], layers: int, file: str) -> None:
    """Whether a file of weights has layers for all of a configuration's, before they are made.

    Args:
        tensors: by the names of the file, whoever gave them.
        layers: num_hidden_layers.
        file: what the error calls it.

    Raises:
        ValueError: it has some, and not as many.
    """
    found = [int(number) for name in tensors for number in _LAYER.findall(name)]
    if found and layers > max(found) + 1:
        raise ValueError(
            f"{file} does not fit the configuration: num_hidden_layers must be at most {max(found) + 1}, the layers "
            f"that the file has, got {layers} (given to from_pretrained, it makes layers that are initialised)"
        )


def _said_by(name: str) -> str:
    field = next((field for ending, field in _SIZES.items() if name.endswith(ending)), None)
    return f" ({field})" if field else ""


def fill(
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    file: str,
    *,
    version: int,
    heads: int,
    part: str,
    initialise: Callable[[nn.Module], None],
    dtype: torch.dtype | str,
    device: torch.device | str | int | None,
    ignore_mismatched_sizes: bool,
) -> LoadingInfo:
    """Fills a model that lies on the meta device.

    Args:
        tensors: by the names of the file, which are left as they are; the model gets copies.
        file: what errors and warnings call it.
        version, heads, part: as of ``to_native``.
        initialise: draws the parameters of one module, not of those below it; called where tensors are missing.
        dtype, device, ignore_mismatched_sizes: as of ``PreTrainedModel.from_pretrained``.

    Raises:
        CheckpointError: the tensors do not say what the model's weights are.
        ValueError: a tensor has another shape, or nothing fits the model.
        TypeError: dtype is no floating-point one.
    """
    expected = model.state_dict()
    held = sum(x.numel() for x in tensors.values())
    try:
        tensors, ignored = to_native(tensors, version=version, heads=heads, expected=set(expected), part=part)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    mismatched = [name for name, x in tensors.items() if name in expected and x.shape != expected[name].shape]
    if mismatched and not ignore_mismatched_sizes:
        raise ValueError(
            f"{file} does not fit {type(model).__name__}: "
            + "; ".join(
                f"{name} must be of shape {tuple(expected[name].shape)}, got {tuple(tensors[name].shape)}"
                for name in mismatched
            )
            + " (ignore_mismatched_sizes=True initialises them)"
        )
    fitting = {name: x for name, x in tensors.items() if name in expected and name not in mismatched}
    info = LoadingInfo(
        file=file,
        loaded=sorted(fitting),
        missing=sorted(set(expected) - set(fitting) - set(mismatched)),
        unexpected=sorted(set(tensors) - set(expected)),
        ignored=sorted(ignored),
        mismatched=sorted(mismatched),
    )
    if info.missing:
        largest = max(info.missing, key=lambda name: expected[name].numel())
        if expected[largest].numel() > max(held, _SMALL):
            raise ValueError(
                f"{file} lacks {largest}, which would be of shape {tuple(expected[largest].shape)} by the configuration"
                f"{_said_by(largest)}, larger than all that the file holds, {held} numbers"
            )
    for name, x in fitting.items():
        if not x.is_floating_point():
            raise CheckpointError(f"{file}: {name} must be of a floating-point dtype, got {x.dtype}")
    if not any("embeddings." in name for name in fitting):
        names = ", ".join(info.unexpected[:5]) or "no tensor"
        raise ValueError(f"{file} holds no DeBERTa, but {names} ...")
    if dtype == "auto":
        dtype = next((x.dtype for x in fitting.values() if x.is_floating_point()), torch.float32)
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f'dtype must be a floating-point torch.dtype or "auto", got {dtype!r}')
    device = torch.device("cpu" if device is None else device)
    for name, module in model.named_modules():
        own = [f"{name}.{parameter}".removeprefix(".") for parameter, _ in module.named_parameters(recurse=False)]
        if not fitting.keys() >= set(own):
            module.to_empty(device="cpu", recurse=False)
            initialise(module)
    # Copies: what was read may be a map of the file, which others may write to
    fitting = {name: x.to(device=device, dtype=dtype, copy=True).contiguous() for name, x in fitting.items()}
    model.load_state_dict(fitting, strict=False, assign=True)
    model.to(device=device, dtype=dtype)
    parts = {
        "initialised, for the file lacks them": info.missing,
        "initialised, for their shape is another": info.mismatched,
        "not used": info.unexpected,
    }
    parts = [f"{what}: {', '.join(names)}" for what, names in parts.items() if names]
    if parts:
        # The warning names the line that calls from_pretrained.
        warnings.warn(f"{file} and {type(model).__name__} differ. {'. '.join(parts)}.", stacklevel=3)
    return info
