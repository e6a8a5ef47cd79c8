"""Figures of a discriminator, the learning rate, and the count of operations, against plain definitions."""

import math

import pytest
import torch
from native_models import build, settings
from torch.utils.flop_counter import FlopCounterMode

from deberta_fast import DebertaV2Config
from deberta_fast.pretraining.evaluation import area_under_roc, detection
from deberta_fast.pretraining.flops import step_flops
from deberta_fast.pretraining.optimizers import adamw, factor


def test_area_under_roc():
    """It is the share of pairs in the right order; ties, of which there are many here, count half."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-5, 6, (300,), generator=generator).float()
    labels = (torch.rand(300, generator=generator) < 0.2).long()
    ones, zeros = logits[labels == 1][:, None], logits[labels == 0][None]
    expected = ((ones > zeros).double() + 0.5 * (ones == zeros)).mean().item()
    assert area_under_roc(logits, labels) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(area_under_roc(logits, torch.zeros_like(labels)))


def test_detection():
    logits, labels = torch.tensor([2.0, -1.0, 3.0, -2.0, 1.0]), torch.tensor([1, 1, 0, 0, 0])
    found = detection(logits, labels)
    assert found["rtd_accuracy"] == pytest.approx(0.4) and found["original"] == pytest.approx(0.6)
    assert found["precision"] == pytest.approx(1 / 3) and found["recall"] == 0.5
    assert found["auc"] == pytest.approx(0.5)


def test_learning_rate():
    rates = [factor("linear", step, 4, 12) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[8] == 0.5 and rates[12] == 0.0
    assert factor("cosine", 8, 4, 12) == pytest.approx(0.5) and factor("constant", 11, 4, 12) == 1.0
    assert factor("cosine", 6, 4, 12) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_vectors_have_no_weight_decay():
    model = build("v3", "ForMaskedLM")
    groups = adamw(model, 1e-3, 0.1, (0.9, 0.999), 1e-6).param_groups
    without = {id(x) for group in groups if group["weight_decay"] == 0 for x in group["params"]}
    for name, parameter in model.named_parameters():
        vector = name.endswith("bias") or "LayerNorm" in name
        assert (id(parameter) in without) == vector, name
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["v3", "v1"])
def test_flops_are_those_of_torchs_counter(name):
    """Counted for one sequence, forward; backward is twice that. The position tables' projections are left out."""
    model, length = build(name, num_hidden_layers=3), 50
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(1, 1 + length)[None])
    config = model.config
    rows = config.table_rows
    tables = 2 * 2 * rows * config.hidden_size**2 * config.num_hidden_layers
    got = step_flops(config, 3, torch.tensor([length]), 0, False) / 3
    assert got == pytest.approx(counter.get_total_flops() - tables, rel=0.06)
    head = step_flops(config, 3, torch.tensor([length]), 7, True) / 3 - got
    assert head == 2 * 7 * 32 * (32 + config.vocab_size) + 2 * length * 32 * 32
    assert DebertaV2Config(**settings("v3")).position_terms == ("c2p", "p2c")
