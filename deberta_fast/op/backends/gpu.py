"""Properties of a GPU, as torch reports them."""

import torch


def properties_of(device: torch.device):
    """Returns torch's properties of a CUDA, ROCm or XPU device, or None if the device does not exist (FakeTensor)."""
    library = torch.xpu if device.type == "xpu" else torch.cuda
    # torch.compile treats both results as constants, but cannot trace an exception of get_device_properties.
    if torch.compiler.is_compiling() and not library.is_available():
        return None
    try:
        return library.get_device_properties(device)
    except (AssertionError, RuntimeError):
        return None
