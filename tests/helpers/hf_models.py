"""Small random Hugging Face models whose position terms matter, and the comparison of two of them."""

import importlib
import statistics

import pytest
import torch
from native_models import randomise

transformers = pytest.importorskip("transformers")
V1, V2 = (importlib.import_module(f"transformers.models.{x}.modeling_{x}") for x in ("deberta", "deberta_v2"))
V3 = dict(position_buckets=16, max_relative_positions=64, share_att_key=True, norm_rel_ebd="layer_norm")
# LENGTH lies beyond max_relative_positions everywhere, except where that defaults to max_position_embeddings.
LENGTH = 83
CONFIGS = {
    "v1": dict(max_relative_positions=24),
    "v1-whole-table-c2p": dict(pos_att_type=["c2p"]),
    "v1-p2p-counted": dict(max_relative_positions=24, pos_att_type=["c2p", "p2p"]),
    "v1-absolute": dict(relative_attention=False),
    "v2": dict(position_buckets=16, max_relative_positions=40, conv_kernel_size=3, conv_act="gelu"),
    "v2-unbucketed-p2c": dict(max_relative_positions=24, pos_att_type=["p2c"]),
    "v2-no-terms": dict(position_buckets=16, max_relative_positions=64, pos_att_type=None),
    "v2-absolute": dict(relative_attention=False),
    "v3": dict(V3, position_biased_input=False),
    "v3-c2p": dict(V3, pos_att_type=["c2p"]),
}


def build(name="v3", head="Model", **changes):
    common = dict(
        vocab_size=70, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48,
        max_position_embeddings=128, type_vocab_size=2, relative_attention=True, pos_att_type=["c2p", "p2c"],
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    prefix = "Deberta" if name.startswith("v1") else "DebertaV2"
    config = getattr(transformers, prefix + "Config")(**{**common, **CONFIGS[name], **changes})
    return randomise(getattr(transformers, prefix + head)(config)).eval()


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def tokens(padding="right", length=LENGTH, choices=(), seed=1):
    ids = torch.randint(1, 70, (2, *choices, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padding == "absent":
        return {"input_ids": ids, "token_type_ids": ids % 2}
    if padding == "holes":
        mask[0, ..., 5:40:3] = 0
    mask[
        1, ..., {"right": slice(41, None), "left": slice(28), "holes": slice(1, 30), "empty": slice(None)}[padding]
    ] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}


def results(model, inputs, gradients=True):
    """Outputs, including the rows of padding, and the gradient of each parameter by name, or None if it has none."""
    model.zero_grad()
    outputs = [x for x in tuple(model(**inputs).values()) if isinstance(x, torch.Tensor)]
    if gradients:
        sum((x * noise(*x.shape).to(x)).sum() for x in outputs).backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return [x.detach() for x in outputs], grads


def assert_as_precise(got, eager, exact):
    """The largest and the mean error are at most twice Hugging Face's own in this dtype.

    Each argument holds one list of tensors per draw of random inputs. The rule takes all tensors together, and measures
    each error in units of its tensor's rounding. It averages the largest error over the draws, because chance decides
    which of a bias's few elements has the largest error. Some gradients are zero except for rounding (a key's bias);
    their unit comes from the scale of the other tensors.
    """
    assert [[x.dtype for x in draw] for draw in got] == [[x.dtype for x in draw] for draw in eager]
    (largest, mean), (largest_allowed, mean_allowed) = _errors(got, exact), _errors(eager, exact)
    assert largest <= 2 * largest_allowed + 0.5
    assert mean <= 2 * mean_allowed + 0.1


def _errors(draws, exact_draws):
    largest, mean = [], []
    for tensors, exact in zip(draws, exact_draws, strict=True):
        median = torch.stack([x.abs().max() for x in exact]).median()
        units = [torch.finfo(x.dtype).eps * max(median, z.abs().max()) for x, z in zip(tensors, exact, strict=True)]
        errors = [(x.double() - z).abs() / unit for x, z, unit in zip(tensors, exact, units, strict=True)]
        largest.append(max(float(e.max()) for e in errors))
        mean.append(float(torch.stack([e.mean() for e in errors]).mean()))
    return statistics.mean(largest), statistics.mean(mean)


def assert_close(got, expected, tolerance=1e-10):
    """Compares float64 models: their outputs, which parameters have gradients, and the gradients."""
    assert len(got[0]) == len(expected[0]) and got[1].keys() == expected[1].keys()
    for name, x, y in [*zip("01", got[0], expected[0]), *((name, got[1][name], expected[1][name]) for name in got[1])]:
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, float(y.abs().max())), msg=name)
