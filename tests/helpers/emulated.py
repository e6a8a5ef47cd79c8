"""The CUDA backend where an emulator makes up for the GPU that is not there."""


def stand_in(cuda, operators=None, patch=setattr) -> None:
    """Tensors of the CPU count as the GPU's; ``operators`` take the place of the extension's."""
    of_a_gpu = cuda.device_reasons
    patch(cuda, "MISSING", None)
    patch(cuda, "device_reasons", lambda device, size: [] if device.type == "cpu" else of_a_gpu(device, size))
    if operators is not None:
        patch(cuda, "fused_forward", operators.fused_forward.default)
        patch(cuda, "fused_backward", operators.fused_backward.default)
