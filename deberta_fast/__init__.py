"""Fast disentangled attention for DeBERTa v1, v2 and v3."""

from . import _interrupt  # noqa: F401 (first of all)
from .hf import patch, unpatch
from .models.config import DebertaConfig, DebertaV2Config
from .models.model import DebertaModel, DebertaV2Model
from .models.task_models import (
    DebertaForMaskedLM,
    DebertaForQuestionAnswering,
    DebertaForSequenceClassification,
    DebertaForTokenClassification,
    DebertaV2ForMaskedLM,
    DebertaV2ForMultipleChoice,
    DebertaV2ForQuestionAnswering,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
)
from .op import (
    backends,
    disentangled_attention,
    disentangled_attention_varlen,
    release_memory,
    set_backend_check,
)
from .pipelines import pipeline
from .selfcheck import check
from .tokenization import (
    BatchEncoding,
    DebertaTokenizer,
    DebertaTokenizerFast,
    DebertaV2Tokenizer,
    DebertaV2TokenizerFast,
)

__version__ = "0.1.0"
__all__ = [
    "BatchEncoding",
    "DebertaConfig",
    "DebertaForMaskedLM",
    "DebertaForQuestionAnswering",
    "DebertaForSequenceClassification",
    "DebertaForTokenClassification",
    "DebertaModel",
    "DebertaTokenizer",
    "DebertaTokenizerFast",
    "DebertaV2Config",
    "DebertaV2ForMaskedLM",
    "DebertaV2ForMultipleChoice",
    "DebertaV2ForQuestionAnswering",
    "DebertaV2ForSequenceClassification",
    "DebertaV2ForTokenClassification",
    "DebertaV2Model",
    "DebertaV2Tokenizer",
    "DebertaV2TokenizerFast",
    "backends",
    "check",
    "disentangled_attention",
    "disentangled_attention_varlen",
    "patch",
    "pipeline",
    "release_memory",
    "set_backend_check",
    "unpatch",
]
