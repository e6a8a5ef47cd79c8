"""GLiNER on a patched encoder: spans, tokens, fused layers, two encoders; inference, training, files, ONNX."""

import gliner
import pytest
import torch
from gliner.infer_packing import InferencePackingConfig
from tiny import OPTIONS, TEXTS, TRAINED, assert_close, folder, gradients, options, weights
from transformers import set_seed

from deberta_fast import patch

LABELS = ["person", "city", "statement of a program"]
DATA = [
    {"tokenized_text": TEXTS[1].split(), "ner": [[0, 0, "person"], [3, 3, "city"]]},
    {"tokenized_text": TEXTS[0].split(), "ner": [[1, 2, "statement of a program"]]},
    {"tokenized_text": TEXTS[3].split(), "ner": [[10, 10, "person"], [13, 13, "city"]]},
]
KINDS = {
    "span": {},
    "span-v1": {"model_name": "v1"},
    "token": {"span_mode": "token_level"},
    "two-encoders": {"labels_encoder": "v2"},
    "span-encoder": {"span_encoder_config": {"model_type": "deberta-v2", "num_attention_heads": 2}},
}
CASES = ["span-padded", "span-unpad", *(f"{kind}-constant" for kind in KINDS)]
cases = pytest.mark.parametrize(
    "kind, options", [(kind, OPTIONS[way]) for kind, way in (x.rsplit("-", 1) for x in CASES)], ids=CASES
)
FUSED_LAYERS = {"fuse_layers": True}


def build(**settings):
    names = {"model_name": "v3", **settings}
    names = {key: folder(x) if key in ("model_name", "labels_encoder") else x for key, x in names.items()}
    config = gliner.GLiNERConfig(hidden_size=64, dropout=0.0, max_width=4, max_len=64, **names)
    return gliner.GLiNER.from_config(config)


def training_batch(model):
    set_seed(0)  # the collator draws entity types that a text lacks
    return model._create_data_collator()(DATA)


def logits_and_entities(model):
    model.eval()
    with torch.no_grad():
        logits = model(**training_batch(model)).logits
    entities = model.inference(TEXTS, LABELS, threshold=0.3)
    return {"logits": logits, "entities": [sorted(row, key=lambda x: x["start"]) for row in entities]}


def loss_and_gradients(model):
    """Runs in float64. In float32, rounding may move the input of a ReLU in the heads across zero."""
    outputs = model.double().train()(**training_batch(model))
    outputs.loss.backward()
    return {"logits": outputs.logits.detach(), "loss": outputs.loss.item(), "gradients": gradients(model)}


@cases
def test_inference(kind, options, same_when_patched):
    got = same_when_patched(lambda: build(**KINDS[kind]), logits_and_entities, **options)
    assert all(got["entities"])


@cases
def test_training_step(kind, options, same_when_patched):
    same_when_patched(lambda: build(**KINDS[kind]), loss_and_gradients, **options)


@pytest.mark.parametrize("options", [{}, {"unpad": True, "padding_rows": "hf"}], ids=str)
@pytest.mark.parametrize("run", [logits_and_entities, loss_and_gradients])
def test_fused_layers_average_over_padding(options, run, same_when_patched):
    same_when_patched(lambda: build(**FUSED_LAYERS), run, **options)


@options
def test_packed_inference(options, same_when_patched):
    """GLiNER's own packing puts several texts into a row and separates them by a pairwise mask."""
    packing = InferencePackingConfig(max_length=60, streams_per_batch=1)

    def run(model):
        return model.inference(TEXTS, LABELS, threshold=0.3, packing_config=packing)

    if "unpad" in options:
        with pytest.warns(UserWarning, match="deberta_fast: .*padding"):
            same_when_patched(build, run, **options)
    else:
        same_when_patched(build, run)


def test_trainer(tmp_path, same_when_patched):
    def run(model):
        trainer = model.train_model(
            DATA, None, output_dir=tmp_path, max_steps=3, save_steps=3, logging_steps=1, per_device_train_batch_size=2,
            use_cpu=True, dataloader_num_workers=0, learning_rate=1e-3, optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {"losses": losses, "weights": weights(model)}

    assert len(same_when_patched(build, run, tolerance=TRAINED)["losses"]) == 3


def test_save_and_load(tmp_path):
    model = patch(build())
    expected = logits_and_entities(model)
    model.save_pretrained(tmp_path)
    loaded = gliner.GLiNER.from_pretrained(str(tmp_path), local_files_only=True)
    assert_close(logits_and_entities(loaded), expected)
    assert_close(logits_and_entities(patch(loaded)), expected)


@pytest.mark.parametrize("options", [{}, {"unpad": True}], ids=str)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_export_to_onnx(options, tmp_path):
    model = build()
    expected = model.inference(TEXTS, LABELS, threshold=0.3)
    patch(model, **options).export_to_onnx(tmp_path)
    exported = gliner.GLiNER.from_pretrained(str(tmp_path), load_onnx_model=True, local_files_only=True)
    assert_close(exported.inference(TEXTS, LABELS, threshold=0.3), expected, tolerance=1e-4)
