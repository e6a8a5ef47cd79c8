"""The tokenizers of DeBERTa v1, v2 and v3."""

from .batch_encoding import BatchEncoding
from .deberta import DebertaTokenizer, DebertaTokenizerFast
from .deberta_v2 import DebertaV2Tokenizer, DebertaV2TokenizerFast
from .special_tokens import AddedToken

__all__ = [
    "AddedToken",
    "BatchEncoding",
    "DebertaTokenizer",
    "DebertaTokenizerFast",
    "DebertaV2Tokenizer",
    "DebertaV2TokenizerFast",
]
