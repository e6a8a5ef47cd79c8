"""Packed sequences for patched models: ``model(input_ids, cu_seqlens=..., max_seqlen=...)``, as for native ones.

The sequences go through Hugging Face's embeddings and heads as a padded batch, and without padding through the encoder,
which takes nearly all the time. So every output and loss equals that of the padded batch, token by token.
"""

import inspect

import torch
from torch import nn

from ..models.model import given_packing
from ..models.packing import Packing, check_choices
from .fallback import Shared, hf_class

# Heads that have one logit vector and one label per token.
_PER_TOKEN = ("ForMaskedLM", "ForTokenClassification")
_HEADS = ("Model", *_PER_TOKEN, "ForSequenceClassification", "ForQuestionAnswering", "ForMultipleChoice")
MODELS = {prefix + head for prefix in ("Deberta", "DebertaV2") for head in _HEADS}


def run_model(model: nn.Module, shared: Shared, *arguments, cu_seqlens=None, max_seqlen=None, choices=None, **keywords):
    """The forward of a Hugging Face model, extended by packed sequences.

    Args:
        arguments, keywords: those of the model's own forward, in its order. With cu_seqlens they are (T,) or
            (T, embedding_size) instead of (B, L) or (B, L, embedding_size), and so are labels of tokens.
        cu_seqlens, max_seqlen: see ``DebertaModel``.
        choices: for multiple choice, the number of successive sequences that belong to one question.

    Returns:
        What the model's own forward returns; with cu_seqlens, (T, ...) instead of (B, L, ...).
    """
    own, config = type(model).forward, model.config
    shares = shared.context is not None and shared.sharding is None
    if cu_seqlens is None and not shares:
        for name, value in (("max_seqlen", max_seqlen), ("choices", choices)):
            if value is not None:
                raise ValueError(f"{name} belongs to packed sequences: got {name}={value} and no cu_seqlens")
        return own(model, *arguments, **keywords)
    given = inspect.signature(own).bind(model, *arguments, **keywords).arguments
    given |= given.pop("kwargs", {})
    del given[next(iter(given))]  # self
    given = {name: x for name, x in given.items() if x is not None}
    if given.pop("output_attentions", config.output_attentions):
        raise ValueError("output_attentions must be False with cu_seqlens or shared sequences: no probabilities")
    return_dict = given.pop("return_dict", None)
    return_dict = config.return_dict if return_dict is None else return_dict
    if shares:
        from .sharded import run_sharded  # which imports torch.distributed's parts

        packed = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        output = run_sharded(model, shared, _head(model), given, packed)
        return output if return_dict else output.to_tuple()
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    packing = given_packing(cu_seqlens, max_seqlen, given.get("attention_mask"), ids, embeddings)
    tokens = (embeddings if ids is None else ids).shape[0]
    with shared.removing_padding():
        output = own(model, **_padded(model, packing, given, tokens, choices), return_dict=True)
    per_token = ("last_hidden_state", "start_logits", "end_logits") + ("logits",) * (_head(model) in _PER_TOKEN)
    for name, value in list(output.items()):
        if name == "hidden_states":
            output[name] = tuple(packing.by_token(x, tokens) for x in value)
        elif name in per_token:
            output[name] = packing.by_token(value, tokens)
    return output if return_dict else output.to_tuple()


def signature_of(model: nn.Module) -> inspect.Signature:
    """Returns the signature of the model's own forward, extended by the arguments that ``run_model`` adds."""
    _, *parameters = inspect.signature(type(model).forward).parameters.values()
    own = [x.replace(annotation=inspect.Parameter.empty) for x in parameters]  # annotations may not pickle
    names = ["cu_seqlens", "max_seqlen"] + ["choices"] * (_head(model) == "ForMultipleChoice")
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    rest = [x for x in own if x.kind == inspect.Parameter.VAR_KEYWORD]
    return inspect.Signature([*(x for x in own if x not in rest), *added, *rest])


def _padded(model: nn.Module, packing: Packing, given: dict, tokens: int, choices: int | None) -> dict:
    """Pads the packed arguments to those of a batch."""
    fill = {"input_ids": model.config.pad_token_id or 0, "attention_mask": 0}
    fill |= {"inputs_embeds": 0, "token_type_ids": 0, "position_ids": 0}
    if _head(model) in _PER_TOKEN:
        fill["labels"] = -100
    visible = torch.ones(tokens, device=packing.cu_seqlens.device) if packing.mask is None else packing.mask
    batch = {**given, "attention_mask": visible.long()}
    for name in [name for name in batch if name in fill]:
        x = batch[name]
        if x.shape[:1] != (tokens,) or (x.dim() > 1 and name != "inputs_embeds"):
            raise ValueError(f"{name} must be of shape {(tokens,)}, got {tuple(x.shape)}")
        batch[name] = packing.by_sequence(x, fill[name])
    if _head(model) == "ForMultipleChoice":
        check_choices(packing, choices)
        return {name: x.unflatten(0, (-1, choices)) if name in fill else x for name, x in batch.items()}
    if choices is not None:
        raise ValueError(f"choices belong to multiple choice, got choices={choices}")
    return batch


def _head(model: nn.Module) -> str:
    return hf_class(type(model)).__name__.removeprefix("Deberta").removeprefix("V2")
