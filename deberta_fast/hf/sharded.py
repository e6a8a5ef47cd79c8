"""Patched models whose sequences several processes share: each gets the stretch that ``shard_batch`` cut for it.

Hugging Face's embeddings and heads see this process's rows as a batch, packed ones as a batch of one. The layers get a
``Sharding`` in place of the mask. Losses of tokens and spans are computed here, over all processes.
"""

import functools

import torch
from torch import nn

from ..models.model import given_rows
from ..models.sharding import ContextParallel, Sharding
from .fallback import MARK, Shared, hf_class, instance_forward

_OF_ROWS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")


def settings_of(model: nn.Module) -> list[Shared]:
    """The settings of the calls of ``patch`` that patched modules of ``model``."""
    found: dict[int, Shared] = {}
    for module in model.modules():
        arguments = getattr(instance_forward(module), "args", ()) if MARK in vars(module) else ()
        found |= {id(x): x for x in arguments if isinstance(x, Shared)}
    return list(found.values())


def share(model: nn.Module, context: ContextParallel | None) -> None:
    """Makes the patched modules of ``model`` share sequences with other processes; None ends that."""
    settings = settings_of(model)
    for shared in settings:
        for hook in shared.hooks:
            hook.remove()
        shared.context, shared.hooks = context, []
    if context is None or not settings:
        return
    for module in model.modules():
        if (own := hf_class(type(module))) is not None and own.__name__ == "ContextPooler":
            hook = module.register_forward_pre_hook(functools.partial(_with_first_tokens, settings))
            settings[0].hooks.append(hook)


def _with_first_tokens(settings: list[Shared], pooler: nn.Module, inputs: tuple) -> tuple | None:
    """Hands the pooler, which reads row 0, each sequence's first token, wherever it lies."""
    sharding = next((shared.sharding for shared in settings if shared.sharding is not None), None)
    if sharding is None:
        return None
    states = inputs[0].squeeze(0) if sharding.cu_seqlens is not None else inputs[0]
    return (sharding.first_tokens(states).unsqueeze(1),)


def run_sharded(model: nn.Module, shared: Shared, head: str, given: dict, packed: dict):
    """Runs Hugging Face's forward on this process's rows.

    Args:
        head: the class's name without prefix, "ForMaskedLM" or "Model".
        given: the arguments of that forward which are not None, of this process's rows; return_dict must be absent.
        packed: cu_seqlens and max_seqlen of all processes' sequences, or None.

    Returns:
        What that forward returns with return_dict=True; packed rows are (T_r, ...).
    """
    rows = given_rows(given.get("input_ids"), given.get("inputs_embeds"))
    mask, is_packed = given.get("attention_mask"), packed["cu_seqlens"] is not None
    if head == "ForMultipleChoice":
        if is_packed:
            raise ValueError("patched models for multiple choice take no packed sequences that processes share")
        rows, mask = rows.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
    assert shared.context is not None
    sharding = shared.context.sharding(rows, mask, **packed, padding_rows=shared.unpadding.padding_rows)
    targets = [given.pop(name, None) for name in _TARGETS.get(head, ())]
    shape = given["input_ids"].shape if "input_ids" in given else given["inputs_embeds"].shape[:-1]
    given.setdefault("position_ids", sharding.positions(shape[-1]).expand(shape).contiguous())
    if is_packed:
        given |= {name: given[name].unsqueeze(0) for name in _OF_ROWS if name in given}
    with shared.sharing(sharding):
        output = type(model).forward(model, **given, return_dict=True)
    if is_packed:
        for name in ("last_hidden_state", "start_logits", "end_logits", *["logits"] * (head in _TARGETS)):
            if name in output:
                output[name] = output[name].squeeze(0)
        if "hidden_states" in output:
            output["hidden_states"] = tuple(x.squeeze(0) for x in output["hidden_states"])
    if not targets or any(x is None for x in targets):
        return output
    loss = _loss(sharding, output, targets)
    return type(output)(loss=loss, **{name: x for name, x in output.items() if name != "loss"})


# The arguments from which losses over all processes' rows are computed, by head.
_TARGETS = {
    "ForMaskedLM": ("labels",),
    "ForTokenClassification": ("labels",),
    "ForQuestionAnswering": ("start_positions", "end_positions"),
}


def _loss(sharding: Sharding, output, targets: list[torch.Tensor]) -> torch.Tensor:
    if len(targets) == 1:
        return sharding.token_loss(output.logits, targets[0])
    return sharding.span_loss(output.start_logits, output.end_logits, *targets)
