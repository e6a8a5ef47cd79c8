"""The reference, judged by Hugging Face's attention modules in float64 and by gradcheck, never by itself."""

import importlib

import pytest
import torch

from deberta_fast import disentangled_attention
from deberta_fast.op.backends import reference
from deberta_fast.op.call import Call

transformers = pytest.importorskip("transformers")
V1, V2 = (importlib.import_module(f"transformers.models.{x}.modeling_{x}") for x in ("deberta", "deberta_v2"))
HEADS = 4
BOTH = ["c2p", "p2c"]
# name: settings, length. Lengths lie below and beyond max_relative_positions.
CASES = {
    "v3-within": (dict(position_buckets=16, max_relative_positions=64, share_att_key=True), 60),
    "v3-beyond": (dict(position_buckets=16, max_relative_positions=64, share_att_key=True), 150),
    "v3-released-table": (dict(position_buckets=256, max_relative_positions=512, share_att_key=True), 530),
    "v3-c2p": (dict(position_buckets=16, max_relative_positions=64, share_att_key=True, pos_att_type=["c2p"]), 90),
    "v3-p2c": (dict(position_buckets=16, max_relative_positions=64, share_att_key=True, pos_att_type=["p2c"]), 90),
    "v2-buckets": (dict(position_buckets=32, max_relative_positions=64), 100),
    "v2-c2p": (dict(position_buckets=8, max_relative_positions=16, pos_att_type=["c2p"]), 40),
    "v2-p2c": (dict(position_buckets=8, max_relative_positions=16, pos_att_type=["p2c"]), 40),
    "v2-no-buckets": (dict(max_relative_positions=20), 50),
    "v2-no-buckets-short": (dict(max_relative_positions=20), 13),
    "v2-no-positions": (dict(relative_attention=False, pos_att_type=None), 50),
    "v2-counted-but-absent": (dict(relative_attention=False), 50),
    "v1-within": (dict(max_relative_positions=64), 50),
    "v1-at-the-limit": (dict(max_relative_positions=50), 50),
    "v1-beyond": (dict(max_relative_positions=20), 50),
    "v1-c2p": (dict(max_relative_positions=20, pos_att_type=["c2p"]), 50),
    "v1-p2c": (dict(max_relative_positions=20, pos_att_type=["p2c"]), 50),
    "v1-no-positions": (dict(relative_attention=False, pos_att_type=None), 50),
    "one-token": (dict(position_buckets=16, max_relative_positions=64, share_att_key=True), 1),
}


@pytest.fixture(autouse=True)
def exact_hf(monkeypatch):
    """Hugging Face takes the root of the scale in float32: its float64 results would be right to 8 digits only."""
    for module in (V1, V2):
        monkeypatch.setattr(
            module, "scaled_size_sqrt", lambda x, n: torch.tensor(float(x.size(-1) * n)).double().sqrt()
        )


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hf_attention(name, **changes):
    """Returns Hugging Face's module with weights that keep unit variance, its inputs, and its results."""
    settings, length = CASES[name]
    v1 = name.startswith("v1")
    common = dict(hidden_size=64, num_attention_heads=HEADS, relative_attention=True, pos_att_type=BOTH)
    config = (transformers.DebertaConfig if v1 else transformers.DebertaV2Config)(**{**common, **settings, **changes})
    attention = (V1 if v1 else V2).DisentangledSelfAttention(config).double().eval()
    for seed, p in enumerate(attention.parameters()):
        p.data = noise(*p.shape, seed=seed) * (p.shape[1] ** -0.5 if p.dim() > 1 else 0.5)
    states = noise(2, length, 64, seed=100)
    buckets = settings.get("position_buckets", -1)
    table = noise(2 * (buckets if buckets > 0 else settings.get("max_relative_positions", 1)), 64, seed=101)
    valid = torch.arange(length) < torch.tensor([[length], [length - length // 3]])
    mask = (valid[:, None, :, None] & valid[:, None, None, :]).long()
    # v2 computes its relative positions, v1 takes them as an argument.
    relative_pos = V1.build_relative_position(states, states) if v1 else None
    with torch.no_grad():
        theirs = attention(states, mask, True, relative_pos=relative_pos, rel_embeddings=table)
        return attention, states, table, valid, theirs


def operands(attention, states, table):
    """Returns query, key, value, pos_key, pos_query from Hugging Face's projections, and the matching settings."""
    heads = lambda projected: projected.unflatten(-1, (HEADS, -1)).transpose(-2, -3)
    settings = dict(max_relative_positions=getattr(attention, "max_relative_positions", 1))
    with torch.no_grad():
        if hasattr(attention, "in_proj"):
            query, key, value = heads(attention.in_proj(states)).chunk(3, -1)
            query, value = (x + b.view(HEADS, 1, -1) for x, b in ((query, attention.q_bias), (value, attention.v_bias)))
            names, settings["position_buckets"] = {"c2p": "pos_proj", "p2c": "pos_q_proj"}, 0
        else:
            query, key, value = (heads(getattr(attention, f"{x}_proj")(states)) for x in ("query", "key", "value"))
            names = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
            if attention.share_att_key:
                names = {"c2p": "key_proj", "p2c": "query_proj"}
            settings["position_buckets"] = getattr(attention, "position_buckets", -1)
        types = attention.pos_att_type if attention.relative_attention else []
        tables = [heads(getattr(attention, names[x])(table)) if x in types else None for x in BOTH]
    return (query, key, value, *tables), settings


def joined(context):
    return context.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", CASES)
def test_output_is_hugging_faces(name):
    attention, states, table, valid, (theirs, _) = hf_attention(name)
    tensors, settings = operands(attention, states, table)
    if name == "v2-counted-but-absent":  # the scale counts pos_att_type even where its terms are off
        settings["scale"] = (3 * states.shape[-1] / HEADS) ** -0.5
    ours = joined(disentangled_attention(*tensors, attention_mask=valid, backend="reference", **settings))
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours[valid], theirs[valid], rtol=0, atol=1e-12)


def inputs_of(tensors, mask, **settings):
    terms = 1 + sum(table is not None for table in tensors[3:])
    return Call(
        *tensors, mask=mask, cu_seqlens=None, seed=None, far_negative="hf", first_slot=0, query_offset=0,
        max_seqlen=tensors[0].shape[2], scale=(tensors[0].shape[-1] * terms) ** -0.5, dropout_p=0.0, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["v3-beyond", "v2-c2p", "v1-beyond", "v1-p2c"])
def test_probabilities_are_hugging_faces(name):
    attention, states, table, valid, (context, theirs) = hf_attention(name)
    tensors, settings = operands(attention, states, table)
    inputs = inputs_of(tensors, valid[:, None, None], **settings)
    output, _, ours = reference.attention_with_probabilities(inputs)
    rows = valid[:, None].expand(-1, HEADS, -1)
    torch.testing.assert_close(ours[rows], theirs[rows], rtol=0, atol=1e-13)
    torch.testing.assert_close(joined(output)[valid], context[valid], rtol=0, atol=1e-12)


def test_log_sum_exp_by_hand():
    """There is only one key, at distance 2, so the log-sum-exp is its score."""
    query, key, value = (noise(1, 1, 1, 4, seed=seed) for seed in range(3))
    pos_key, pos_query = noise(1, 16, 4, seed=3), noise(1, 16, 4, seed=4)
    _, lse = disentangled_attention(
        query, key, value, pos_key, pos_query, position_buckets=8, max_relative_positions=16, query_offset=2,
        return_lse=True, backend="reference",
    )  # fmt: skip
    q, k = query.flatten(), key.flatten()
    score = (q @ k + q @ pos_key[0, 8 + 2] + k @ pos_query[0, 8 + 2]) / 12**0.5
    torch.testing.assert_close(lse.flatten()[0], score, rtol=0, atol=1e-14)


def test_talking_heads_are_hugging_faces():
    attention, states, table, valid, (context, theirs) = hf_attention("v1-beyond", talking_head=True)
    tensors, settings = operands(attention, states, table)
    with torch.no_grad():
        output, _, ours = reference.attention_with_probabilities(
            inputs_of(tensors, valid[:, None, None], **settings),
            head_logits_proj=attention.head_logits_proj,
            head_weights_proj=attention.head_weights_proj,
        )
    rows = valid[:, None].expand(-1, HEADS, -1)
    torch.testing.assert_close(ours[rows], theirs[rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(joined(output)[valid], context[valid], rtol=0, atol=1e-12)


# Deliberate mistakes, which the comparison above has to notice.
MUTANTS = {
    "one-slot-up": lambda q, k, v, c, p: (q, k, v, c.roll(1, 1), p.roll(1, 1)),
    "c2p-one-slot-up": lambda q, k, v, c, p: (q, k, v, c.roll(1, 1), p),
    "p2c-one-slot-down": lambda q, k, v, c, p: (q, k, v, c, p.roll(-1, 1)),
    "tables-swapped": lambda q, k, v, c, p: (q, k, v, p, c),
    "no-c2p": lambda q, k, v, c, p: (q, k, v, None, p),
    "heads-of-a-table-swapped": lambda q, k, v, c, p: (q, k, v, c.flip(0), p),
    # A reversed sequence has the same distances with the other sign.
    "distance-negated": lambda q, k, v, c, p: (q.flip(2), k.flip(2), v.flip(2), c, p),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("name", ["v3-beyond", "v1-beyond", "v2-no-buckets"])
def test_mutants_disagree(name, mutant):
    attention, states, table, _, _ = hf_attention(name)
    with torch.no_grad():
        ones = torch.ones(1, 1, 1, states.shape[1])
        positions = V1.build_relative_position(states, states) if name.startswith("v1") else None
        theirs, _ = attention(states, ones, relative_pos=positions, rel_embeddings=table)
    tensors, settings = operands(attention, states, table)
    scale = (3 * states.shape[-1] / HEADS) ** -0.5
    run = lambda changed: disentangled_attention(*changed, scale=scale, backend="reference", **settings)
    wrong = run(MUTANTS[mutant](*tensors))
    wrong = joined(wrong.flip(2) if mutant == "distance-negated" else wrong)
    torch.testing.assert_close(joined(run(tensors)), theirs, rtol=0, atol=1e-12)
    error = (wrong - theirs).abs()
    assert error.max() > 0.1 and error.mean() > 0.01


@pytest.mark.parametrize("rule", ["hf", "ms"])
def test_microsofts_rule_moves_far_keys_alone(rule):
    """Distances <= -M read row 0 or row 1: with both rows alike the rules agree, otherwise from key M on."""
    tensors = [noise(1, 2, 40, 8, seed=seed) for seed in range(3)] + [noise(2, 16, 8, seed=seed) for seed in (3, 4)]
    run = lambda far: disentangled_attention(
        *tensors, position_buckets=8, max_relative_positions=16, far_negative=far, backend="reference"
    )
    changed = (run("hf") - run("ms")).abs().amax((0, 1, 3))
    assert changed[: 40 - 16].min() > 1e-4 and changed[40 - 16 :].max() == 0
    for table in tensors[3:]:
        table[:, 0] = table[:, 1]
    assert torch.equal(run(rule), run("hf"))


def small_operands():
    """Three queries from position 2 on, four keys; the second query sees nothing."""
    shapes = [(1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 4, 2), (2, 8, 2), (2, 8, 2)]
    tensors = [noise(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)[None, None]

    def run(*tensors):
        output, lse = disentangled_attention(
            *tensors, position_buckets=4, max_relative_positions=6, query_offset=2, attention_mask=mask,
            return_lse=True, backend="reference",
        )  # fmt: skip
        assert (output[:, :, 1] == 0).all() and (lse[:, :, 1] == -torch.inf).all()
        return output, lse[:, :, [0, 2]]

    return run, tensors


def test_gradients():
    assert torch.autograd.gradcheck(*small_operands())


def test_second_gradients():
    run, tensors = small_operands()
    assert torch.autograd.gradgradcheck(lambda *x: run(*x, *tensors[3:])[0], tensors[:3])
    assert torch.autograd.gradgradcheck(lambda *x: run(*tensors[:3], *x)[0], tensors[3:])


def test_query_offset_takes_the_later_queries():
    """A call with only the last queries and their offset gives the same outputs as the whole sequence."""
    attention, states, table, _, _ = hf_attention("v3-beyond")
    (query, *others), settings = operands(attention, states, table)
    whole = disentangled_attention(query, *others, backend="reference", **settings)
    late = disentangled_attention(query[:, :, 140:], *others, query_offset=140, backend="reference", **settings)
    torch.testing.assert_close(late, whole[:, :, 140:], rtol=0, atol=1e-13)
