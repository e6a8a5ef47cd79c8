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
    """Makes the interpreter skip useless work that takes more than half of its time.

    It computes integer sums and products twice to find overflows that only ``debug`` reports, and it patches Triton's
    language again in every call of a device function. The language now stays patched.

    Args:
        patch: a function with the arguments of ``setattr``.

    Returns:
        A function that removes the patches of the language.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    patch(interpreter.interpreter_builder, "options", options)
    patched = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patch(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
    return patched.restore
