"""Lightning with patched and native models: training, bfloat16, checkpoints."""

import logging

import lightning
import pytest
import torch
import transformers
from tiny import TRAINED, assert_close, batch, folder, models, names, options, weights

import deberta_fast
from deberta_fast import patch

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*num_workers", "ignore:.*save_hyper")
BF16 = 8 * torch.finfo(torch.bfloat16).eps
LABELS = torch.tensor([0, 2, 1, 0])


class Classifier(lightning.LightningModule):
    def __init__(self, model, name):
        super().__init__()
        self.model, self.name, self.losses = model, name, []

    def training_step(self, inputs, index):
        loss = self.model(**inputs).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, inputs, index):
        self.log("loss", self.model(**inputs).loss)

    def predict_step(self, inputs, index):
        return self.model(**inputs).logits

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        batches = [batch(self.name, labels=LABELS.roll(step)) for step in range(4)]
        return torch.utils.data.DataLoader(batches, batch_size=None)

    val_dataloader = predict_dataloader = train_dataloader


def build(library, name="v3"):
    checkpoint = folder(name, "ForSequenceClassification", num_labels=3)
    kind = "DebertaForSequenceClassification" if name == "v1" else "DebertaV2ForSequenceClassification"
    return Classifier(getattr(library, kind).from_pretrained(checkpoint), name)


def trained(module, path, precision="32-true", **settings):
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", precision=precision, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(path), **settings,
    )  # fmt: skip
    trainer.fit(module)
    predicted = torch.cat(trainer.predict(module)).float()
    trainer.save_checkpoint(path / "last.ckpt")
    got = {"losses": module.losses, "predicted": predicted}
    return got | ({"weights": weights(module)} if precision == "32-true" else {})


@models
def test_patched(name, options, tmp_path, same_when_patched):
    same_when_patched(
        lambda: build(transformers, name), lambda module: trained(module, tmp_path), tolerance=TRAINED, **options
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@options
def test_patched_in_bfloat16(precision, options, tmp_path, same_when_patched):
    run = lambda module: trained(module, tmp_path, precision)["losses"][:2]  # later steps have other weights
    same_when_patched(lambda: build(transformers), run, tolerance=BF16, **options)


@names
def test_native(name, tmp_path):
    expected = trained(build(transformers, name), tmp_path, accumulate_grad_batches=2, gradient_clip_val=1.0)
    got = trained(build(deberta_fast, name), tmp_path, accumulate_grad_batches=2, gradient_clip_val=1.0)
    del expected["weights"], got["weights"]  # their names differ
    assert_close(got, expected, TRAINED)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_native_in_bfloat16(precision, tmp_path):
    expected = trained(build(deberta_fast), tmp_path)["losses"][:2]
    assert_close(trained(build(deberta_fast), tmp_path, precision)["losses"][:2], expected, BF16)


@pytest.mark.parametrize("library", [transformers, deberta_fast], ids=["patched", "native"])
def test_checkpoint(library, tmp_path):
    module = build(library)
    if library is transformers:
        patch(module, unpad=True)
    expected = trained(module, tmp_path)["predicted"]
    again = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", model=build(library).model, name="v3")
    with torch.no_grad():
        got = torch.cat([again.eval().predict_step(x, 0) for x in again.train_dataloader()])
    assert_close(got, expected)
