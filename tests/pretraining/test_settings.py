"""Settings: files, changes, and what is wrong with them."""

from pathlib import Path

import pytest

from deberta_fast.pretraining import command
from deberta_fast.pretraining.build import built
from deberta_fast.pretraining.settings import Settings, checked_to_start, read_settings, write_settings


def test_file_and_changes(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("output: run\ntraining:\n  learning_rate: 1e-4\n  clip: 2\nmasking: {max_gram: 3}\n")
    read = read_settings(path, ["training.steps=7", "data.train=[a, b]", "rtd.sharing=es", "model.vocab_size=70"])
    assert read.training.learning_rate == 1e-4 and read.training.clip == 2.0 and read.training.steps == 7
    assert read.data.train == ["a", "b"] and read.rtd.sharing == "es" and read.model == {"vocab_size": 70}
    assert read.masking.max_gram == 3 and (read.masking.mask, read.masking.keep) == (1.0, 0.0)
    assert read_settings(None, ["objective=mlm"]).masking.mask == 0.8
    write_settings(read, tmp_path / "again.yaml")
    assert read_settings(tmp_path / "again.yaml") == read


WRONG = {
    "unknown": ("training.step=3", "no setting training.step; did you mean steps"),
    "section": ("optimizer.lr=3", "there is no setting optimizer"),
    "type": ("training.steps=many", "training.steps must be int, got 'many'"),
    "boolean": ("training.compile=3", "training.compile must be bool, got 3"),
    "choice": ("rtd.sharing=both", "rtd.sharing must be one of gdes, es, nes, got 'both'"),
    "range": ("training.learning_rate=0", "training.learning_rate must be above 0 and finite, got 0.0"),
    "steps": ("training.steps=0", "training.steps must be at least 1, got 0"),
    "no-equals": ("training.steps", "a change must be section.name=value, got 'training.steps'"),
    "value-as-section": ("seed.x=1", None),
    "row": ("training.batch_tokens=100", "training.batch_tokens must be a row at least, 512, got 100"),
    "masking": ("masking={mask: 0.8, keep: 0.1}", "with objective rtd every chosen token becomes"),
    "half-shards": ("training.precision=fp16", None),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    change, message = WRONG[name]
    changes = [change]
    if name == "value-as-section":
        changes, message = ["seed=1", change], "seed is a value and no section"
    if name == "half-shards":
        changes, message = [change, "training.strategy=fsdp"], "training.strategy=fsdp takes precision fp32 or bf16"
    with pytest.raises((TypeError, ValueError), match=message):
        read_settings(None, changes)


def test_damaged_files(tmp_path):
    for content, message in (
        ("a: [1", "is no YAML"),
        ("- 1", "must hold sections"),
        ("training: 3", "must be a section"),
    ):
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises((TypeError, ValueError), match=message):
            read_settings(tmp_path / "x.yaml")
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(output=""), "output must be given"),
        (dict(tokenizer=""), "tokenizer must be given"),
        (dict(model={}), "model must hold the configuration's values"),
        (dict(objective="mlm", discriminator="x"), "objective mlm trains a generator alone"),
        (dict(discriminator="x"), "a discriminator alone cannot be continued"),
    ],
)
def test_what_a_run_needs(changes, message):
    values = dict(output="run", tokenizer="tokenizer", model={"vocab_size": 70}) | changes
    settings = Settings(**{k: v for k, v in values.items() if k != "objective"})
    settings.data.train = ["x"]
    settings.objective = values.get("objective", "rtd")
    with pytest.raises(ValueError, match=message):
        checked_to_start(settings)
    with pytest.raises(ValueError, match="must say where the text is, got none"):
        checked_to_start(Settings(output="run", tokenizer="tokenizer", model={"vocab_size": 70}))


READY = sorted(path.stem for path in command.CONFIGURATIONS.glob("*.yaml"))


@pytest.mark.parametrize("name", READY)
def test_ready_settings(name):
    """They are valid and describe models: shrunk in width and vocabulary, they are built."""
    settings = read_settings(command.CONFIGURATIONS / f"{name}.yaml")
    model, full = settings.model, Path(command.CONFIGURATIONS / f"{name}.yaml").read_text()
    assert full.startswith("# ") and model["hidden_size"] == 64 * model["num_attention_heads"]
    settings.model = model | dict(
        hidden_size=4 * model["num_attention_heads"], intermediate_size=8, vocab_size=70, num_hidden_layers=2
    )
    settings.rtd.generator_layers = 1
    models = built(settings, 70)
    ablated = name.removeprefix("ablation-no-")
    terms = models.generator.config.position_terms
    assert terms == tuple(x for x in ("c2p", "p2c") if x != ablated)
    assert models.generator.config.enhanced_mask_decoder == (ablated != "emd")
    assert settings.rows_per_step * settings.data.length == settings.training.batch_tokens


def test_models_and_texts_that_do_not_fit():
    settings = read_settings(None, ["model={vocab_size: 60}"])
    with pytest.raises(ValueError, match="the model has 60 words, and the tokenizer 70"):
        built(settings, 70)
    with pytest.raises(ValueError, match="DebertaV2Config has no hidden_sise"):
        built(read_settings(None, ["model={hidden_sise: 60}"]), 70)
    with pytest.raises(ValueError, match="model.model_type must be one of deberta, deberta-v2, got 'bert'"):
        built(read_settings(None, ["model={model_type: bert}"]), 70)
    with pytest.raises(ValueError, match="data.length must be at most max_position_embeddings=128, got 512"):
        built(read_settings(None, ["model={max_position_embeddings: 128, hidden_size: 24}"]), 70)
