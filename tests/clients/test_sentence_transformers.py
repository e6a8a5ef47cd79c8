"""sentence-transformers on patched models: cross-encoders and bi-encoders, inference, trainers, files."""

import datasets
import pytest
import sentence_transformers as st
import torch
from sentence_transformers.cross_encoder import losses as cross_losses
from sentence_transformers.sentence_transformer import losses
from tiny import NAMES, TEXTS, TRAINED, assert_close, folder, gradients, models, options, weights

from deberta_fast import patch

PAIRS = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3]), (TEXTS[1], TEXTS[2])]
UNPAD = {"unpad": True}
POOLING = ["mean", "cls", "max", "weightedmean", "lasttoken"]


def cross_encoder(name="v3"):
    return st.CrossEncoder(folder(name, "ForSequenceClassification", num_labels=1), device="cpu")


def sentence_encoder(name="v3", pooling="mean", side="right", **options):
    encoder = st.sentence_transformer.modules.Transformer(folder(name), **options)
    encoder.tokenizer.padding_side = side
    pooled = st.sentence_transformer.modules.Pooling(encoder.get_embedding_dimension(), pooling_mode=pooling)
    return st.SentenceTransformer(modules=[encoder, pooled], device="cpu")


@models
def test_cross_encoder(name, options, same_when_patched):
    def run(model):
        scores = model.predict(PAIRS, convert_to_tensor=True)
        ranked = model.rank(TEXTS[0], TEXTS[1:])
        loss = cross_losses.BinaryCrossEntropyLoss(model)(PAIRS_IN_COLUMNS, torch.tensor([1.0, 0.0, 1.0]))
        loss.backward()
        return {"scores": scores, "ranked": ranked, "loss": loss.item(), "gradients": gradients(model)}

    PAIRS_IN_COLUMNS = [list(column) for column in zip(*PAIRS, strict=True)]
    same_when_patched(lambda: cross_encoder(name), run, **options)


@pytest.mark.parametrize("name, pooling", [(name, x) for name in NAMES for x in POOLING if name == "v3" or x == "mean"])
@options
def test_sentence_encoder(name, pooling, options, same_when_patched):
    def run(model):
        states = model.encode(TEXTS, output_value="token_embeddings")
        loss = losses.MultipleNegativesRankingLoss(model)(
            [model.preprocess(TEXTS), model.preprocess(TEXTS[::-1])], None
        )
        loss.backward()
        embeddings = model.encode(TEXTS, convert_to_tensor=True)
        return {"embeddings": embeddings, "states": states, "loss": loss.item(), "gradients": gradients(model)}

    same_when_patched(lambda: sentence_encoder(name, pooling), run, **options)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@options
def test_left_padding(pooling, options, same_when_patched):
    """Pooling reads the mask, so it takes the first token of the text and not the first row."""
    run = lambda model: model.encode(TEXTS, convert_to_tensor=True)
    same_when_patched(lambda: sentence_encoder(pooling=pooling, side="left"), run, **options)


def test_inputs_are_never_flattened(same_when_patched, caplog):
    """unpad_inputs asks for flash-attn, which DeBERTa cannot use: the batch stays padded, and patch packs it."""
    build = lambda: sentence_encoder(unpad_inputs=True)

    def run(model):
        inputs = model.preprocess(TEXTS)
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape and len(inputs["input_ids"]) == len(TEXTS)
        return model(inputs)["sentence_embedding"]

    same_when_patched(build, run, unpad=True)
    assert "Falling back to padded inputs" in caplog.text


def trained(model, trainer, loss, arguments, path, data):
    trainer = trainer(
        model=model, loss=loss(model), train_dataset=datasets.Dataset.from_dict(data),
        args=arguments(
            str(path), max_steps=3, save_steps=2, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
            optim="sgd", report_to="none", use_cpu=True,
        ),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    return {"losses": losses, "weights": weights(model)}


@pytest.mark.parametrize(
    "loss, options", [(cross_losses.BinaryCrossEntropyLoss, {}), (cross_losses.MultipleNegativesRankingLoss, UNPAD)]
)
def test_cross_encoder_trainer(loss, options, tmp_path, same_when_patched):
    data = {"query": TEXTS, "answer": TEXTS[::-1]}
    if loss is cross_losses.BinaryCrossEntropyLoss:
        data["label"] = [1.0, 0.0, 0.0, 1.0]
    run = lambda model: trained(model, st.CrossEncoderTrainer, loss, st.CrossEncoderTrainingArguments, tmp_path, data)
    same_when_patched(cross_encoder, run, tolerance=TRAINED, **options)
    reloaded = patch(st.CrossEncoder(str(tmp_path / "checkpoint-2"), device="cpu"), unpad=True)
    assert len(reloaded.predict(PAIRS)) == len(PAIRS)


@pytest.mark.parametrize(
    "loss, options", [(losses.MultipleNegativesRankingLoss, UNPAD), (losses.CachedMultipleNegativesRankingLoss, {})]
)
def test_sentence_encoder_trainer(loss, options, tmp_path, same_when_patched):
    run = lambda model: trained(
        model, st.SentenceTransformerTrainer, loss, st.SentenceTransformerTrainingArguments, tmp_path,
        {"anchor": TEXTS, "positive": TEXTS[::-1]},
    )  # fmt: skip
    same_when_patched(sentence_encoder, run, tolerance=TRAINED, **options)


@pytest.mark.parametrize("build", [cross_encoder, sentence_encoder])
def test_save_and_load(build, tmp_path):
    model = patch(build(), unpad=True)
    run = lambda x: x.predict(PAIRS) if isinstance(x, st.CrossEncoder) else x.encode(TEXTS)
    expected = torch.as_tensor(run(model))
    model.save_pretrained(str(tmp_path))
    loaded = type(model)(str(tmp_path), device="cpu")
    assert_close(torch.as_tensor(run(loaded)), expected)
    assert_close(torch.as_tensor(run(patch(loaded))), expected)
