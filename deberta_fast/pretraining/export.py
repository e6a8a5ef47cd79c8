"""Writes the models of a run where others load them from."""

from pathlib import Path

import torch

from ..checkpoint import to_hf
from . import checkpoints
from .build import described, load_tokenizer, merged_discriminator
from .settings import read_settings
from .sharing import ReplacedTokenModels

PARTS = ("discriminator", "generator", "both")
JOINED = "pytorch_model.bin"


def export(run: str | Path, folder: str | Path, part: str = "both", microsoft: bool = False) -> list[Path]:
    """Exports the models of a run's last checkpoint, or of one of its checkpoints, with the tokenizer.

    Args:
        run: the run's folder, or a checkpoint in it.
        folder: where to write: the checkpoint itself for one part; subfolders ``discriminator`` and ``generator`` for
            both. A run of masked language modelling has a generator only, which goes into ``folder``.
        part: "discriminator", "generator" or "both". The discriminator's embeddings are E_G + E_delta.
        microsoft: also write ``pytorch_model.bin`` in ``folder``, all tensors of both models under Microsoft's names,
            ``generator.*`` and ``discriminator.*`` with ``word_embeddings._weight``, from which a run can continue.

    Returns:
        The folders. ``from_pretrained`` of this package and of transformers loads them.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        ValueError: part is something else, or the run has no such part.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    run, folder = Path(run), Path(folder)
    found = checkpoints.finished(run)
    checkpoint = found[-1] if found else run
    if not (checkpoint / "models.json").is_file():
        raise FileNotFoundError(f"{run} is neither a run with a finished checkpoint nor a checkpoint of one")
    models = described(checkpoint)
    checkpoints.load_weights(checkpoint, models)
    tokenizer = load_tokenizer(read_settings(checkpoint / "settings.yaml"))
    pair = isinstance(models, ReplacedTokenModels)
    if part == "discriminator" and not pair:
        raise ValueError(f"{run} is a run of masked language modelling, which has no discriminator")
    chosen = {}
    if pair and part != "generator":
        chosen["discriminator"] = merged_discriminator(models)
    if part != "discriminator":
        chosen["generator"] = models.generator
    written = []
    for name, model in chosen.items():
        place = folder / name if len(chosen) > 1 else folder
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        written.append(place)
    if microsoft:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(microsoft_names(models), folder / JOINED)
        if folder not in written:
            (models.discriminator if pair else models.generator).config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return written


def microsoft_names(models) -> dict[str, torch.Tensor]:
    """Returns all parameters under the names of Microsoft's joined files: a copy of none."""
    tensors = {}
    for name in ("generator", "discriminator"):
        model = getattr(models, name, None)
        if model is None:
            continue
        config = model.config
        named = to_hf(model.state_dict(), version=config.generation, heads=config.num_attention_heads, legacy=False)
        tensors |= {f"{name}.{x}": value for x, value in named.items()}
    return tensors
