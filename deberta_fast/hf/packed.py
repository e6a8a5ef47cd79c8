"""Packed sequences for patched models: ``model(input_ids, cu_seqlens=..., max_seqlen=...)``, as for native ones.

The sequences go through Hugging Face's embeddings and heads as a padded batch, and through the encoder, where nearly
all the time goes, without padding. So every output and loss is that of the padded batch, token by token.
"""

import inspect

import torch
from torch import nn

from ..models.packing import Packing, packed_sequences
from .fallback import Shared, hf_class

# Heads whose logits and labels are one a token
_OF_TOKENS = ("ForMaskedLM", "ForTokenClassification")
_HEADS = ("Model", *_OF_TOKENS, "ForSequenceClassification", "ForQuestionAnswering", "ForMultipleChoice")
MODELS = {
    (f"{module}.modeling_{module}", prefix + head)
    for module, prefix in (("deberta", "Deberta"), ("deberta_v2", "DebertaV2"))
    for head in _HEADS
}


def run_model(model: nn.Module, shared: Shared, *arguments, cu_seqlens=None, max_seqlen=None, choices=None, **keywords):
    """The forward of a Hugging Face model, which takes packed sequences too.

    Args:
        arguments, keywords: of the model's own forward, in its order; with cu_seqlens, (T,) or (T, embedding_size)
            where they are (B, L) or (B, L, embedding_size). labels are (T,) where they are one a token.
        cu_seqlens: int32 (n + 1,), on the same device: sequence s lies at rows cu_seqlens[s] to cu_seqlens[s + 1].
        max_seqlen: at least the longest sequence's length; None reads it from cu_seqlens.
        choices: of multiple choice: every so many sequences are one question's.

    Returns:
        What the model's own forward returns; with cu_seqlens, (T, ...) where that is (B, L, ...).

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    own = type(model).forward
    if cu_seqlens is None:
        for name, value in (("max_seqlen", max_seqlen), ("choices", choices)):
            if value is not None:
                raise ValueError(f"{name} belongs to packed sequences: got {name}={value} and no cu_seqlens")
        return own(model, *arguments, **keywords)
    given = inspect.signature(own).bind(model, *arguments, **keywords).arguments
    given |= given.pop("kwargs", {})
    del given[next(iter(given))]  # self
    given = {name: x for name, x in given.items() if x is not None}
    if given.pop("output_attentions", model.config.output_attentions):
        raise ValueError("output_attentions must be False with cu_seqlens: packed sequences have no probabilities")
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeddings is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    states = embeddings if ids is None else ids
    if states.dim() != (2 if ids is None else 1) or states.shape[0] == 0:
        name, form = ("inputs_embeds", "(T, embedding_size)") if ids is None else ("input_ids", "(T,)")
        raise ValueError(f"{name} must be of shape {form} with T at least 1, got {tuple(states.shape)}")
    packing = packed_sequences(cu_seqlens, max_seqlen, given.pop("attention_mask", None), states)
    named = given.pop("return_dict", None)
    with shared.taking_out_padding():
        output = own(model, **_padded(model, packing, given, states, choices), return_dict=True)
    for name, value in list(output.items()):
        output[name] = _by_token(model, packing, name, value, states.shape[0])
    return output if (model.config.return_dict if named is None else named) else output.to_tuple()


def signature_of(model: nn.Module) -> inspect.Signature:
    """Returns the signature of the model's own forward, with what ``run_model`` takes besides."""
    _, *parameters = inspect.signature(type(model).forward).parameters.values()
    own = [x.replace(annotation=inspect.Parameter.empty) for x in parameters]  # which need not pickle
    names = ["cu_seqlens", "max_seqlen"] + ["choices"] * (_head(model) == "ForMultipleChoice")
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    rest = [x for x in own if x.kind == inspect.Parameter.VAR_KEYWORD]
    return inspect.Signature([*(x for x in own if x not in rest), *added, *rest])


def _padded(model: nn.Module, packing: Packing, given: dict, states: torch.Tensor, choices: int | None) -> dict:
    """The arguments as those of a padded batch."""
    tokens = states.shape[0]
    seen = torch.ones(tokens, dtype=torch.long, device=states.device) if packing.mask is None else packing.mask.long()
    of_tokens = {
        "input_ids": model.config.pad_token_id or 0,
        "inputs_embeds": 0,
        "token_type_ids": 0,
        "position_ids": 0,
    }
    if _head(model) in _OF_TOKENS:
        of_tokens["labels"] = -100
    batch = {"attention_mask": packing.by_sequence(seen, 0)}
    for name, x in given.items():
        if name not in of_tokens:
            batch[name] = x
            continue
        if x.shape[:1] != (tokens,) or (x.dim() > 1 and name != "inputs_embeds"):
            raise ValueError(f"{name} must be of shape {(tokens,)}, got {tuple(x.shape)}")
        batch[name] = packing.by_sequence(x, of_tokens[name])
    if _head(model) != "ForMultipleChoice":
        if choices is not None:
            raise ValueError(f"choices belong to multiple choice, got choices={choices}")
        return batch
    sequences = packing.cu_seqlens.shape[0] - 1
    if not isinstance(choices, int) or choices < 1 or sequences % choices:
        raise ValueError(f"choices must divide the number of sequences, {sequences}, got {choices}")
    names = of_tokens.keys() | {"attention_mask"}
    return {name: x.unflatten(0, (-1, choices)) if name in names else x for name, x in batch.items()}


def _by_token(model: nn.Module, packing: Packing, name: str, value, tokens: int):
    if name == "hidden_states":
        return tuple(packing.by_token(x, tokens) for x in value)
    one_a_token = name in ("last_hidden_state", "start_logits", "end_logits")
    if one_a_token or (name == "logits" and _head(model) in _OF_TOKENS):
        return packing.by_token(value, tokens)
    return value


def _head(model: nn.Module) -> str:
    return hf_class(type(model)).__name__.removeprefix("Deberta").removeprefix("V2")
