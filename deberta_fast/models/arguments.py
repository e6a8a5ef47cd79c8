"""Arguments of ``from_pretrained`` and ``save_pretrained`` under Hugging Face's names."""

import re
from collections.abc import Sequence

import torch
from torch import nn

from ..checkpoint.replace import ENTRIES

Device = torch.device | str | int


def chosen_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | str:
    """Returns the one that is given, or float32; "auto" and unknown names stay text."""
    given = {getattr(torch, x, x) if isinstance(x, str) else x for x in (dtype, torch_dtype) if x is not None}
    if len(given) > 1:
        raise ValueError(f"torch_dtype is dtype by its older name: got dtype={dtype} and torch_dtype={torch_dtype}")
    return given.pop() if given else torch.float32


def placement(device: Device | None, device_map: Device | dict | None) -> tuple[Device | None, dict | None]:
    """Returns the device to load a model to, and the device map for ``spread``, or None.

    device_map is a device; "auto" for the accelerator that torch finds, or the CPU; or a dictionary from parts of the
    model to devices, which needs accelerate.
    """
    if device_map is None:
        return device, None
    if device is not None:
        raise ValueError(f"device_map says where the model lies, and so does device: got {device_map!r} and {device!r}")
    if isinstance(device_map, dict):
        if list(device_map) == [""]:
            return device_map[""], None
        try:
            import accelerate  # noqa: F401
        except ImportError:
            raise ImportError("a device_map of several parts needs accelerate: pip install accelerate") from None
        return "cpu", device_map
    if device_map == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or "cpu", None
    try:
        torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device_map must be "auto", a device, or a dictionary of parts and devices, got {device_map!r}: {error}'
        ) from None
    return device_map, None


def spread(model: nn.Module, device_map: dict) -> nn.Module:
    """Returns the model with its parts on several devices, connected by accelerate's hooks."""
    from accelerate import dispatch_model

    return dispatch_model(model, device_map)


def weight_files(weights: str | None, variant: str | None, use_safetensors: bool | None) -> Sequence[str]:
    """Names of the files to look for, in this order: ``weights``, or the usual names.

    ``variant`` is inserted into the usual names: "fp16" for model.fp16.safetensors. ``use_safetensors`` selects the
    safetensors among them (True) or the others (False).
    """
    if weights is not None:
        if variant is not None or use_safetensors is not None:
            raise ValueError(f"weights={weights!r} names a file: variant and use_safetensors choose among others")
        return (weights,)
    names = [x for x in ENTRIES if use_safetensors is None or (".safetensors" in x) == use_safetensors]
    if variant is None:
        return names
    return [re.sub(r"(\.index)?\.\w+$", lambda ending: f".{variant}{ending[0]}", name) for name in names]


def byte_count(size: int | str) -> int:
    """Converts a size, which may be text such as "500MB", to bytes."""
    if isinstance(size, str):
        parts = re.fullmatch(r"(\d+\.?\d*|\.\d+) *([KMG])(I?)B", size.strip().upper())
        if parts is None:
            raise ValueError(f'max_shard_size must be a number of bytes or text such as "500MB", got {size!r}')
        number, unit, binary = parts.groups()
        size = int(float(number) * (1024 if binary else 1000) ** ("KMG".index(unit) + 1))
    if size < 1:
        raise ValueError(f"max_shard_size must be positive, got {size}")
    return size
