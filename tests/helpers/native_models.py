"""Small random models of this library whose position terms matter, and inputs for them; without transformers."""

import pytest
import torch

import deberta_fast

V3 = dict(position_buckets=16, max_relative_positions=40, share_att_key=True, norm_rel_ebd="layer_norm")
# Names that start with v1 are DebertaConfig's, the others DebertaV2Config's. LENGTH lies beyond every
# max_relative_positions here, on both sides.
LENGTH = 61
CONFIGS = {
    "v1": dict(max_relative_positions=24),
    "v1-talking-heads": dict(max_relative_positions=24, talking_head=True),
    "v1-three-names-two-terms": dict(max_relative_positions=24, pos_att_type=["c2p", "p2c", "p2p"]),
    "v1-absolute-only": dict(relative_attention=False, pos_att_type="None"),
    "v2": dict(position_buckets=16, max_relative_positions=40, conv_kernel_size=3, conv_groups=2),
    "v2-unbucketed-p2c": dict(max_relative_positions=24, pos_att_type=["p2c"], norm_rel_ebd="layer_norm"),
    "v2-c2p-narrow-embeddings": dict(
        position_buckets=8, max_relative_positions=20, pos_att_type="c2p", embedding_size=24, attention_head_size=16
    ),
    "v3": dict(V3, position_biased_input=False),
    "v3-ms": dict(V3, position_biased_input=False, far_negative="ms"),
    "v3-conv": dict(V3, position_biased_input=False, conv_kernel_size=5, conv_act="gelu", num_hidden_layers=3),
}
COMMON = dict(
    vocab_size=70, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48,
    max_position_embeddings=64, type_vocab_size=2, relative_attention=True, pos_att_type=["c2p", "p2c"],
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def settings(name: str, **changes) -> dict:
    return {**COMMON, **CONFIGS[name], **changes}


def randomise(module):
    """Draws weights that keep unit variance: at the usual 0.02, tests would not notice wrong position terms."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        fan_in = 1 if "embeddings" in name else parameter[0].numel() if parameter.dim() > 1 else 10
        drawn = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
        parameter.data.copy_(drawn + 1 if name.endswith("LayerNorm.weight") else drawn)
    return module


def build(name: str = "v3", head: str = "Model", **changes):
    """A model in evaluation mode; ``changes`` are options of its configuration."""
    prefix = "Deberta" if name.startswith("v1") else "DebertaV2"
    config = getattr(deberta_fast, prefix + "Config")(**settings(name, **changes))
    return randomise(getattr(deberta_fast, prefix + head)(config)).eval()


def tokens(padding: str = "none", length: int = LENGTH, batch: int = 3, seed: int = 1) -> dict:
    """input_ids, token_type_ids and attention_mask. All rows except the last are padded; "holes" pads both sides."""
    ids = torch.randint(1, COMMON["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(batch - 1):
        if padding in ("right", "holes"):
            mask[row, length - 9 - 4 * row :] = 0
        if padding in ("left", "holes"):
            mask[row, : 5 + 6 * row] = 0
        if padding == "holes":
            mask[row, 11:40:3] = 0
    return {"input_ids": ids, "token_type_ids": ids % 2, "attention_mask": mask}


NAMES = ("v1", "v2", "v3")
EMD = dict(enhanced_mask_decoder=True)
HEADS = [
    *((name, head) for name in NAMES for head in ("Model", "ForMaskedLM", "ForSequenceClassification")),
    *((name, head) for name in ("v1", "v3") for head in ("ForTokenClassification", "ForQuestionAnswering")),
    ("v3", "ForMultipleChoice"),
]
heads = pytest.mark.parametrize("name, head", HEADS, ids=["-".join(x) for x in HEADS])
names = pytest.mark.parametrize("name", NAMES)


def inputs_of(head, padding="right", length=19, labels=False, batch=3):
    inputs = tokens(padding if length > 18 else "none", length, batch)
    ids = inputs["input_ids"]
    if head == "ForMultipleChoice":
        inputs = {name: torch.stack([x, x.flip(1), x.roll(3, 1)], 1) for name, x in inputs.items()}
    if labels and head == "ForQuestionAnswering":
        return inputs | {"start_positions": ids[:, 0] % length, "end_positions": ids[:, -1] % 5 + 2}
    if labels and head != "Model":
        per_token = head in ("ForMaskedLM", "ForTokenClassification")
        inputs["labels"] = ids % 2 if per_token else ids[:, 0] % 2
    return inputs


def objective(model, inputs):
    """A loss that depends on all that a model returns."""
    outputs = model(**inputs)
    valid = inputs["attention_mask"].bool()
    if "loss" in outputs:
        return outputs.loss
    return (outputs.last_hidden_state[valid] * torch.linspace(-1, 1, 32)).pow(2).mean()


def gradients(model, inputs):
    model.zero_grad()
    objective(model, inputs).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_states(got, expected, mask=None, atol=1e-5):
    chosen = ... if mask is None else mask.bool()
    torch.testing.assert_close(got[chosen], expected[chosen], atol=atol, rtol=1e-5)
