"""The precision rule of ``deberta_fast.op.precision``, under the name that the tests know."""

from deberta_fast.op.precision import assert_as_precise, hf_style_attention

__all__ = ["assert_as_precise", "hf_style_attention"]
