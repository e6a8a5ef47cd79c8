"""Makes a model on the meta device and fills its parameters with the tensors of a checkpoint."""

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

# Matches "encoder.layer.3." as in PyTorch and "encoder/layer_._3/" as in Keras.
_LAYER = re.compile(r"encoder[./]layer(?:\.|_\._)(\d{1,9})[./]")
# Parameters that the file lacks are initialised if they have at most this number of elements, or at most as many as the
# whole file. Larger ones mean a wrong configuration and might fill the memory.
_SMALL = 2**27
# Maps the end of a parameter's name to the field of the configuration that determines its size.
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
    """Lists, by name, how ``from_pretrained`` used the tensors of a checkpoint and the parameters of the model.

    Attributes:
        file: the file that was read.
        loaded: parameters that the file holds.
        missing: parameters that the file lacks; they are initialised.
        unexpected: tensors of the file that the model does not have.
        ignored: tensors of the file that are known to belong to other models or other libraries.
        mismatched: parameters whose shape in the file differs; ignore_mismatched_sizes initialises them.
    """

    file: str
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    ignored: list[str]
    mismatched: list[str]


@contextlib.contextmanager
def without_memory():
    """A context in which models are made on the meta device, for ``fill``."""
    with torch.device("meta"), _SkipInitialisation():
        yield


class _SkipInitialisation(TorchFunctionMode):
    """Skips initialisation, which has no effect on the meta device, but would make torch import its compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.normal_ or getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def check_layers(tensors: dict[str, torch.Tensor], layers: int, file: str) -> None:
    """Raises ValueError if a file has encoder layers, but fewer than ``layers``, the configuration's number."""
    found = [int(number) for name in tensors for number in _LAYER.findall(name)]
    if found and layers > max(found) + 1:
        raise ValueError(
            f"{file} does not fit the configuration: num_hidden_layers must be at most {max(found) + 1}, the layers "
            f"that the file has, got {layers} (num_hidden_layers given to from_pretrained may be larger)"
        )


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
    """Fills a model on the meta device with copies of ``tensors``, which have the names of ``file``.

    If the file lacks one of a module's own parameters, ``initialise(module)`` sets all of them before the others are
    filled. The remaining arguments are those of ``to_native`` and ``PreTrainedModel.from_pretrained``.

    Raises:
        CheckpointError: the tensors do not determine the model's weights.
        ValueError: a tensor has another shape than its parameter, nothing fits the model, or a parameter that the file
            lacks is too large to be initialised.
        TypeError: dtype is not a floating-point dtype.
    """
    expected = model.state_dict()
    held = sum(x.numel() for x in tensors.values())
    try:
        tensors, ignored = to_native(tensors, version=version, heads=heads, expected=set(expected), part=part)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    mismatched = [name for name, x in tensors.items() if name in expected and x.shape != expected[name].shape]
    if mismatched and not ignore_mismatched_sizes:
        shapes = "; ".join(
            f"{name} must be of shape {tuple(expected[name].shape)}, got {tuple(tensors[name].shape)}"
            for name in mismatched
        )
        model_name = type(model).__name__
        raise ValueError(f"{file} does not fit {model_name}: {shapes} (ignore_mismatched_sizes=True initialises them)")
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
            field = next((f" ({field})" for ending, field in _SIZES.items() if largest.endswith(ending)), "")
            raise ValueError(
                f"{file} lacks {largest}, which would be of shape {tuple(expected[largest].shape)} by the configuration"
                f"{field}, larger than all that the file holds, {held} numbers"
            )
    for name, x in fitting.items():
        if not x.is_floating_point():
            raise CheckpointError(f"{file}: {name} must be of a floating-point dtype, got {x.dtype}")
    if not any("embeddings." in name for name in fitting):
        names = ", ".join(info.unexpected[:5]) or "no tensor"
        raise ValueError(f"{file} holds no DeBERTa, but {names} ...")
    if dtype == "auto":
        dtype = next(iter(fitting.values())).dtype
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
    # The tensors may be mapped from the file, and would change if it were overwritten, so the model gets copies.
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
        # The stacklevel attributes the warning to the caller of from_pretrained.
        warnings.warn(f"{file} and {type(model).__name__} differ. {'. '.join(parts)}.", stacklevel=3)
    return info
