"""What the CPU benchmarks run: one DeBERTa-v3-base attention module, or an encoder of such layers, in four variants.

    eager    Hugging Face's own. The module gets what Hugging Face's encoder hands it, made beforehand: the (B, 1, L, L)
             mask and the (1, L, L) relative positions.
    patched  the same modules after ``deberta_fast.patch``. The module gets what the patched encoder hands it: the
             (B, L) bool mask and no relative positions.
    native   this package's own modules on the same weights, with the (B, L) bool mask.
    plain    torch's scaled_dot_product_attention between the same projections: no position terms, no mask. Not
             DeBERTa, but what the rest of the layer and the fastest attention at hand cost.

An encoder gets the (B, L) mask of a tokenizer in every variant; the plain one still makes the L x L mask and positions
that it does not read. float32, dropout off, nothing masked.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder

import deberta_fast
from deberta_fast.models.encoder import DebertaEncoder

VARIANTS = ("eager", "patched", "native", "plain")
LEVELS = ("attention", "encoder")
PASSES = ("forward", "forward+backward")
ENCODER_LAYERS = 2
HIDDEN_SIZE = 768


def calls(level: str, passes: str, batch: int, length: int) -> dict[str, Callable[[], None]]:
    """A call without arguments for each variant, all on one set of weights and one random input.

    Args:
        level: "attention", the module with its projections, or "encoder", ENCODER_LAYERS whole layers.
        passes: "forward", without gradients, or "forward+backward", with those of input, weights and positions.
    """
    encoder = encoder_v3_base(1 if level == "attention" else ENCODER_LAYERS)
    return {variant: call(_twin(encoder, variant), level, variant, passes, batch, length) for variant in VARIANTS}


def measured(level: str, variant: str, passes: str, batch: int, length: int) -> list[Callable[[], None]]:
    """For ``timing.peak_memory``: the one call, after the same over a few tokens. Inputs and .grad are there before."""
    encoder = _twin(encoder_v3_base(1 if level == "attention" else ENCODER_LAYERS), variant)
    call(encoder, level, variant, passes, 1, 8)()
    return [call(encoder, level, variant, passes, batch, length)]


def call(
    encoder: DebertaV2Encoder | DebertaEncoder, level: str, variant: str, passes: str, batch: int, length: int
) -> Callable[[], None]:
    """One variant's call; ``encoder`` must already be that variant."""
    training = passes == "forward+backward"
    hidden = torch.randn(batch, length, HIDDEN_SIZE, requires_grad=training)
    gradient = torch.randn_like(hidden, requires_grad=False) if training else None
    mask = torch.ones(batch, length, dtype=torch.int64)
    if level == "encoder" and variant == "native":
        mask = mask.bool()
        forward = lambda: encoder(hidden, mask, mask)[0][-1]
    elif level == "encoder":
        forward = lambda: encoder(hidden, mask).last_hidden_state
    else:
        attention = encoder.layer[0].attention.self
        table = (encoder.table() if variant == "native" else encoder.get_rel_embedding()).detach()
        arguments = {"rel_embeddings": table.requires_grad_(training)}
        if variant in ("patched", "native"):
            mask = mask.bool()
        else:
            mask, arguments["relative_pos"] = encoder.get_attention_mask(mask), encoder.get_rel_pos(hidden)
        forward = lambda: attention(hidden, mask, **arguments)[0]
    return functools.partial(_run, forward, gradient)


def _run(forward: Callable[[], torch.Tensor], gradient: torch.Tensor | None) -> None:
    with torch.set_grad_enabled(gradient is not None):
        output = forward()
    if gradient is not None:
        output.backward(gradient)


def encoder_v3_base(layers: int) -> DebertaV2Encoder:
    """Hugging Face's encoder of DeBERTa-v3-base's shape, random weights under a fixed seed."""
    torch.manual_seed(0)
    encoder = DebertaV2Encoder(config(DebertaV2Config, layers)).eval()
    encoder.config = encoder.layer[0].attention.config
    return encoder


def config(kind: type, layers: int):
    """DeBERTa-v3-base's shape as a configuration of Hugging Face's or this package's."""
    return kind(
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=12,
        intermediate_size=3072,
        num_hidden_layers=layers,
        relative_attention=True,
        position_buckets=256,
        max_position_embeddings=512,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        layer_norm_eps=1e-7,
    )


def _twin(encoder: DebertaV2Encoder, variant: str) -> DebertaV2Encoder | DebertaEncoder:
    """The encoder as that variant, on the same parameters."""
    if variant == "native":
        with torch.device("meta"):
            twin = DebertaEncoder(config(deberta_fast.DebertaV2Config, len(encoder.layer))).eval()
        twin.load_state_dict(dict(encoder.named_parameters()), assign=True)
        return twin
    twin = copy.deepcopy(encoder, {id(parameter): parameter for parameter in encoder.parameters()})
    if variant == "patched":
        deberta_fast.patch(twin)
    elif variant == "plain":
        for layer in twin.layer:
            layer.attention.self.forward = functools.partial(_plain_attention, layer.attention.self)
    return twin


def _plain_attention(attention: nn.Module, hidden: torch.Tensor, *_, **__) -> tuple[torch.Tensor, None]:
    query, key, value = (
        project(hidden).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for project in (attention.query_proj, attention.key_proj, attention.value_proj)
    )
    return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2), None
