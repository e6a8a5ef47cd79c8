"""The models of a run, new or from checkpoints."""

import importlib.util
import json
from pathlib import Path

import torch
from torch import nn

from .. import tokenization
from ..checkpoint import read_tensors
from ..checkpoint.hub import Source
from ..checkpoint.replace import replace_file
from ..models.config import DebertaConfig, DebertaV2Config, read_config
from ..models.task_models import DebertaForMaskedLM, DebertaV2ForMaskedLM
from .discriminator import DebertaForReplacedTokens
from .settings import Settings
from .sharing import ReplacedTokenModels

DESCRIPTION = "models.json"
SHARED = ("word_embeddings", "position_embeddings")


class LanguageModel(nn.Module):
    """A masked language model alone, under the name that it has beside a discriminator."""

    def __init__(self, config: DebertaConfig):
        super().__init__()
        self.generator = (DebertaV2ForMaskedLM if config.generation > 1 else DebertaForMaskedLM)(config)


def built(settings: Settings, vocabulary: int) -> LanguageModel | ReplacedTokenModels:
    """Makes the run's models, with random weights or those of its checkpoints.

    Args:
        vocabulary: number of the tokenizer's ids, the least vocab_size.

    Raises:
        FileNotFoundError: a checkpoint does not exist.
        TypeError, ValueError: the configuration is not valid, does not fit a checkpoint, or has too few ids.
    """
    config = _config(settings, vocabulary)
    torch.manual_seed(settings.seed)
    if settings.objective == "mlm":
        models: LanguageModel | ReplacedTokenModels = LanguageModel(config)
    else:
        models = ReplacedTokenModels(config, settings.rtd.generator_layers, settings.rtd.sharing)
    if settings.generator:
        _load(models, settings)
    return models


def _config(settings: Settings, vocabulary: int) -> DebertaConfig:
    place = settings.discriminator or settings.generator
    if place:
        config = read_config(Source(_split(place)[0]), **settings.model)
    else:
        values = {"vocab_size": vocabulary, **settings.model}
        kind = values.pop("model_type", "deberta-v2")
        if kind not in (kinds := {x.model_type: x for x in (DebertaConfig, DebertaV2Config)}):
            raise ValueError(f"model.model_type must be one of {', '.join(kinds)}, got {kind!r}")
        config_class, known = kinds[kind], dir(kinds[kind])
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"model: {config_class.__name__} has no {', '.join(unknown)}")
        config = config_class.from_dict(values)
    if settings.objective == "mlm" and "enhanced_mask_decoder" not in settings.model:
        config.enhanced_mask_decoder = not config.position_biased_input
    if config.vocab_size < vocabulary:
        raise ValueError(f"the model has {config.vocab_size} words, and the tokenizer {vocabulary}")
    absolute = config.position_biased_input or config.enhanced_mask_decoder or settings.objective == "rtd"
    if absolute and settings.data.length > config.max_position_embeddings:
        raise ValueError(
            f"data.length must be at most max_position_embeddings={config.max_position_embeddings}, "
            f"got {settings.data.length}"
        )
    return config


def load_tokenizer(settings: Settings):
    """Loads the run's tokenizer, v1's or v2's by the kind of model; the fast one if tokenizers is installed."""
    kind, place = settings.model.get("model_type"), settings.discriminator or settings.generator
    if kind is None and place:
        kind = read_config(Source(_split(place)[0])).model_type
    name = "DebertaTokenizer" if kind == DebertaConfig.model_type else "DebertaV2Tokenizer"
    fast = "Fast" if importlib.util.find_spec("tokenizers") is not None else ""
    return getattr(tokenization, name + fast).from_pretrained(settings.tokenizer)


def _split(place: str) -> tuple[str, str | None]:
    folder, _, file = place.partition("::")
    return folder, file or None


def _load(models: LanguageModel | ReplacedTokenModels, settings: Settings) -> None:
    """Fills the models. E_D of the discriminator's checkpoint becomes E_D - E_G where there is a difference."""
    tensors = _tensors(str(settings.generator), "generator")
    if settings.discriminator:
        tensors |= _tensors(settings.discriminator, "discriminator")
    generator = models.generator
    loaded = type(generator).from_pretrained(None, config=generator.config, state_dict=tensors)
    generator.load_state_dict(loaded.state_dict())
    if isinstance(models, LanguageModel) or not settings.discriminator:
        return
    plain = type(models.discriminator)(models.discriminator.config)
    loaded = type(plain).from_pretrained(None, config=plain.config, state_dict=tensors)
    state = loaded.state_dict()
    embeddings = {}
    for name in SHARED:
        if (key := f"deberta.embeddings.{name}.weight") in state:
            embeddings[name] = state.pop(key)
        # Where the file has the difference, the sum minus E_G would only add rounding.
        difference = tensors.get(f"discriminator.deberta.embeddings.{name}._weight")
        if difference is not None and models.sharing == "gdes" and name in embeddings:
            own = getattr(models.discriminator.deberta.embeddings, name)
            own._weight.data.copy_(difference)
            del embeddings[name]
    torch.nn.Module.load_state_dict(models.discriminator, state, strict=False)
    models.set_discriminator_embeddings(embeddings)


def _tensors(place: str, part: str) -> dict[str, torch.Tensor]:
    """Reads one part's tensors, under names that begin with its name; a file may hold both parts."""
    folder, file = _split(place)
    tensors, name = read_tensors(Source(folder), weights=file)
    if any(x.startswith(("generator.", "discriminator.")) for x in tensors):
        tensors = {x: value for x, value in tensors.items() if x.startswith(part + ".")}
        if not tensors:
            raise ValueError(f"{folder}: {name} holds no {part}")
        return tensors
    return {f"{part}.{x}": value for x, value in tensors.items()}


def describe(models: LanguageModel | ReplacedTokenModels, folder: Path) -> None:
    """Writes what ``described`` needs to make the same models again."""
    described = {"generator": json.loads(models.generator.config.to_json_string())}
    if isinstance(models, ReplacedTokenModels):
        described["discriminator"] = json.loads(models.discriminator.config.to_json_string())
        described["sharing"] = models.sharing
    replace_file(folder / DESCRIPTION, json.dumps(described, indent=2).encode())


def described(folder: Path) -> LanguageModel | ReplacedTokenModels:
    """Makes the models of a checkpoint, with random weights."""
    values = json.loads((folder / DESCRIPTION).read_text())
    config = values.get("discriminator", values["generator"])
    kind = DebertaV2Config if config["model_type"] == DebertaV2Config.model_type else DebertaConfig
    if "discriminator" not in values:
        return LanguageModel(kind.from_dict(config))
    layers = values["generator"]["num_hidden_layers"]
    return ReplacedTokenModels(kind.from_dict(config), layers, values["sharing"])


def merged_discriminator(models: ReplacedTokenModels) -> DebertaForReplacedTokens:
    """Returns a copy of the discriminator whose embeddings are its own: E_G + E_delta."""
    own = models.discriminator
    copy = type(own)(own.config).to(own.dtype)
    state = {name: x for name, x in own.state_dict().items() if not name.endswith("_weight")}
    for name in SHARED:
        embedding = getattr(own.deberta.embeddings, name)
        if embedding is not None:
            state[f"deberta.embeddings.{name}.weight"] = embedding.weight.detach()
    copy.load_state_dict(state)
    return copy.eval()
