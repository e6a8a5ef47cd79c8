"""The native models against Hugging Face's: outputs, losses, gradients, and checkpoints in both directions."""

import warnings

import pytest
import torch
from hf_models import noise, randomise, tokens, transformers

import deberta_fast
from deberta_fast.checkpoint.names import to_native

V4 = transformers.__version__.startswith("4.")
V3 = dict(
    hidden_size=768, num_attention_heads=12, intermediate_size=3072, position_buckets=256, share_att_key=True,
    norm_rel_ebd="layer_norm", pos_att_type="p2c|c2p", position_biased_input=False, pooler_hidden_act="gelu",
)  # fmt: skip
# Widths, heads and switches of the public checkpoints, with a small vocabulary. Depth is cut, except where only depth
# differs.
SHAPES = {  # some with fewer layers than published
    "v1-base": (
        "Deberta",
        dict(
            hidden_size=768, num_attention_heads=12, intermediate_size=3072, pos_att_type="c2p|p2c",
            position_biased_input=False, num_hidden_layers=3,
        ),
    ),
    "v2-xlarge": (
        "DebertaV2",
        dict(
            V3, hidden_size=1536, num_attention_heads=24, intermediate_size=6144, conv_kernel_size=3, conv_act="gelu",
            attention_head_size=64, num_hidden_layers=2,
        ),
    ),
    "v3-small": ("DebertaV2", dict(V3, num_hidden_layers=2)),
    "v3-base": ("DebertaV2", dict(V3, num_hidden_layers=6)),
    "mdeberta": ("DebertaV2", dict(V3, num_hidden_layers=3, type_vocab_size=2)),
    "camemberta-generator": (
        "DebertaV2",
        dict(V3, hidden_size=256, num_attention_heads=4, intermediate_size=1024, embedding_size=768, pad_token_id=1),
    ),
}  # fmt: skip
SMALL = dict(
    hidden_size=64, num_attention_heads=4, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=128,
    type_vocab_size=2, pos_att_type=["c2p", "p2c"], hidden_act="relu",
)  # fmt: skip
SWITCHES = {
    "v1": ("Deberta", dict(SMALL, max_relative_positions=24)),
    "v1-c2p": ("Deberta", dict(SMALL, pos_att_type=["c2p"])),
    "v1-p2p-counted": ("Deberta", dict(SMALL, max_relative_positions=24, pos_att_type=["p2c", "p2p"])),
    "v1-talking-heads": ("Deberta", dict(SMALL, talking_head=True)),
    "v1-absolute": ("Deberta", dict(SMALL, relative_attention=False)),
    "v1-absolute-none": ("Deberta", dict(SMALL, relative_attention=False, pos_att_type="None")),
    "v2-own-projections": ("DebertaV2", dict(SMALL, position_buckets=16, max_relative_positions=40)),
    "v2-conv-tanh": ("DebertaV2", dict(SMALL, position_buckets=16, conv_kernel_size=5, conv_groups=4)),
    "v2-unbucketed-p2c": ("DebertaV2", dict(SMALL, max_relative_positions=24, pos_att_type=["p2c"])),
    "v2-no-terms": ("DebertaV2", dict(SMALL, position_buckets=16, pos_att_type=None)),
    "v2-absolute": ("DebertaV2", dict(SMALL, relative_attention=False)),
    "v3": ("DebertaV2", {**SMALL, **V3, **dict(hidden_size=64, num_attention_heads=4, position_buckets=16)}),
    "v3-c2p-narrow-embeddings": ("DebertaV2", dict(SMALL, share_att_key=True, pos_att_type="c2p", embedding_size=24)),
}  # fmt: skip


def pair(name, head, folder, **changes):
    """A random model of Hugging Face, and the native model loaded from its checkpoint."""
    prefix, values = {**SHAPES, **SWITCHES}[name]
    values = dict(vocab_size=70, relative_attention=True, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) | {
        **values,
        "num_hidden_layers": values.get("num_hidden_layers", 2),
        **changes,
    }
    theirs = randomise(getattr(transformers, prefix + head)(getattr(transformers, prefix + "Config")(**values))).eval()
    theirs.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, info = getattr(deberta_fast, prefix + head).from_pretrained(folder, output_loading_info=True)
    assert not info.missing and not info.unexpected and len(info.loaded) == len(ours.state_dict())
    return theirs, ours


def assert_close(got, expected, what):
    bound = 1e-5 * max(1.0, expected.abs().max().item())
    error = (got - expected).abs().max().item()
    assert error <= bound, f"{what}: {error:.2e} of {bound:.2e}"


def assert_equal_results(theirs, ours, inputs):
    """Compares all outputs, rows of padding included, and the gradients of all parameters."""
    expected, got = theirs(**inputs), ours(**inputs)
    assert list(got) == list(expected)
    objective = []
    for outputs in (expected, got):
        total = outputs.get("loss", torch.tensor(0.0))
        for name in outputs.keys() - {"loss", "hidden_states"}:
            x = outputs[name]
            assert_close(x, expected[name], name)
            total = total + (x * noise(*x.shape).to(x)).mean()
        objective.append(total)
    if "loss" in expected:
        assert_close(got.loss, expected.loss, "loss")
    for a, b in zip(got.get("hidden_states", ()), expected.get("hidden_states", ()), strict=True):
        assert_close(a, b, "hidden_states")
    for model, total in zip((theirs, ours), objective):
        model.zero_grad()
        total.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    own = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    config = ours.config
    expected, _ = to_native(
        gradients, version=config.generation, heads=config.num_attention_heads, expected=set(own), part="discriminator"
    )
    assert own.keys() == expected.keys()
    largest = max(x.abs().max() for x in expected.values())
    for name, gradient in own.items():
        # the gradient of a key's bias is zero, because a softmax does not see it: the largest gradient is the scale
        bound = 1e-5 * max(largest.item(), 1.0)
        error = (gradient - expected[name]).abs().max().item()
        assert error <= bound, f"gradient of {name}: {error:.2e} of {bound:.2e}"


def assert_hf_loads(ours, theirs, folder):
    ours.save_pretrained(folder)
    again, info = type(theirs).from_pretrained(folder, output_loading_info=True)
    assert not any(info[x] for x in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = theirs.state_dict()
    for name, x in again.state_dict().items():
        # An untied model of Hugging Face adds decoder.bias and does not use this one
        unused = name == "cls.predictions.bias" and not ours.config.tie_word_embeddings
        assert unused or torch.equal(x, expected[name]), name


@pytest.mark.skipif(V4, reason="takes long, and the switches below are compared with transformers 4 too")
@pytest.mark.parametrize("name", SHAPES)
def test_public_shapes(name, tmp_path):
    theirs, ours = pair(name, "ForMaskedLM", tmp_path / "theirs")
    inputs = tokens(
        "right", length=600 if name in ("v1-base", "mdeberta") else 70
    )  # 600 is beyond the table, with and without buckets
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] % 7 > 0) | (inputs["attention_mask"] == 0), -100)
    assert_equal_results(theirs, ours, dict(inputs, labels=labels, output_hidden_states=True))
    assert_hf_loads(ours, theirs, tmp_path / "ours")


@pytest.mark.parametrize("padding", ["absent", "left", "holes"])
@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name, padding, tmp_path):
    theirs, ours = pair(name, "Model", tmp_path / "theirs")
    assert_equal_results(theirs, ours, dict(tokens(padding), output_hidden_states=True))
    assert_hf_loads(ours, theirs, tmp_path / "ours")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_masked_lm(name, legacy, tied, tmp_path):
    if not legacy and V4:
        pytest.skip("transformers 4 ties the head's dense layer to the embeddings")
    theirs, ours = pair(name, "ForMaskedLM", tmp_path / "theirs", legacy=legacy, tie_word_embeddings=tied)
    inputs = tokens("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert_equal_results(theirs, ours, dict(inputs, labels=labels))
    assert_hf_loads(ours, theirs, tmp_path / "ours")


LABELS = {
    "classes": (3, None, torch.tensor([2, 0])),
    "classes-some": (3, None, torch.tensor([-1, 1])),
    "soft": (3, None, torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])),
    "value": (1, None, torch.tensor([0.3, -1.2])),
    "single": (3, "single_label_classification", torch.tensor([-100, 1])),
    "multi": (3, "multi_label_classification", torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])),
    "regression": (3, "regression", torch.tensor([[0.0, 1.0, -1.0], [1.0, 0.5, 0.0]])),
    "regression-one": (1, "regression", torch.tensor([[0.3], [-1.2]])),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_sequence_classification(name, case, tmp_path):
    number, problem_type, labels = LABELS[case]
    theirs, ours = pair(
        name, "ForSequenceClassification", tmp_path / "theirs", num_labels=number, problem_type=problem_type
    )
    assert_equal_results(theirs, ours, dict(tokens("right"), labels=labels))
    assert_hf_loads(ours, theirs, tmp_path / "ours")


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_token_classification(name, tmp_path):
    theirs, ours = pair(name, "ForTokenClassification", tmp_path / "theirs", num_labels=5)
    inputs = tokens("holes")
    labels = (inputs["input_ids"] % 5).masked_fill(inputs["attention_mask"] == 0, -100)
    assert_equal_results(theirs, ours, dict(inputs, labels=labels))
    assert_hf_loads(ours, theirs, tmp_path / "ours")


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_question_answering(name, tmp_path):
    theirs, ours = pair(name, "ForQuestionAnswering", tmp_path / "theirs")
    positions = dict(start_positions=torch.tensor([[3], [900]]), end_positions=torch.tensor([[5], [7]]))
    assert_equal_results(theirs, ours, dict(tokens("absent"), **positions))
    assert_hf_loads(ours, theirs, tmp_path / "ours")


def test_multiple_choice(tmp_path):
    theirs, ours = pair("v3", "ForMultipleChoice", tmp_path / "theirs")
    assert_equal_results(theirs, ours, dict(tokens("right", choices=(3,)), labels=torch.tensor([2, 0])))
    assert_hf_loads(ours, theirs, tmp_path / "ours")


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_attentions_and_tuples(name, tmp_path):
    theirs, ours = pair(name, "ForTokenClassification", tmp_path)
    inputs = tokens("absent")
    switches = dict(output_attentions=True, output_hidden_states=True)
    expected, got = theirs(**inputs, **switches), ours(**inputs, **switches)
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        assert_close(a, b, "attentions")
    flat = ours(**inputs, **switches, return_dict=False)
    assert torch.equal(flat[0], got[0]) and len(flat) == len(expected.to_tuple()) == 3


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_defaults_of_the_configuration(name):
    """Settings that both libraries have start with the same default."""
    prefix = SWITCHES[name][0]
    theirs = getattr(transformers, prefix + "Config")()
    ours = getattr(deberta_fast, prefix + "Config")()
    for field, value in ours.to_dict().items():
        if hasattr(theirs, field) and field not in ("id2label", "label2id"):
            assert getattr(theirs, field) == value, field
    assert ours.num_labels == theirs.num_labels and ours.id2label == theirs.id2label


def test_dropout_in_training(tmp_path):
    """Dropout acts where Hugging Face's does: mean and deviation of the logits in training agree."""
    theirs, ours = pair("v3", "ForSequenceClassification", tmp_path, hidden_dropout_prob=0.3, num_labels=3)
    inputs = tokens("absent", length=12)
    results = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(torch.stack([model(**inputs).logits for _ in range(300)]))
    spread = results[0].std(0)
    assert ((results[0].mean(0) - results[1].mean(0)).abs() < 0.35 * spread).all()
    assert (results[1].std(0) / spread - 1).abs().max() < 0.2


def test_trainer(tmp_path):
    """Hugging Face's Trainer trains a native model, and the checkpoint that it saves loads."""
    prefix, values = SWITCHES["v1"]
    model = deberta_fast.DebertaForSequenceClassification(
        deberta_fast.DebertaConfig(**values, vocab_size=70, relative_attention=True, num_labels=3)
    )
    ids = tokens("absent", length=9)["input_ids"]
    data = [{"input_ids": ids[i % 2] // (1 + i % 5), "labels": torch.tensor(i % 3)} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    before = model.classifier.weight.detach().clone()
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0 and not torch.equal(model.classifier.weight, before)
    trainer.save_model(str(tmp_path / "saved"))
    model.config.save_pretrained(tmp_path / "saved")
    again, info = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info.missing and not info.unexpected
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
