"""Scale-invariant fine-tuning against a plain computation from embeddings, and among the models that it takes."""

import pytest
import torch
from native_models import build, inputs_of
from packed_batches import batch_of, packed_of
from torch.nn import functional as F

import deberta_fast
from deberta_fast.pretraining import sift as module
from deberta_fast.pretraining.sift import Sift

STEP, DEVIATION = 3e-2, 0.1  # large enough to be seen in float64
SETTINGS = dict(step=STEP, deviation=DEVIATION)
CLASSIFIER = "ForSequenceClassification"
HEADS = (CLASSIFIER, "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "ForMultipleChoice")


def result(model, batch, seed=5, exact=False, **changes):
    """The loss and the gradient of every parameter. ``exact``: without Hugging Face's loss, which is in float32."""
    model.zero_grad()
    torch.manual_seed(seed)
    sift = Sift(model, **{**SETTINGS, **changes})
    if exact:
        output, divergence = sift.parts(batch)
        logits = [x for name, x in output.items() if name.endswith("logits")]
        loss = sum(x.square().mean() for x in logits) + sift.weight * divergence
    else:
        loss = sift.loss(batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_equal(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (got[1][name] is None) == (gradient is None), name
        if gradient is not None:
            scale = tolerance * max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=scale, msg=name)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) + ("_embed" in vars(m)) for m in model.modules())


def plain(model, batch, weight, seed=5):
    """The loss by hand: the model's embeddings have nothing to add to inputs_embeds, which it normalises."""
    torch.manual_seed(seed)
    model.zero_grad()
    words = model.deberta.embeddings.word_embeddings(batch["input_ids"])
    centred = words - words.mean(-1, keepdim=True)
    unit = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-7).sqrt()
    run = lambda states, **labels: model(inputs_embeds=states, attention_mask=batch["attention_mask"], **labels)

    def divergence(a, b):
        p, q = a.softmax(-1).detach(), b.softmax(-1).detach()
        return -(q * a.log_softmax(-1)).sum(-1) - (p * b.log_softmax(-1)).sum(-1)

    clean = run(unit, labels=batch["labels"])
    drawn = torch.randn(unit.shape, dtype=torch.float64) * DEVIATION
    delta = drawn.clamp(-2 * DEVIATION, 2 * DEVIATION).requires_grad_()
    (g,) = torch.autograd.grad(divergence(run(unit.detach() + delta).logits, clean.logits.detach()).sum(), delta)
    moved = delta.detach() + STEP * g / (g.abs().max(-1, keepdim=True).values + 1e-6)
    loss = clean.loss + weight * divergence(run(unit.detach() + moved).logits, clean.logits).mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_and_gradients_are_those_of_the_formulas():
    model = build("v3", CLASSIFIER, type_vocab_size=0, num_labels=3).double()
    batch = inputs_of(CLASSIFIER, labels=True)
    del batch["token_type_ids"]
    expected = plain(model, batch, 5.0)
    assert_equal(result(model, batch), expected)
    assert_equal(result(model, batch, weight=2), plain(model, batch, 2.0))
    without = result(model, batch, weight=0)
    classifier = "classifier.weight"  # the divergence is no small part of what is compared
    assert (without[1][classifier] - expected[1][classifier]).abs().max() > 1e-2 * expected[1][classifier].abs().max()


@pytest.mark.parametrize("name", ["v1", "v2", "v3"])
def test_hugging_face_patched_and_native_agree(name, exact_hf):
    hf_models = pytest.importorskip("hf_models")
    for head in (CLASSIFIER, "ForTokenClassification", "ForQuestionAnswering") if name == "v3" else (CLASSIFIER,):
        theirs = hf_models.build(name, head).double()
        kind = getattr(deberta_fast, type(theirs).__name__)
        ours = kind(kind.config_class.from_dict(theirs.config.to_dict())).double().eval()
        ours.load_state_dict(theirs.state_dict())
        ours.set_unpad(False, padding_rows="hf")
        batch = inputs_of(head)
        expected = result(theirs, batch, exact=True)
        loss, gradients = result(ours, batch, exact=True)
        own = {n: x for n, x in gradients.items() if n not in expected[1]}  # v1's projections, which are one there
        common = {n: x for n, x in expected[1].items() if n in gradients}
        assert bool(own) == (name == "v1") and len(common) > len(own)
        assert_equal((loss, {n: x for n, x in gradients.items() if n in common}), (expected[0], common))
        for unpad in (False, True) if head == CLASSIFIER else (False,):
            assert_equal(result(deberta_fast.patch(theirs, unpad=unpad), batch, exact=True), expected)
        assert hooks(theirs) == hooks(ours) == 0


@pytest.mark.parametrize("head", HEADS)
def test_packed_sequences_give_what_padded_ones_give(head, monkeypatch):
    # Noise that depends on the token alone, not on its place in a batch
    monkeypatch.setattr(module, "_noise", lambda x, deviation: deviation * torch.sin(1e3 * x))
    padded = batch_of("right")
    rows = padded["input_ids"].shape[0]
    model = build("v3", head).double()
    model.set_unpad("auto", padding_rows="zeros")
    if head == "ForMultipleChoice":
        padded = {name: x.repeat_interleave(2, 0) for name, x in padded.items()}
        padded["input_ids"][1::2, :9] = 8
        packed = packed_of(padded) | {"labels": torch.tensor([0, 1, 1]), "choices": 2}
        padded = {name: x.unflatten(0, (3, 2)) for name, x in padded.items()} | {"labels": packed["labels"]}
    elif head == "ForQuestionAnswering":
        ends = {"start_positions": torch.arange(rows), "end_positions": torch.arange(rows) + 4}
        packed, padded = packed_of(padded) | ends, padded | ends
    elif head == CLASSIFIER:
        labels = {"labels": torch.arange(rows) % 2}
        packed, padded = packed_of(padded) | labels, padded | labels
    else:
        padded["labels"] = padded["input_ids"] % 2
        padded["labels"][padded["attention_mask"] == 0] = -100
        packed = packed_of(padded)
    assert_equal(result(model, packed), result(model, padded))
    assert_equal(result(model, packed), result(model, packed))


@pytest.mark.parametrize("head", [CLASSIFIER, "ForMaskedLM"])
def test_checkpointing_changes_nothing(head):
    model, batch = build("v3", head).double().train(), inputs_of(head, labels=True)
    expected = result(model, batch)
    model.gradient_checkpointing_enable()
    assert_equal(result(model, batch), expected)
    assert hooks(model) == 0


def test_values_yes_and_no_and_classes_have_their_own_divergences():
    batch = inputs_of(CLASSIFIER)
    binary = F.binary_cross_entropy_with_logits
    yes_or_no = lambda a, b: binary(a, b.sigmoid()) + binary(b, a.sigmoid())
    classes = lambda a, b: F.cross_entropy(a, b.softmax(-1)) + F.cross_entropy(b, a.softmax(-1))
    cases = [
        (1, None, torch.rand(3), lambda a, b: (a - b).pow(2).mean()),
        (2, "regression", torch.rand(3, 2), lambda a, b: (a - b).pow(2).mean()),
        (2, "multi_label_classification", torch.ones(3, 2), yes_or_no),
        (2, None, torch.tensor([0, 1, 1]), classes),
    ]
    for number, problem, labels, divergence in cases:
        model = build("v3", CLASSIFIER, num_labels=number, problem_type=problem).double()
        seen = []
        model.classifier.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.detach()))
        output, got = Sift(model, **SETTINGS).parts(batch | {"labels": labels.double() if number == 1 else labels})
        assert len(seen) == 3 and torch.equal(seen[0].flatten(), output.logits.flatten())
        torch.testing.assert_close(got.detach(), divergence(seen[2], seen[0]))


def test_noise_and_step_stay_in_their_bounds():
    model, batch = build("v3", CLASSIFIER).double(), inputs_of(CLASSIFIER, labels=True)
    given = []
    norm = model.deberta.embeddings.LayerNorm
    forward = norm.forward
    norm.forward = lambda x: given.append(x.detach()) or forward(x)
    result(model, batch)
    clean, noise, moved = given[0], given[1] - given[0], given[2] - given[1]
    torch.testing.assert_close(clean.mean(-1), torch.zeros(3, 19).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(clean.std(-1, correction=0), torch.ones(3, 19).double(), atol=1e-3, rtol=0)
    assert noise.abs().max() == pytest.approx(2 * DEVIATION)
    assert noise.std() == pytest.approx(0.88 * DEVIATION, rel=0.1)
    tokens = batch["attention_mask"].bool()
    largest = moved.abs().amax(-1)
    assert (largest <= STEP + 1e-12).all() and (largest[tokens] > 0.9 * STEP).all() and not largest[~tokens].any()


def test_the_step_moves_the_logits_away():
    model, batch = build("v3", CLASSIFIER).double(), inputs_of(CLASSIFIER, labels=True)
    seen = []
    model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().log_softmax(-1)))
    Sift(model, **SETTINGS).parts(batch)
    distances = [F.kl_div(seen[k], seen[0], reduction="none", log_target=True).sum(-1) for k in (1, 2)]
    assert (distances[1] > 1.1 * distances[0]).all()


def test_parameters_learn_from_both_passes_and_not_from_the_ascent():
    model, batch = build("v3", CLASSIFIER).double(), inputs_of(CLASSIFIER, labels=True)
    outputs = []
    model.classifier.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    sift = Sift(model, **SETTINGS)
    loss = sift.loss(batch)
    assert all(p.grad is None for p in model.parameters())
    clean, ascent, moved = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
    assert ascent is None and clean.abs().max() > 0 and moved.abs().max() > 0
    _, divergence = sift.parts(batch)
    clean, ascent, moved = torch.autograd.grad(divergence, outputs[3:], retain_graph=True, allow_unused=True)
    assert ascent is None and clean.abs().max() > 0 and moved.abs().max() > 0
    torch.testing.assert_close(clean, -moved)  # both are differences of the probabilities
    divergence.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "key" not in n)


def test_dropout_is_drawn_in_every_pass_as_in_training():
    model = build("v3", CLASSIFIER, hidden_dropout_prob=0.3).train()
    masks = []
    model.deberta.embeddings.dropout.register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    Sift(model, deviation=1e-6, step=1e-6).loss(inputs_of(CLASSIFIER, "none", labels=True))
    assert len(masks) == 3 and all(0.2 < mask.float().mean() < 0.4 for mask in masks)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    Sift(model.eval()).loss(inputs_of(CLASSIFIER, "none", labels=True))
    assert not masks[3].any()


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_half_precision_keeps_noise_and_loss_in_float32(half, monkeypatch):
    batch = inputs_of(CLASSIFIER, labels=True)
    model = build("v3", CLASSIFIER)
    exact = result(model, batch)[0]
    drawn, noise = [], module._noise
    monkeypatch.setattr(module, "_noise", lambda *given: drawn.append(noise(*given)) or drawn[-1])
    model = model.bfloat16() if half == "weights" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        loss, gradients = result(model, batch)
    assert loss.dtype == torch.float32 and drawn[0].dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(torch.isfinite(x).all() for x in gradients.values())


def test_an_overflow_leaves_the_noise_as_it_is(monkeypatch):
    model, batch = build("v3", CLASSIFIER).double(), inputs_of(CLASSIFIER, labels=True)
    grad = torch.autograd.grad
    spoiled = lambda *given: [x.index_fill(0, torch.tensor(1), torch.inf) for x in grad(*given)]
    monkeypatch.setattr(torch.autograd, "grad", spoiled)
    broken = result(model, batch)
    monkeypatch.undo()
    assert_equal(broken, result(model, batch, step=1e-30))


def test_hooks_are_gone_after_an_error():
    model, batch = build("v3", CLASSIFIER), inputs_of(CLASSIFIER, labels=True)
    calls = []

    def fails_at(number):
        def hook(*_):
            calls.append(1)
            if len(calls) == number:
                raise RuntimeError("broken")

        return hook

    for number in (1, 2, 3):
        calls.clear()
        handle = model.pooler.register_forward_pre_hook(fails_at(number))
        with pytest.raises(RuntimeError, match="broken"):
            Sift(model).loss(batch)
        handle.remove()
        assert hooks(model) == 0 and len(calls) == number
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_evaluation_without_gradients():
    model, batch = build("v3", CLASSIFIER), inputs_of(CLASSIFIER, labels=True)
    expected = result(model, batch)[0]
    torch.manual_seed(5)
    with torch.no_grad():
        loss = Sift(model, **SETTINGS).loss(batch)
    assert not loss.requires_grad and loss.item() == pytest.approx(expected.item())


def test_errors():
    model, batch = build("v3", CLASSIFIER), inputs_of(CLASSIFIER)
    with pytest.raises(ValueError, match="must contain a DeBERTa with its embeddings.LayerNorm, got Linear"):
        Sift(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        Sift("model")
    for name, value in (("weight", -1), ("step", 0), ("deviation", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
            Sift(model, **{name: value})
    with pytest.raises(TypeError, match="step must be a number, got '1'"):
        Sift(model, step="1")
    with pytest.raises(ValueError, match="batch must hold labels"):
        Sift(model).loss(batch)
    with pytest.raises(TypeError, match="logits, or start_logits and end_logits, got BaseModelOutput with neither"):
        Sift(build("v3")).loss(batch)
    with pytest.raises(TypeError, match="got tuple with neither"):
        Sift(model).loss({**batch, "return_dict": False})
