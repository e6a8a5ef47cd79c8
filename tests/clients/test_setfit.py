"""setfit on a patched sentence encoder: contrastive training, predictions, files."""

import datasets
import setfit
import torch
from test_sentence_transformers import sentence_encoder
from tiny import TEXTS, TRAINED, assert_close, options

from deberta_fast import patch

DATA = {"text": [*TEXTS, *TEXTS[::-1]], "label": [0, 1, 0, 1, 1, 0, 1, 0]}


def build():
    return setfit.SetFitModel(
        model_body=sentence_encoder(), model_head=setfit.SetFitHead(64, 2), normalize_embeddings=1
    )


@options
def test_training_and_predictions(options, tmp_path, same_when_patched):
    def run(model):
        arguments = setfit.TrainingArguments(
            str(tmp_path), batch_size=4, max_steps=3, body_learning_rate=1e-3, end_to_end=True, num_epochs=(1, 1),
            report_to="none", save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        setfit.Trainer(model, arguments, train_dataset=datasets.Dataset.from_dict(DATA)).train()
        return model.predict_proba(TEXTS)

    def build_with_body():
        model = build()
        return model, model.model_body

    same_when_patched(build_with_body, run, tolerance=TRAINED, **options)


def test_save_and_load(tmp_path):
    model = build()
    patch(model.model_body, unpad=True)
    expected = model.predict_proba(TEXTS)
    model.save_pretrained(str(tmp_path))
    loaded = setfit.SetFitModel.from_pretrained(
        str(tmp_path), use_differentiable_head=True, head_params={"out_features": 2}
    )
    assert_close(torch.as_tensor(loaded.predict_proba(TEXTS)), torch.as_tensor(expected))
