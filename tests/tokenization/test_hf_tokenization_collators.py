"""transformers' collators and Trainer make the same batches with our tokenizers as with its own."""

import pytest
import torch
from test_tokenization import ALL, FAST, make
from tokenizer_files import sentences

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
every = pytest.mark.parametrize("kind", ALL)
TEXTS = [text[: 20 + 15 * i] for i, text in enumerate(sentences()[:8])]


def wrapped(kind):
    """Their tokenizer around the same ``tokenizers.Tokenizer``."""
    fast = make(FAST[ALL.index(kind) // 2])
    tokens = {name: value for name, value in fast.special_tokens_map.items() if isinstance(value, str)}
    names = fast.model_input_names
    object_ = fast.backend_tokenizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=object_, model_input_names=names, **tokens)


def same(own, other):
    assert set(own) == set(other)
    assert all(torch.equal(own[name], other[name]) for name in own)


@every
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(kind, side):
    own, other = make(kind, padding_side=side), wrapped(kind)
    other.padding_side = side
    rows = [{**own(text), "label": i} for i, text in enumerate(TEXTS)]
    for options in ({}, {"pad_to_multiple_of": 16}, {"padding": "max_length", "max_length": 150}):
        collated = [transformers.DataCollatorWithPadding(x, **options)(rows) for x in (own, other)]
        same(*collated)
    assert collated[0]["labels"].tolist() == list(range(len(TEXTS))) and collated[0]["input_ids"].shape[1] == 150


@every
def test_labels_of_tokens(kind):
    own, other = make(kind), wrapped(kind)
    rows = [{**own(text), "labels": [1] * len(own(text)["input_ids"])} for text in TEXTS]
    same(*(transformers.DataCollatorForTokenClassification(x)(rows) for x in (own, other)))


@every
@pytest.mark.parametrize("given", [False, True])
def test_masked_language_modelling(kind, given):
    own, other = make(kind), wrapped(kind)
    rows = [dict(own(text, return_special_tokens_mask=given)) for text in TEXTS]
    batches = []
    for tokenizer in (own, other):
        torch.manual_seed(3)
        batches.append(transformers.DataCollatorForLanguageModeling(tokenizer)(rows))
    same(*batches)
    masked = batches[0]["labels"] != -100
    assert masked.any() and (batches[0]["input_ids"][masked] == own.mask_token_id).any()


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 has another collator for it")
@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("ragged", [False, True])
def test_whole_words(kind, ragged):
    """Rows of different lengths too, whose offsets their own tokenizers do not pad."""
    own, other = make(kind), wrapped(kind)
    options = dict(truncation=True, max_length=9) if not ragged else {}
    rows = [dict(own(text, return_special_tokens_mask=True, return_offsets_mapping=True, **options)) for text in TEXTS]
    rows = [row for row in rows if ragged or len(row["input_ids"]) == 9]
    masking = dict(whole_word_mask=True, seed=3, mlm_probability=0.5)
    batch = transformers.DataCollatorForLanguageModeling(own, **masking)(rows)
    if not ragged:
        same(batch, transformers.DataCollatorForLanguageModeling(other, **masking)(rows))
    masked = batch["labels"] != -100
    assert masked.any() and (batch["input_ids"][masked] == own.mask_token_id).all()
    assert torch.equal(masked & (batch["attention_mask"] == 0), torch.zeros_like(masked))


@every
def test_padded_offsets(kind):
    own = make(kind)
    rows = {"input_ids": [[1, 2], [1]], "offset_mapping": [[(0, 1), (1, 3)], [(0, 2)]]}
    assert own.pad(rows)["offset_mapping"] == [[[0, 1], [1, 3]], [[0, 2], (0, 0)]]
    assert own.pad(rows, return_tensors="pt")["offset_mapping"].shape == (2, 2, 2)


@every
def test_trainer(kind, tmp_path):
    """It pads by itself for its own tokenizers only: the collator must be given."""
    pytest.importorskip("accelerate")
    own = make(kind)
    config = transformers.DebertaV2Config(
        vocab_size=len(own), hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16
    )
    model = transformers.DebertaV2ForSequenceClassification(config)
    data = [{**own(text), "label": i % 2} for i, text in enumerate(TEXTS)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        include_num_input_tokens_seen=True, disable_tqdm=True,
    )  # fmt: skip
    collator = transformers.DataCollatorWithPadding(own)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, processing_class=own, data_collator=collator)
    trainer.train()
    assert trainer.state.global_step == 2
    assert type(own).from_pretrained(tmp_path / "checkpoint-2")(TEXTS) == own(TEXTS)


@every
def test_saving_elsewhere(kind, tmp_path):
    make(kind).save_pretrained(tmp_path, push_to_hub=False)
    with pytest.raises(
        ValueError, match=r"push_to_hub is not supported: save, and call huggingface_hub\.upload_folder"
    ):
        make(kind).save_pretrained(tmp_path, push_to_hub=True)
