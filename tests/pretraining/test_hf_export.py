"""What a run exports: loaded by this package and by transformers, with the same states."""

import pytest
import torch
from pretraining_run import outcome, settings, trained

import deberta_fast
from deberta_fast.cli import main
from deberta_fast.pretraining.build import built, merged_discriminator
from deberta_fast.pretraining.discriminator import DebertaV2ForReplacedTokens
from deberta_fast.pretraining.export import export

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[1, 30, 31, 32, 33, 2]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    trained(folder, "run", training__steps=3)
    return folder / "run"


def test_both_parts(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path), "--microsoft"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "discriminator"), str(tmp_path / "generator")]
    weights = outcome(run)["weights"]
    words = "deberta.embeddings.word_embeddings."
    assert weights[f"discriminator.{words}_weight"].any()
    detector = DebertaV2ForReplacedTokens.from_pretrained(tmp_path / "discriminator")
    merged = weights[f"generator.{words}weight"] + weights[f"discriminator.{words}_weight"]
    assert torch.equal(detector.get_input_embeddings().weight, merged)
    own = deberta_fast.DebertaV2Model.from_pretrained(tmp_path / "discriminator")(IDS).last_hidden_state
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "discriminator").eval()(IDS).last_hidden_state
    torch.testing.assert_close(own, theirs, rtol=0, atol=2e-6)
    torch.testing.assert_close(own, detector.deberta(IDS).last_hidden_state, rtol=0, atol=0)
    generator = deberta_fast.DebertaV2ForMaskedLM.from_pretrained(tmp_path / "generator")
    assert generator.config.enhanced_mask_decoder and generator.config.num_hidden_layers == 1
    hf = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "generator").eval()
    generator.config.enhanced_mask_decoder = False  # transformers has none
    torch.testing.assert_close(generator(IDS).logits, hf(IDS).logits, rtol=0, atol=2e-5)
    tokenizer = deberta_fast.DebertaV2Tokenizer.from_pretrained(tmp_path / "discriminator")
    assert len(tokenizer) == generator.config.vocab_size
    joined = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert f"discriminator.{words}_weight" in joined and "discriminator.mask_predictions.dense.weight" in joined
    assert joined.keys() >= {"generator.lm_predictions.lm_head.bias", f"generator.{words}weight"}


@pytest.mark.parametrize("joined", [True, False])
def test_runs_continue_from_what_was_exported(joined, run, tmp_path):
    """All weights come back, and E_delta as E_D - E_G, up to rounding where it was merged."""
    export(run, tmp_path / "out", microsoft=joined)
    places = (tmp_path / "out",) * 2 if joined else (tmp_path / "out/generator", tmp_path / "out/discriminator")
    values = settings(run.parent, model={}, generator=str(places[0]), discriminator=str(places[1]))
    values.rtd.generator_layers = 1
    models, weights = built(values, 1), outcome(run)["weights"]
    for name, x in models.state_dict().items():
        torch.testing.assert_close(x, weights[name], rtol=0, atol=0 if joined else 1e-6, msg=name)


def test_one_part(run, tmp_path):
    assert export(run / "checkpoints" / "step-00000003", tmp_path, "generator") == [tmp_path]
    assert deberta_fast.DebertaV2ForMaskedLM.from_pretrained(tmp_path).config.num_hidden_layers == 1


@pytest.mark.parametrize("sharing", ["es", "nes"])
def test_other_sharings(sharing, tmp_path):
    models = built(settings(tmp_path, rtd__sharing=sharing), 1001)
    merged = merged_discriminator(models)
    own = models.generator if sharing == "es" else models.discriminator
    assert torch.equal(merged.get_input_embeddings().weight, own.get_input_embeddings().weight)


def test_language_models_have_no_discriminator(tmp_path, capsys):
    trained(tmp_path, "mlm", objective="mlm", training__steps=1)
    assert main(["export", str(tmp_path / "mlm"), str(tmp_path / "out"), "--part", "discriminator"]) == 1
    assert "has no discriminator" in capsys.readouterr().err
    assert export(tmp_path / "mlm", tmp_path / "out") == [tmp_path / "out"]
    with pytest.raises(FileNotFoundError, match="neither a run with a finished checkpoint"):
        export(tmp_path / "absent", tmp_path / "out")
