"""Where in a file the model lies: behind a prefix of its own, inside wrappers, or beside the other half of a pair."""

import re

from .error import CheckpointError

# Modules that put themselves around others: DataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BODY = re.compile(r"((?:.*\.)?)embeddings\.(?:word_embeddings|position_embeddings|token_type_embeddings|LayerNorm)\.")
_PARTS = {"generator", "discriminator"}  # of replaced token detection, when both are in one file


def without_prefixes(names: list[str], part: str) -> tuple[list[str], list[bool]]:
    """Each name as in a model of its own, its body under ``deberta.``, and whether it belongs to the other part.

    The body is found by its embeddings: it may be called deberta, bert, model.deberta or nothing at all.

    Raises:
        CheckpointError: the file holds the other part only, or several models that are no pair.
    """
    if part not in _PARTS:
        raise ValueError(f"part must be 'discriminator' or 'generator', got {part!r}")
    names = [".".join(x for x in name.split(".") if x not in _WRAPPERS) for name in names]
    bodies = sorted({found[1] for x in names if (found := _BODY.match(x))}) or ["deberta."]
    (other,) = _PARTS - {part}
    others = [x for x in bodies if other in x.split(".")]
    own = [x for x in bodies if part in x.split(".")] if others else bodies
    if not own:
        raise CheckpointError(f"the file holds a {other} ({others[0]}*), and the {part} was asked for")
    if len(own) > 1 or len(others) > 1:
        raise CheckpointError(f"the file holds several models: {', '.join(x + '*' for x in bodies)}")
    of_other = [bool(others) and x.startswith(_around(others[0])) for x in names]
    return [_strip(x, others[0] if is_other else own[0]) for x, is_other in zip(names, of_other)], of_other


def _strip(name: str, body: str) -> str:
    if name.startswith(body if body else ("embeddings.", "encoder.")):
        return "deberta." + name.removeprefix(body)
    return name.removeprefix(_around(body))


def _around(body: str) -> str:
    """The prefix of the heads that stand beside the body: "model." for "model.deberta."."""
    *outer, last = body.removesuffix(".").split(".")
    return "".join(x + "." for x in ([*outer, last] if last in _PARTS else outer))
