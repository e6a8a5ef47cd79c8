"""Generator and discriminator: whose gradients reach which embeddings, and whose names they have."""

import copy

import pytest
import torch
from native_models import randomise, settings

from deberta_fast import DebertaConfig, DebertaV2Config
from deberta_fast.pretraining.build import merged_discriminator
from deberta_fast.pretraining.objectives import MaskedBatch, MaskedTokens, ReplacedTokens, draw
from deberta_fast.pretraining.sharing import ReplacedTokenModels, SharedEmbedding, generator_config

WORDS = "deberta.embeddings.word_embeddings"
LENGTHS = (11, 5, 17)


def models(name="v3", sharing="gdes", **changes):
    kind = DebertaConfig if name.startswith("v1") else DebertaV2Config
    return randomise(ReplacedTokenModels(kind(**settings(name, **changes)), 1, sharing)).double()


def batch():
    generator = torch.Generator().manual_seed(3)
    total = sum(LENGTHS)
    ids = torch.randint(4, 70, (total,), generator=generator)
    places = torch.tensor([2, 9, 12, 20, 30])
    hidden = ids.index_fill(0, places, 69)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return MaskedBatch(ids, hidden, places, ends, positions, max(LENGTHS))


DRAWN = torch.tensor([7, 8, 9, 10, 11])


def gradients(pair, which):
    pair.zero_grad()
    if which == "generator":
        MaskedTokens(pair.generator, 1.0)(batch()).loss.backward()
    else:
        ReplacedTokens(pair.discriminator)(batch(), DRAWN).loss.backward()
    return {name: x.grad for name, x in pair.named_parameters() if x.grad is not None and x.grad.any()}


@pytest.mark.parametrize("name", ["v1", "v3", "v2-c2p-narrow-embeddings"])
def test_gdes_separates_the_gradients(name):
    pair = models(name)
    found = gradients(pair, "generator")
    assert f"generator.{WORDS}.weight" in found and not any(x.startswith("discriminator") for x in found)
    found = gradients(pair, "discriminator")
    assert f"discriminator.{WORDS}._weight" in found and not any(x.startswith("generator") for x in found)


def test_gradient_of_the_difference_is_that_of_the_sum():
    """A discriminator with E_G + E_delta as its own embeddings has the same loss and the same gradients."""
    pair = models()
    shared = gradients(pair, "discriminator")
    plain = merged_discriminator(pair).double().train()
    output = ReplacedTokens(plain)(batch(), DRAWN)
    output.loss.backward()
    assert torch.equal(output.loss, ReplacedTokens(pair.discriminator)(batch(), DRAWN).loss)
    for name, parameter in plain.named_parameters():
        expected = shared.get("discriminator." + name.replace(f"{WORDS}.weight", f"{WORDS}._weight"))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-14)


def test_es_adds_the_gradients_of_both():
    pair = models(sharing="es")
    words = f"generator.{WORDS}.weight"
    apart = gradients(pair, "generator")[words], gradients(pair, "discriminator")[words]
    pair.zero_grad()
    loss = MaskedTokens(pair.generator, 1.0)(batch()).loss + 3 * ReplacedTokens(pair.discriminator)(batch(), DRAWN).loss
    loss.backward()
    torch.testing.assert_close(dict(pair.named_parameters())[words].grad, apart[0] + 3 * apart[1])
    assert not any("discriminator" in x and "word_embeddings" in x for x, _ in pair.named_parameters())


def test_nes_shares_nothing():
    pair = models(sharing="nes")
    assert isinstance(pair.discriminator.deberta.embeddings.word_embeddings, torch.nn.Embedding)
    assert not any(x.startswith("generator") for x in gradients(pair, "discriminator"))


def test_differences_start_at_zero_and_follow_the_generator():
    pair = ReplacedTokenModels(DebertaV2Config(**settings("v3")), 1)
    embedding = pair.discriminator.deberta.embeddings.word_embeddings
    assert not embedding._weight.any()
    with torch.no_grad():
        pair.generator.get_input_embeddings().weight.add_(1.0)
    ids = torch.arange(4)
    assert torch.equal(embedding(ids), pair.generator.get_input_embeddings()(ids))


def test_positions_are_shared_where_they_are_added():
    pair = models("v2")  # positions are added to the input
    embeddings = pair.discriminator.deberta.embeddings
    assert isinstance(embeddings.position_embeddings, SharedEmbedding)
    found = gradients(pair, "discriminator")
    assert "discriminator.deberta.embeddings.position_embeddings._weight" in found
    assert models("v3").discriminator.deberta.embeddings.position_embeddings is None


def test_embeddings_of_a_checkpoint_become_differences():
    for sharing in ("gdes", "nes"):
        pair = models(sharing=sharing)
        target = torch.randn_like(pair.generator.get_input_embeddings().weight)
        pair.set_discriminator_embeddings({"word_embeddings": target})
        got = pair.discriminator.deberta.embeddings.word_embeddings(torch.arange(1, 70))
        torch.testing.assert_close(got, target[1:])
    with pytest.raises(ValueError, match="sharing='es' needs equal word_embeddings"):
        models(sharing="es").set_discriminator_embeddings({"word_embeddings": target})


def test_copies_share_with_their_own_generator():
    pair = copy.deepcopy(models())
    source = pair.discriminator.deberta.embeddings.word_embeddings._source[0]
    assert source is pair.generator.get_input_embeddings()


def test_generators_configuration():
    config = DebertaV2Config(**settings("v3", num_hidden_layers=12))
    made = generator_config(config)
    assert made.num_hidden_layers == 6 and made.enhanced_mask_decoder and not config.enhanced_mask_decoder
    assert not generator_config(DebertaV2Config(**settings("v2"))).enhanced_mask_decoder
    with pytest.raises(ValueError, match="needs a layer at least: generator_layers=0, num_hidden_layers=1"):
        generator_config(DebertaV2Config(**settings("v3", num_hidden_layers=1)))
    with pytest.raises(ValueError, match="sharing must be one of gdes, es, nes, got 'both'"):
        ReplacedTokenModels(config, sharing="both")


def test_draws_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    for temperature in (1.0, 2.0):
        drawn = draw(logits.expand(40_000, 4), temperature)
        shares = torch.bincount(drawn, minlength=4) / 40_000
        torch.testing.assert_close(shares, torch.softmax(logits / temperature, 0), rtol=0, atol=0.01)


def test_draws_are_words():
    """Impossible words are never drawn, the last ones are; what is not a number gives a word too, no bad index."""
    infinity = float("inf")
    logits = torch.tensor([-infinity, 0.0, -infinity, 0.0, -infinity]).expand(1000, 5)
    assert set(draw(logits, 1.0).tolist()) == {1, 3}
    assert (draw(torch.full((20, 5), float("nan")), 1.0) < 5).all()


def test_drawing_the_original_counts_as_original():
    found = batch()
    drawn = found.input_ids[found.places].clone()
    drawn[1] = 5 if drawn[1] != 5 else 6
    detected = ReplacedTokens(models().discriminator)(found, drawn)
    assert detected.labels.sum() == 1 and detected.labels[found.places[1]] == 1


def test_language_models_logits_are_those_of_masked_tokens_alone():
    """The loss equals that of the whole model, which makes logits of every token; the head sees M rows."""
    generator, found, rows = models().generator, batch(), []
    generator.lm_predictions.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    got = MaskedTokens(generator)(found)
    assert rows == [len(found.places)]
    labels = torch.full_like(found.input_ids, -100).index_copy(0, found.places, found.input_ids[found.places])
    whole = generator(found.hidden_ids, labels=labels, cu_seqlens=found.cu_seqlens, max_seqlen=found.max_seqlen)
    torch.testing.assert_close(got.loss.double(), whole.loss, rtol=1e-6, atol=0)
    assert got.right == (whole.logits[found.places].argmax(-1) == found.input_ids[found.places]).sum()
