"""Triton's interpreter, as the tests use it."""

from collections.abc import Callable
from types import SimpleNamespace


def without_vain_work(patch: Callable) -> Callable[[], None]:
    """Leaves out what takes more than half of the interpreter's time to no effect: integer sums and products made
    again, to find overflows that only ``debug`` reports; Triton's language patched anew in every call of a device
    function.

    Args:
        patch: as ``setattr``.

    Returns:
        What takes back the language's patches, which now last.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    patch(interpreter.interpreter_builder, "options", options)
    patched = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patch(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
    return patched.restore
