"""Triton's interpreter, as the tests use it. TRITON_INTERPRET=1 has to be set before Triton is imported."""

from collections.abc import Callable
from types import SimpleNamespace


def serve_cpu() -> None:
    """Lets the Triton backend serve CPU tensors, in the interpreter, for the rest of the process."""
    import triton.language as tl
    from triton.runtime import interpreter

    from deberta_fast.op.backends import triton
    from deberta_fast.op.backends.triton import configuration

    device_reasons, create_dot = triton.device_reasons, interpreter.InterpreterBuilder.create_dot

    def upcast_dot(self, a, b, *arguments):
        """Multiplies in float32, because the interpreter's own products of bfloat16 are wrong."""
        return create_dot(self, *(self.cast_impl(x, tl.float32) for x in (a, b)), *arguments)

    triton.device_reasons = lambda device: [] if device.type == "cpu" else device_reasons(device)
    interpreter.InterpreterBuilder.create_dot = upcast_dot
    configuration.target_of = lambda device, *sizes: configuration.Target("interpreter", *sizes)
    # The interpreter takes as long for a small tile as for a large one.
    configuration.default = lambda target: configuration.Configuration(64, *[configuration.Tiles(64, 64, 4, 1)] * 5)


def without_vain_work(patch: Callable) -> Callable[[], None]:
    """Makes the interpreter skip useless work that takes most of its time.

    It computes integer sums and products twice to find overflows that only ``debug`` reports, and it patches Triton's
    language again in every call of a device function. The language now stays patched. For every tensor it makes the
    same few types again, with their names. They are now kept.

    Args:
        patch: a function with the arguments of ``setattr``.

    Returns:
        A function that removes the patches of the language.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    _keep_types(patch)
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    patch(interpreter.interpreter_builder, "options", options)
    patched = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patch(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
    return patched.restore


def _keep_types(patch: Callable) -> None:
    """Makes types of blocks, and shapes of tensors with such a type, only once for each element type and shape."""
    from triton.language import core
    from triton.runtime import interpreter

    make_block, make_tensor, numpy_type = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    blocks: dict = {}
    tensors: dict = {}
    arrays: dict = {}

    def block(self, element_ty, shape):
        key = element_ty.name, tuple(core._unwrap_if_constexpr(size) for size in shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = self.__dict__
        self.__dict__ = dict(blocks[key])

    def tensor(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[type.name]

    def array(type):
        if type.name not in arrays:
            arrays[type.name] = numpy_type(type)
        return arrays[type.name]

    patch(core.block_type, "__init__", block)
    patch(core.tensor, "__init__", tensor)
    patch(interpreter, "_get_np_dtype", array)
