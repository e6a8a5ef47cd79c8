"""DeBERTa-v3-base, and other modules on the parameters of one."""

import copy

import torch
from torch import nn
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder

import deberta_fast
from deberta_fast.models.encoder import DebertaEncoder

# The entries of the public checkpoint's config.json that differ from Hugging Face's defaults or shape the model.
V3_BASE = dict(
    vocab_size=128100,
    hidden_size=768,
    num_attention_heads=12,
    intermediate_size=3072,
    num_hidden_layers=12,
    max_position_embeddings=512,
    type_vocab_size=0,
    relative_attention=True,
    position_buckets=256,
    position_biased_input=False,
    share_att_key=True,
    pos_att_type=["p2c", "c2p"],
    norm_rel_ebd="layer_norm",
    layer_norm_eps=1e-7,
)


def encoder_v3_base(layers: int) -> DebertaV2Encoder:
    """Makes Hugging Face's encoder of DeBERTa-v3-base's shape, with random weights of a fixed seed."""
    torch.manual_seed(0)
    encoder = DebertaV2Encoder(DebertaV2Config(**V3_BASE | {"num_hidden_layers": layers})).eval()
    encoder.config = encoder.layer[0].attention.config
    return encoder


def native_encoder(encoder: DebertaV2Encoder) -> DebertaEncoder:
    config = deberta_fast.DebertaV2Config(**V3_BASE | {"num_hidden_layers": len(encoder.layer)})
    return native(DebertaEncoder, config, encoder)


def native(kind: type, config: deberta_fast.DebertaV2Config, model: nn.Module) -> nn.Module:
    """Makes this package's module of a kind on the parameters of Hugging Face's ``model``."""
    with torch.device("meta"):
        twin = kind(config)
    twin.load_state_dict(dict(model.named_parameters()), assign=True)
    return twin.eval()


def sharing_parameters(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def plain_encoder(encoder: DebertaV2Encoder) -> DebertaV2Encoder:
    """Copies the encoder with plain attention in place of disentangled attention."""
    twin = sharing_parameters(encoder)
    for layer in twin.layer:
        attention = layer.attention.self
        attention.forward = lambda hidden, *_, attention=attention, **__: (plain_attention(attention, hidden), None)
    return twin


def plain_attention(attention: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Applies scaled_dot_product_attention to the module's projections of (B, L, hidden_size): no position terms."""
    query, key, value = (
        project(hidden).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for project in (attention.query_proj, attention.key_proj, attention.value_proj)
    )
    return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
