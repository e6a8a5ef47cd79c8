"""Pipelines from text to answer, with the inputs, options and results of Hugging Face's pipelines."""

import importlib.util
import inspect
import os
import sys
from typing import Any

import torch

from .. import tokenization
from ..checkpoint.hub import Source
from ..models.arguments import chosen_dtype, placement, spread
from ..models.config import DebertaConfig, read_config
from ..models.pretrained import PreTrainedModel
from .base import InputError, Pipeline
from .feature_extraction import FeatureExtractionPipeline
from .fill_mask import FillMaskPipeline
from .question_answering import QuestionAnsweringPipeline
from .text_classification import TextClassificationPipeline
from .token_classification import TokenClassificationPipeline
from .zero_shot_classification import ZeroShotClassificationPipeline

__all__ = ["TASKS", "InputError", "Pipeline", "pipeline"]

TASKS = {
    kind.task: kind
    for kind in (
        FillMaskPipeline,
        TextClassificationPipeline,
        ZeroShotClassificationPipeline,
        TokenClassificationPipeline,
        QuestionAnsweringPipeline,
        FeatureExtractionPipeline,
    )
}
# Hugging Face's other names of two tasks
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
    torch_dtype: torch.dtype | str | None = None,
    device_map: torch.device | str | int | dict | None = None,
    model_kwargs: dict | None = None,
    use_fast: bool | None = None,
    framework: str | None = None,
    trust_remote_code: bool | None = None,
    **options,
) -> Pipeline:
    """Makes a callable that answers texts.

        classify = pipeline("text-classification", "path/to/model")
        classify(["A text.", {"text": "A text", "text_pair": "and another."}], top_k=None)

    Args:
        task: "fill-mask", "text-classification", "zero-shot-classification", "token-classification",
            "question-answering" or "feature-extraction"; the classes in ``TASKS`` document inputs, options and results.
        model: a folder, a name on the hub, or a model of this package.
        tokenizer: one of this package's, a folder or a name on the hub; by default the model's. Required with a loaded
            model.
        device: by default a GPU if there is one; -1 is the CPU. A loaded model stays where it is by default.
        dtype, torch_dtype: float32 by default, "auto" for the checkpoint's; a loaded model stays as it is by default.
        batch_size: inputs, or parts of long inputs, per call of the model. By default as many as fit into 1,024 tokens
            on a CPU, into 16,384 elsewhere. Inputs are sorted by length first, which keeps padding short.
        progress: whether to show a bar (tqdm) on stderr. By default a bar appears over a list that takes more than
            three seconds, if stderr is a terminal and tqdm is installed.
        backend: backend of attention, a name of ``backends.BACKENDS``; None selects the best one per call.
        device_map: that of ``PreTrainedModel.from_pretrained``, instead of device.
        model_kwargs: other arguments of the model's ``from_pretrained``.
        use_fast: which kind of tokenizer to load. By default a fast one if tokenizers is installed.
        framework: "pt" or None.
        trust_remote_code: has no effect.
        options: options of the task, which every call takes too; and revision, cache_dir, token, local_files_only,
            force_download and subfolder, which ``hub.Source`` describes.

    Raises:
        ValueError: the task is unknown; the configuration belongs to another model; options do not fit.
        TypeError: the model belongs to another task, or the task has no such option.
        FileNotFoundError: files of the model or the tokenizer are missing.
    """
    kind = TASKS.get(ALIASES.get(task, task))
    if kind is None:
        raise ValueError(f"task must be one of {', '.join([*TASKS, *ALIASES])}, got {task!r}")
    if framework not in (None, "pt"):
        raise ValueError(f'framework must be "pt", got {framework!r}')
    place = {name: options.pop(name) for name in Source.OPTIONS if name in options}
    try:
        kind.changed(options)  # Loading may take minutes, so errors in the options come first.
    except TypeError as error:
        parameters = inspect.signature(pipeline).parameters.values()
        names = [x.name for x in parameters if x.kind is not x.VAR_KEYWORD] + list(Source.OPTIONS)
        raise TypeError(f"{error}; pipeline takes {', '.join(names)}") from None
    device = "cpu" if device == -1 else device
    given: dict[str, Any] = dict(device=device, device_map=device_map, dtype=dtype, torch_dtype=torch_dtype)
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("with a model that is loaded already, tokenizer must be given")
        if model_kwargs:
            raise ValueError(f"model_kwargs load a model, and it is loaded already: got {', '.join(model_kwargs)}")
        loaded = _moved(model, **given)
    elif isinstance(model, str | os.PathLike):
        tokenizer = model if tokenizer is None else tokenizer
        if twice := given.keys() & (model_kwargs or {}).keys():
            raise ValueError(f"{', '.join(sorted(twice))} must be given once, got it in model_kwargs too")
        given |= model_kwargs or {}
        place |= {name: given.pop(name) for name in Source.OPTIONS if name in given}
        config: Any = given.pop("config", None) or read_config(Source(model, **place))
        name = kind.head.__name__.replace("Deberta", _prefix(config))
        if "device" not in given and "device_map" not in given:
            given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        head = getattr(sys.modules[kind.head.__module__], name)
        loaded = head.from_pretrained(model, config=config, **given, **place)
    else:
        raise TypeError(f"model must be a folder, a name on the hub or a model, got {type(model).__name__}")
    if isinstance(tokenizer, str | os.PathLike):
        if use_fast is None:
            use_fast = importlib.util.find_spec("tokenizers") is not None
        kind_of_tokenizer = getattr(tokenization, f"{_prefix(loaded.config)}Tokenizer{'Fast' if use_fast else ''}")
        tokenizer = kind_of_tokenizer.from_pretrained(tokenizer, **place)
    if backend is not None:
        loaded.set_backend(backend)
    return kind(loaded, tokenizer, batch_size=batch_size, progress=progress, **options)


def _moved(model: PreTrainedModel, device=None, device_map=None, dtype=None, torch_dtype=None) -> PreTrainedModel:
    if dtype is not None or torch_dtype is not None:
        dtype = chosen_dtype(dtype, torch_dtype)
    if dtype == "auto":
        dtype = None  # The model already has the checkpoint's dtype.
    device, device_map = placement(device, device_map)
    if device is not None or dtype is not None:
        model = model.to(device=device, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model if device_map is None else spread(model, device_map)  # type: ignore[return-value]


def _prefix(config: DebertaConfig) -> str:
    return "Deberta" if config.generation == 1 else "DebertaV2"
