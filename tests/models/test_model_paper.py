"""The models, judged by a slow transcription of the papers: He et al. 2021 (2006.03654) and 2023 (2111.09543).

Where they leave something open, the transcription does what Microsoft's code does.
"""

import math

import pytest
import torch
from native_models import LENGTH, build, settings, tokens

EPS = 1e-7


def row_of(distance: int, buckets: int, longest: int, far_negative: str) -> int:
    """δ(i, j) of 2006.03654, equation 3, for i - j = distance. Beyond half of the buckets, it grows logarithmically."""
    if buckets < 1:
        return min(max(distance + longest, 0), 2 * longest - 1)
    if far_negative == "ms":
        distance = min(max(distance, 1 - longest), longest - 1)
    near = buckets // 2
    if abs(distance) > near:
        steps = math.ceil(math.log(abs(distance) / near) / math.log((longest - 1) / near) * (near - 1))
        distance = (steps + near) * (1 if distance > 0 else -1)
    return min(max(distance + buckets, 0), 2 * buckets - 1)


class Paper:
    """DeBERTa, computed from a flat dictionary of weights and the settings of a configuration."""

    def __init__(self, weights: dict, settings: dict, version: int):
        self.weights, self.version = weights, version
        self.heads, self.layers = settings["num_attention_heads"], settings["num_hidden_layers"]
        named = settings["pos_att_type"]
        named = [x.strip().lower() for x in named.split("|")] if isinstance(named, str) else list(named)
        self.terms = named if settings["relative_attention"] else []
        self.n = 1 + (len(named) if version == 1 else ("c2p" in named) + ("p2c" in named))
        longest = settings.get("max_relative_positions", -1)
        longest = longest if longest >= 1 else settings["max_position_embeddings"]
        self.table = settings.get("position_buckets", -1), longest, settings.get("far_negative", "hf")
        self.get = settings.get

    def linear(self, name, x, bias=True):
        y = torch.einsum("...i,oi->...o", x, self.weights[name + ".weight"])
        return y + self.weights[name + ".bias"] if bias else y

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def gelu(self, x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1))

    def positions(self, ids):
        return self.weights["embeddings.position_embeddings.weight"][ids]

    def embed(self, ids, types, mask, position_ids):
        x = self.weights["embeddings.word_embeddings.weight"][ids]
        if self.get("position_biased_input", True):
            x = x + self.positions(position_ids)
        x = x + self.weights["embeddings.token_type_embeddings.weight"][types]
        return self.norm("embeddings.LayerNorm", self.widen(x)) * mask[..., None]

    def widen(self, x):
        return self.linear("embeddings.embed_proj", x, bias=False) if self.get("embedding_size") else x

    def relative_table(self):
        table = self.weights["encoder.rel_embeddings.weight"]
        return self.norm("encoder.LayerNorm", table) if self.get("norm_rel_ebd") == "layer_norm" else table

    def attention(self, name, queries_of, keys_of, may_attend):
        """Equation 4, with Q^r_δ(i,j) in place of Q^r_δ(j,i), as in the released code and every trained checkpoint."""
        v1 = self.version == 1
        q = self.split(self.linear(name + "query_proj", queries_of))
        k = self.split(self.linear(name + "key_proj", keys_of, bias=not v1))
        v = self.split(self.linear(name + "value_proj", keys_of))
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        if self.terms:
            length = range(keys_of.shape[1])
            delta = torch.tensor([[row_of(i - j, *self.table) for j in length] for i in length])
            key_name, query_name = ("key_proj", "query_proj") if self.get("share_att_key") else ("pos_key_proj",) * 2
            query_name = query_name.replace("pos_key", "pos_query")
        if "c2p" in self.terms:
            key_rows = self.split(self.linear(name + key_name, self.relative_table(), bias=not v1))
            scores = scores + torch.einsum("bihd,ijhd->bhij", q, key_rows[delta])
        if "p2c" in self.terms:
            query_rows = self.split(self.linear(name + query_name, self.relative_table()))
            scores = scores + torch.einsum("bjhd,ijhd->bhij", k, query_rows[delta])
        scores = scores / math.sqrt(q.shape[-1] * self.n)
        if self.get("talking_head"):
            scores = torch.einsum("bhij,gh->bgij", scores, self.weights[name + "head_logits_proj.weight"])
        # The paper does not define a query that sees no key; Hugging Face's models weigh all keys alike then
        blind = may_attend.sum(-1, keepdim=True)[:, None] == 0
        weight = (scores - scores.amax(-1, keepdim=True).detach()).exp() * may_attend[:, None]
        weight = weight.masked_fill(blind, 1.0)
        probabilities = weight / weight.sum(-1, keepdim=True).clamp(min=1e-300 if weight.dtype.itemsize > 4 else 1e-30)
        if self.get("talking_head"):
            mixing = self.weights[name + "head_weights_proj.weight"]
            probabilities = torch.einsum("bhij,gh->bgij", probabilities, mixing)
        return torch.einsum("bhij,bjhd->bihd", probabilities, v).flatten(-2), probabilities

    def layer(self, index, queries_of, keys_of, may_attend):
        name = f"encoder.layer.{index}."
        context, probabilities = self.attention(name + "attention.self.", queries_of, keys_of, may_attend)
        x = self.linear(name + "attention.output.dense", context) + queries_of
        x = self.norm(name + "attention.output.LayerNorm", x)
        inner = self.gelu(self.linear(name + "intermediate.dense", x))
        return self.norm(name + "output.LayerNorm", self.linear(name + "output.dense", inner) + x), probabilities

    def convolve(self, embedded, first, mask):
        """nGiE: a convolution of the embeddings is added to the first layer's output."""
        weight, bias = self.weights["encoder.conv.conv.weight"], self.weights["encoder.conv.conv.bias"]
        taps, groups = weight.shape[-1], self.get("conv_groups", 1)
        padded = torch.nn.functional.pad(embedded, (0, 0, taps // 2, taps // 2)).unflatten(-1, (groups, -1))
        weight = weight.unflatten(0, (groups, -1))
        length = embedded.shape[1]
        x = sum(torch.einsum("blgi,goi->blgo", padded[:, t : t + length], weight[..., t]) for t in range(taps))
        x = (x.flatten(-2) + bias) * mask[..., None]
        x = {"tanh": torch.tanh, "gelu": self.gelu}[self.get("conv_act", "tanh")](x)
        return self.norm("encoder.conv.LayerNorm", first + x) * mask[..., None]

    def encode(self, ids, types, mask, position_ids=None, pairs=None):
        """The embeddings, every layer's output, and every layer's probabilities."""
        position_ids = torch.arange(ids.shape[1]).expand_as(ids) if position_ids is None else position_ids
        mask = mask.to(self.weights["embeddings.LayerNorm.weight"].dtype)
        may_attend = mask[:, :, None] * mask[:, None] if pairs is None else pairs.to(mask.dtype)
        states, probabilities = [self.embed(ids, types, mask, position_ids)], []
        for index in range(self.layers):
            x, probability = self.layer(index, states[-1], states[-1], may_attend)
            if index == 0 and self.get("conv_kernel_size", 0) > 0:
                x = self.convolve(states[0], x, mask)
            states.append(x)
            probabilities.append(probability)
        # z_steps: the last layer runs again, with the same keys and values
        for _ in range(1, self.get("z_steps", 0)):
            states.append(self.layer(self.layers - 1, states[-1], states[self.layers - 1], may_attend)[0])
        self.decoded = states[-1]
        if self.get("enhanced_mask_decoder") and not self.get("position_biased_input", True):
            keys_of = states[self.layers - 1]
            self.decoded = keys_of + self.widen(self.positions(position_ids))
            for _ in range(2):
                self.decoded = self.layer(self.layers - 1, self.decoded, keys_of, may_attend)[0]
        return states, probabilities

    def predict(self):
        """Scores of the vocabulary for the last inputs of ``encode``."""
        x = self.norm("lm_head.LayerNorm", self.gelu(self.linear("lm_head.dense", self.decoded)))
        output = self.weights.get("lm_head.decoder.weight", self.weights["embeddings.word_embeddings.weight"])
        return torch.einsum("blw,vw->blv", x, output) + self.weights["lm_head.bias"]


def transcribed(model, name, **changes):
    """The transcription, and its weights under their names in the model."""
    ours = {key: value.detach().clone().requires_grad_() for key, value in model.named_parameters()}
    bare = {key.removeprefix("deberta.").removeprefix("lm_predictions."): value for key, value in ours.items()}
    return Paper(bare, settings(name, **changes), 1 if name.startswith("v1") else 2), ours


def masked_loss(logits, labels):
    chosen = labels >= 0
    return -logits[chosen].log_softmax(-1).gather(-1, labels[chosen][:, None]).mean()


def labels_of(inputs):
    """Labels for every third position, except padding."""
    chosen = (inputs["attention_mask"] == 1) & (torch.arange(inputs["input_ids"].shape[1]) % 3 == 0)
    return torch.where(chosen, (inputs["input_ids"] * 7) % 70, -100)


EMD = dict(enhanced_mask_decoder=True)
WHOLE = {
    "v1": ("v1", "left", {}),
    "v1-emd": ("v1", "right", dict(EMD, position_biased_input=False)),
    "v1-talking-heads": ("v1-talking-heads", "right", {}),
    "v1-three-names-two-terms": ("v1-three-names-two-terms", "none", {}),
    "v1-absolute-only": ("v1-absolute-only", "holes", {}),
    "v2-conv-emd-without-effect": ("v2", "right", EMD),
    "v2-conv-wide": ("v3-conv", "holes", {}),
    "v2-conv-emd": ("v3-conv", "left", EMD),
    "v2-unbucketed-p2c-untied": ("v2-unbucketed-p2c", "left", dict(tie_word_embeddings=False)),
    "v2-unbucketed-ms": ("v2-unbucketed-p2c", "none", dict(far_negative="ms", pos_att_type="p2c|c2p")),
    "v2-c2p-narrow-emd": ("v2-c2p-narrow-embeddings", "right", dict(EMD, position_biased_input=False)),
    "v3": ("v3", "holes", {}),
    "v3-not-shared": ("v3", "right", dict(share_att_key=False)),
    "v3-emd": ("v3", "right", EMD),
    "v3-emd-ms": ("v3-ms", "left", EMD),
    "v3-emd-one-layer": ("v3", "holes", dict(EMD, num_hidden_layers=1)),
    "v3-z-steps": ("v3", "right", dict(z_steps=3)),
    "v3-z-steps-emd": ("v3", "left", dict(EMD, z_steps=2)),
    "v2-conv-z-steps-one-layer": ("v2", "right", dict(z_steps=2, num_hidden_layers=1)),
}
whole = pytest.mark.parametrize("name, padding, changes", WHOLE.values(), ids=WHOLE)


@whole
def test_states_logits_and_all_gradients(name, padding, changes):
    model = build(name, "ForMaskedLM", **changes).double()
    paper, weights = transcribed(model, name, **changes)
    inputs = tokens(padding)
    labels, valid = labels_of(inputs), inputs["attention_mask"] == 1
    ours = model(**inputs, labels=labels, output_hidden_states=True)
    states, _ = paper.encode(*inputs.values())
    logits = paper.predict()
    loss = masked_loss(logits, labels)
    assert len(ours.hidden_states) == len(states)
    for index, (mine, theirs) in enumerate(zip(ours.hidden_states, states)):
        assert (mine - theirs)[valid].abs().max() < 1e-9, index
    assert (ours.logits - logits)[valid].abs().max() < 1e-9
    assert abs(ours.loss - loss) < 1e-9
    ours.loss.backward()
    loss.backward()
    for key, parameter in model.named_parameters():
        expected = weights[key].grad
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), key
            continue
        assert (parameter.grad - expected).abs().max() < 1e-9, key
        # the softmax sees a key's bias only through position terms
        assert expected.abs().max() > 1e-6 or key.endswith("key_proj.bias"), f"{key} was not under test"


@whole
def test_float32(name, padding, changes):
    model = build(name, "ForMaskedLM", **changes)
    paper, _ = transcribed(model.double(), name, **changes)
    inputs = tokens(padding)
    valid = inputs["attention_mask"] == 1
    with torch.no_grad():
        got = model.float()(**inputs, output_hidden_states=True)
        states, _ = paper.encode(*inputs.values())
        logits = paper.predict()
    for mine, theirs in [*zip(got.hidden_states, states), (got.logits / logits.std(), logits / logits.std())]:
        assert mine.dtype == torch.float32
        assert (mine - theirs)[valid].abs().max() < 1e-5


@pytest.mark.parametrize("name", ["v1", "v1-talking-heads", "v2", "v3"])
def test_attention_probabilities(name):
    model, inputs = build(name).double(), tokens("holes")
    paper, _ = transcribed(model, name)
    got = model(**inputs, output_attentions=True)
    states, expected = paper.encode(*inputs.values())
    valid = inputs["attention_mask"] == 1
    assert (got.last_hidden_state - states[-1])[valid].abs().max() < 1e-9
    for mine, theirs in zip(got.attentions, expected, strict=True):
        assert (mine - theirs).transpose(1, 2)[valid].abs().max() < 1e-9


def test_the_two_far_rules_differ_here():
    """Otherwise the cases above could not tell them apart."""
    got = [build(name).double()(**tokens()).last_hidden_state for name in ("v3", "v3-ms")]
    assert (got[0] - got[1]).abs().max() > 1e-2
    assert row_of(1 - LENGTH, 16, 40, "hf") == 0 and row_of(1 - LENGTH, 16, 40, "ms") == 1


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_pairwise_mask(name):
    """Two texts in one sequence do not attend to each other. The mask is (B, L, L) or (B, 1, L, L)."""
    model, inputs = build(name).double(), tokens("none")
    paper, _ = transcribed(model, name)
    del inputs["attention_mask"]
    part = torch.arange(LENGTH) >= 23
    pairs = (part[:, None] == part[None]).expand(3, -1, -1).clone()
    pairs[0, 30:, 23:30] = False
    pairs[1, :, 50] = False  # no query sees this key: it is padding
    pairs[2, 40] = False  # this query sees no key
    states, _ = paper.encode(*inputs.values(), pairs.any(1), pairs=pairs)
    for given in (pairs, pairs[:, None].long()):
        got = model(**inputs, attention_mask=given).last_hidden_state
        assert (got - states[-1]).abs().max() < 1e-9


@pytest.mark.parametrize("name, changes", [("v1", {}), ("v2", {}), ("v3", EMD)], ids=["v1", "v2", "v3-emd"])
def test_position_ids(name, changes):
    model, inputs = build(name, "ForMaskedLM", **changes).double(), tokens("right")
    paper, _ = transcribed(model, name, **changes)
    position_ids = (torch.arange(LENGTH) * 5 + torch.arange(3)[:, None]) % 64
    paper.encode(*inputs.values(), position_ids=position_ids)
    valid = inputs["attention_mask"] == 1
    got = model(**inputs, position_ids=position_ids).logits
    assert (got - paper.predict())[valid].abs().max() < 1e-9


def test_positions_reach_the_decoder_and_nothing_before_it():
    """If texts differ only in absolute positions, only the logits of the enhanced mask decoder differ."""
    inputs, shifted = tokens(), torch.arange(LENGTH).expand(3, -1) + 2
    for changes, differs in ((EMD, True), ({}, False)):
        model = build("v3", "ForMaskedLM", **changes).double()
        here, there = (model(**inputs, position_ids=x, output_hidden_states=True) for x in (None, shifted))
        assert torch.equal(here.hidden_states[-1], there.hidden_states[-1])
        assert torch.equal(here.logits, there.logits) is not differs
