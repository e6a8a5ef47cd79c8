"""GLiNER2 on a patched encoder: both architectures, extraction, training, LoRA by PEFT, files."""

import gliner2
import pytest
import torch
from gliner2.training.data import InputExample
from gliner2.training.trainer import ExtractorCollator, ExtractorDataset, GLiNER2Trainer, TrainingConfig
from tiny import OPTIONS, TEXTS, TRAINED, assert_close, folder, gradients, options

from deberta_fast import patch

KINDS = {
    "span": (gliner2.GLiNER2, {}),
    "span-v2-mean": (gliner2.GLiNER2, {"model_name": "v2", "token_pooling": "mean"}),
    "span-v1": (gliner2.GLiNER2, {"model_name": "v1"}),
    "boundary": (gliner2.BoundaryExtractor, {"architecture": "boundary"}),
}
CASES = ["span-padded", "span-unpad", *(f"{kind}-constant" for kind in KINDS)]
cases = pytest.mark.parametrize(
    "kind, options", [(kind, OPTIONS[way]) for kind, way in (x.rsplit("-", 1) for x in CASES)], ids=CASES
)
EXAMPLES = [
    InputExample(text=TEXTS[1], entities={"person": ["Ann"], "city": ["London"]}, relations=[]),
    InputExample(text=TEXTS[3], entities={"person": ["Bob"], "city": ["Rome"], "statement": []}),
]


def build(kind="span"):
    extractor, settings = KINDS[kind]
    config = gliner2.ExtractorConfig(**{**settings, "model_name": folder(settings.get("model_name", "v3"))})
    model = extractor(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def ordered(result):
    """Sorts all lists, because candidates of equal confidence have no fixed order."""
    if isinstance(result, dict):
        return {key: ordered(value) for key, value in result.items()}
    return sorted((ordered(x) for x in result), key=str) if isinstance(result, list) else result


def extraction(model):
    model.eval()
    schema = model.create_schema().entities({"person": "a human", "city": "a town"})
    schema = schema.classification("tone", ["good", "bad"]).relations(["went to"])
    return ordered(
        {
            "all": model.batch_extract(TEXTS, schema, threshold=0.3, include_confidence=True),
            "structures": model.extract_json(TEXTS[1], {"journey": ["who::str", "where::list"]}, threshold=0.3),
        }
    )


def losses_and_gradients(model):
    collate = ExtractorCollator(model.processor, architecture=model.architecture)
    losses = model.train()(collate(list(ExtractorDataset.from_examples(EXAMPLES))))
    losses["total_loss"].backward()
    return {"loss": losses["total_loss"].item(), "gradients": gradients(model)}


@cases
def test_extraction(kind, options, same_when_patched):
    got = same_when_patched(lambda: build(kind), extraction, **options)
    assert any(row["entities"]["person"] for row in got["all"])


@cases
def test_training_step(kind, options, same_when_patched):
    assert same_when_patched(lambda: build(kind), losses_and_gradients, **options)["loss"] > 0


@options
def test_lora(options, same_when_patched):
    def build_adapted():
        model = build()
        adapted = model.apply_lora(r=4, targets=["encoder"])
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        return model

    got = same_when_patched(build_adapted, losses_and_gradients, **options)
    assert got["gradients"] and all("lora_" in name for name in got["gradients"])


def test_trainer(tmp_path, same_when_patched):
    def run(model):
        config = TrainingConfig(
            str(tmp_path), max_steps=3, num_epochs=3, batch_size=1, logging_steps=1, fp16=False, num_workers=0,
            encoder_lr=1e-3, task_lr=1e-3, report_to_wandb=False,
        )  # fmt: skip
        history = GLiNER2Trainer(model, config).train(train_data=EXAMPLES)["train_metrics_history"]
        return [step["loss"] for step in history]

    assert len(same_when_patched(build, run, tolerance=TRAINED)) == 3


@pytest.mark.parametrize("kind", ["span", "boundary"])
def test_save_and_load(kind, tmp_path):
    model = patch(build(kind))
    expected = extraction(model)
    model.save_pretrained(str(tmp_path))
    loaded = gliner2.AutoExtractor.from_pretrained(str(tmp_path))
    assert_close(extraction(loaded), expected)
    assert_close(extraction(patch(loaded)), expected)
