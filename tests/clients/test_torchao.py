"""torchao quantises patched models, before patch and after it."""

import pytest
import torch
from tiny import TOLERANCE, batch, folder, models
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torchao")
CONFIGS = [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig]
# A rounding difference can move activations by a whole step of their 8 bits.
BOUNDS = {Int8WeightOnlyConfig: TOLERANCE, Int8DynamicActivationInt8WeightConfig: 4 / 127}
configs = pytest.mark.parametrize("config", CONFIGS, ids=lambda x: x.__name__)


def quantised(name, config):
    model = base(name)
    quantize_(model, config())
    return model


def base(name):
    return AutoModelForSequenceClassification.from_pretrained(folder(name, "ForSequenceClassification", num_labels=3))


@models
@configs
@torch.no_grad()
def test_quantised_then_patched(name, config, options, same_when_patched):
    run = lambda model: model(**batch(name)).logits
    same_when_patched(lambda: quantised(name, config), run, tolerance=BOUNDS[config], **options)


@models
@configs
@torch.no_grad()
def test_patched_then_quantised(name, config, options, same_when_patched):
    def run(model):
        model(**batch(name))  # inference keeps tables of the weights before quantisation
        quantize_(model, config())
        return model(**batch(name)).logits

    same_when_patched(lambda: base(name), run, tolerance=BOUNDS[config], **options)


@torch.no_grad()
def test_weights_loaded_after_patch(same_when_patched):
    state = quantised("v3", Int8WeightOnlyConfig).state_dict()

    def run(model):
        before = model(**batch("v3")).logits
        model.load_state_dict(state, assign=True)
        after = model(**batch("v3")).logits
        assert not torch.equal(before, after)
        return after

    same_when_patched(lambda: base("v3"), run)
