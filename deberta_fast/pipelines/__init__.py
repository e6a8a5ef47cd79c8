"""Pipelines: a task's whole way from text to answer, with the inputs, options and results of Hugging Face's."""

import importlib.util
import os

import torch

from .. import tokenization
from ..checkpoint.hub import Source
from ..models import task_models
from ..models.config import DebertaConfig, read_config
from ..models.pretrained import PreTrainedModel
from .base import InputError, Pipeline
from .fill_mask import FillMaskPipeline
from .question_answering import QuestionAnsweringPipeline
from .text_classification import TextClassificationPipeline
from .token_classification import TokenClassificationPipeline
from .zero_shot_classification import ZeroShotClassificationPipeline

__all__ = ["TASKS", "InputError", "Pipeline", "pipeline"]

_KINDS = (
    FillMaskPipeline,
    TextClassificationPipeline,
    ZeroShotClassificationPipeline,
    TokenClassificationPipeline,
    QuestionAnsweringPipeline,
)
TASKS = {kind.task: kind for kind in _KINDS}
# Hugging Face's other names for two of them
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}


def pipeline(
    task: str,
    model: str | os.PathLike | PreTrainedModel,
    tokenizer=None,
    *,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    backend: str | None = None,
    **options,
) -> Pipeline:
    """A callable that answers texts.

        classify = pipeline("text-classification", "path/to/model")
        classify(["A text.", {"text": "A text", "text_pair": "and another."}], top_k=None)

    Args:
        task: "fill-mask", "text-classification", "zero-shot-classification", "token-classification" or
            "question-answering"; the classes in ``TASKS`` document inputs, options and results.
        model: a folder, a name on the hub, or a model of this package.
        tokenizer: one of this package's, a folder or a name on the hub; by default the model's, a fast one where
            tokenizers is installed. Must be given with a model that is loaded already.
        device: by default a GPU if there is one; a loaded model stays where it is.
        dtype: float32 by default, "auto" for the checkpoint's; a loaded model stays as it is.
        batch_size: inputs, or parts of long ones, that the model gets at once. By default as many as fit into 1,024
            tokens on a CPU, into 16,384 elsewhere. They are sorted by length before, so that little is padding.
        progress: whether to show a bar (tqdm) on stderr. By default over a list that takes more than three seconds, if
            stderr is a terminal and tqdm is installed.
        backend: the attention's, a name of ``backends.BACKENDS``; None for the best one call by call.
        options: of the task, as of every call; and revision, cache_dir, token and local_files_only as of
            ``hub.Source``.

    Raises:
        ValueError: there is no such task; the configuration is of another model; options do not fit.
        TypeError: the model is of another task, or the task has no such option.
        FileNotFoundError: there are no files of the model or the tokenizer.
    """
    kind = TASKS.get(ALIASES.get(task, task))
    if kind is None:
        raise ValueError(f"task must be one of {', '.join([*TASKS, *ALIASES])}, got {task!r}")
    place = {name: options.pop(name) for name in Source.OPTIONS if name in options}
    kind.changed(options)  # before what may take minutes
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("with a model that is loaded already, tokenizer must be given")
        if device is not None or dtype is not None:
            model = model.to(device=device, dtype=dtype)
    elif isinstance(model, str | os.PathLike):
        tokenizer = model if tokenizer is None else tokenizer
        config = read_config(Source(model, **place))
        head = getattr(task_models, kind.head.__name__.replace("Deberta", _prefix(config)))
        dtype = torch.float32 if dtype is None else dtype
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        model = head.from_pretrained(model, config=config, dtype=dtype, device=device, **place)
    else:
        raise TypeError(f"model must be a folder, a name on the hub or a model, got {type(model).__name__}")
    if isinstance(tokenizer, str | os.PathLike):
        fast = "Fast" if importlib.util.find_spec("tokenizers") else ""
        kind_of_tokenizer = getattr(tokenization, f"{_prefix(model.config)}Tokenizer{fast}")
        tokenizer = kind_of_tokenizer.from_pretrained(tokenizer, **place)
    if backend is not None:
        model.set_backend(backend)
    return kind(model, tokenizer, batch_size=batch_size, progress=progress, **options)


def _prefix(config: DebertaConfig) -> str:
    return "Deberta" if config.generation == 1 else "DebertaV2"
