"""Arguments of ``from_pretrained`` and ``save_pretrained`` under the names that Hugging Face gives them."""

from collections.abc import Sequence

import torch
from torch import nn

from ..checkpoint.replace import ENTRIES

Device = torch.device | str | int
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def chosen_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | str:
    """That of the two which is given; float32 if neither is.

    Raises:
        ValueError: both are given, and differ.
    """
    if torch_dtype is None:
        return torch.float32 if dtype is None else dtype
    if dtype is not None and _dtype(dtype) != _dtype(torch_dtype):
        raise ValueError(f"torch_dtype is dtype by its older name: got dtype={dtype} and torch_dtype={torch_dtype}")
    return torch_dtype


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    return getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype


def placement(device: Device | None, device_map: Device | dict | None) -> tuple[Device | None, dict | None]:
    """The device that a model is loaded to, and what accelerate then spreads it by, or None.

    Args:
        device_map: a device; "auto" for the accelerator that torch finds, the CPU otherwise; or a dictionary of the
            model's parts and their devices.

    Raises:
        ValueError: both are given, or device_map is something else.
        ImportError: accelerate is needed, and not installed.
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
    """The model with its parts on several devices, by accelerate's hooks."""
    from accelerate import dispatch_model

    return dispatch_model(model, device_map)


def weight_files(weights: str | None, variant: str | None, use_safetensors: bool | None) -> Sequence[str]:
    """Names of the files to look for, the first one first.

    Args:
        weights: a file by its name.
        variant: what stands in the usual names before the ending: "fp16" for model.fp16.safetensors.
        use_safetensors: whether of the usual ones only, or never, safetensors; None for any.

    Raises:
        ValueError: a file is named, and one of the other two given too.
    """
    if weights is not None:
        if variant is not None or use_safetensors is not None:
            raise ValueError(f"weights={weights!r} names a file: variant and use_safetensors choose among others")
        return (weights,)
    names = [x for x in ENTRIES if use_safetensors is None or (".safetensors" in x) == use_safetensors]
    if variant is None:
        return names
    return [f"{stem}.{variant}{ending}" for stem, ending in map(_divided, names)]


def _divided(name: str) -> tuple[str, str]:
    """A file's name before and after the place of a variant."""
    stem, dot, ending = name.removesuffix(".index.json").rpartition(".")
    return (stem, dot + ending) if not name.endswith(".index.json") else (f"{stem}.{ending}", ".index.json")


def byte_count(size: int | str) -> int:
    """A size in bytes, which may be text such as "500MB".

    Raises:
        ValueError: it is neither, or not positive.
    """
    if isinstance(size, str):
        number, unit = size.rstrip("BbIiKkMmGg "), size.strip().upper()
        unit = unit[len(number) :].strip()
        if unit not in _UNITS or not number.replace(".", "", 1).isdigit():
            raise ValueError(f'max_shard_size must be a number of bytes or text such as "500MB", got {size!r}')
        size = int(float(number) * _UNITS[unit])
    if size < 1:
        raise ValueError(f"max_shard_size must be positive, got {size}")
    return size
