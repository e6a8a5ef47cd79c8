"""Torch is asked about a GPU."""

import torch


def properties_of(device: torch.device):
    """Torch's properties of a CUDA, ROCm or XPU device; None where it is not there, as a FakeTensor's need not be."""
    library = torch.xpu if device.type == "xpu" else torch.cuda
    # torch.compile knows both answers for constants, but cannot trace what the second one raises.
    if torch.compiler.is_compiling() and not library.is_available():
        return None
    try:
        return library.get_device_properties(device)
    except (AssertionError, RuntimeError):
        return None
