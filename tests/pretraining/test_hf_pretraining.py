"""Steps of pretraining on packed batches give the losses of Hugging Face's modules on padded ones.

bench/pretraining_reference.py is the other loop. Both start from the same weights, see the same masks, and draw tokens
with the same noise.
"""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from native_models import randomise

from deberta_fast.checkpoint import to_hf
from deberta_fast.pretraining import objectives
from deberta_fast.pretraining.batches import packed
from deberta_fast.pretraining.build import built
from deberta_fast.pretraining.parallel import Place
from deberta_fast.pretraining.phases import Phases
from deberta_fast.pretraining.rows import Row
from deberta_fast.pretraining.settings import Data, Replaced, Settings, Training

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
STEPS, VOCABULARY, MASK = 30, 200, 3
OURS = ("model_type", "enhanced_mask_decoder")  # no values of Hugging Face's configurations
# Two rows, each a micro-batch: lengths of their sequences, some beyond max_relative_positions. The rows differ in
# length, so that it matters how their losses are weighed.
ROWS = ((60, 9, 31), (2, 47, 1))
SIZE = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, num_hidden_layers=3, intermediate_size=48,
    max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, type_vocab_size=0,
)  # fmt: skip
MODELS = {
    "v1": dict(model_type="deberta", max_relative_positions=24),
    "v3": dict(position_buckets=16, max_relative_positions=40, share_att_key=True, norm_rel_ebd="layer_norm"),
    # Positions in the input instead of the decoder, so that their embeddings have an E_delta too.
    "v2-positions": dict(position_buckets=16, max_relative_positions=40, position_biased_input=True),
}


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("bench.pretraining_reference")


class Noise:
    """Draws tokens of the distribution of ``objectives.draw``, with noise of its own; keeps the tokens."""

    def __init__(self):
        self.generator, self.drawn = torch.Generator().manual_seed(7), []

    def draw(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        # Row by row, so that several micro-batches get the noise of one batch.
        noise = [torch.empty(VOCABULARY).exponential_(generator=self.generator) for _ in logits]
        self.drawn.append((logits / temperature - torch.stack(noise).log().to(logits)).argmax(-1))
        return self.drawn[-1]


def settings(name: str, objective: str) -> Settings:
    training = Training(
        steps=STEPS, warmup_steps=5, learning_rate=4e-3, discriminator_learning_rate=2e-3, weight_decay=0.1
    )
    model = SIZE | MODELS[name]
    model |= {"enhanced_mask_decoder": objective == "mlm"}  # rtd's generator has it anyway
    rtd, data = Replaced(generator_layers=2, temperature=1.3, weight=20.0), Data(length=64)
    return Settings(objective=objective, model=model, training=training, rtd=rtd, data=data)


def texts(reference, seed: int, objective: str) -> list:
    """The rows' sequences. Every third token repeats an earlier one, so that there is something to learn."""
    random = np.random.default_rng(seed)
    rows = []
    for lengths in ROWS:
        row = []
        for length in lengths:
            ids = random.integers(4, VOCABULARY, length)
            ids[2::3] = ids[: len(ids[2::3]) * 3 : 3]
            masked = random.random(length) < 0.2
            masked[random.integers(length)] = True
            hidden_ids = np.where(masked, MASK, ids)
            if objective == "mlm":  # some stay, some become anything
                hidden_ids = np.where(random.random(length) < 0.8, hidden_ids, ids)
                hidden_ids = np.where(masked & (random.random(length) < 0.1), random.integers(VOCABULARY), hidden_ids)
            row.append(reference.Text(*map(torch.from_numpy, (ids, hidden_ids, masked))))
        rows.append(row)
    return rows


def batch_of(row: list) -> objectives.MaskedBatch:
    ids, hidden_ids, masked = (torch.cat(x).numpy() for x in zip(*row))
    ends = np.cumsum([len(text.input_ids) for text in row]).astype(np.int32)
    return packed([(Row(ids, ends), hidden_ids, np.flatnonzero(masked))])


def pair(reference, settings: Settings, dtype: torch.dtype):
    """Our models, and the reference's with the same weights."""
    models = randomise(built(settings, VOCABULARY)).to(dtype).train()
    theirs = []
    for part, kind in (("generator", reference.Generator), ("discriminator", reference.Discriminator)):
        if (own := getattr(models, part, None)) is None:
            continue
        config = own.config
        values = {name: value for name, value in settings.model.items() if name not in OURS}
        hf = transformers.AutoConfig.for_model(
            config.model_type, **values | {"num_hidden_layers": config.num_hidden_layers, "pad_token_id": 0}
        )
        other = kind(hf).to(dtype).train()
        named = to_hf(own.state_dict(), version=config.generation, heads=config.num_attention_heads, legacy=False)
        reference.load(other, named)
        theirs.append(other)
    return models, theirs if len(theirs) > 1 else [*theirs, None]


def curves(reference, monkeypatch, name: str, objective: str, dtype=torch.float32, steps=STEPS, joined=False):
    """Losses (steps, 1 or 2) of both loops, and how many drawn tokens differ. ``joined``: a batch of all rows."""
    chosen = settings(name, objective)
    models, (generator, discriminator) = pair(reference, chosen, dtype)
    noise, other_noise = Noise(), Noise()
    monkeypatch.setattr(objectives, "draw", noise.draw)
    phases = Phases(models, chosen, Place(torch.device("cpu")))
    loop = reference.Reference(generator, discriminator, chosen, other_noise.draw)
    ours, theirs = [], []
    for step in range(steps):
        rows = texts(reference, step % 3, objective)
        sequences = [text for row in rows for text in row]
        sums = phases.step([batch_of(row) for row in ([sequences] if joined else rows)])
        losses = loop.step(reference.padded(sequences))
        ours.append([sums["mlm_loss"] / sums["masked"]])
        theirs.append([losses.language])
        if objective == "rtd":
            ours[-1].append(sums["rtd_loss"] / sums["tokens"])
            theirs[-1].append(losses.replaced)
    differ = (torch.cat(noise.drawn) != torch.cat(other_noise.drawn)).sum() if objective == "rtd" else 0
    return *(torch.tensor(x, dtype=torch.float64) for x in (ours, theirs)), int(differ)


@pytest.mark.parametrize("objective", ["mlm", "rtd"])
@pytest.mark.parametrize("name", ["v1", "v3"])
def test_losses_of_30_steps(reference, monkeypatch, name, objective):
    """Two micro-batches a step. The losses fall by far more than the bound: the steps matter."""
    ours, theirs, differ = curves(reference, monkeypatch, name, objective)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert differ == 0
    assert (theirs[-3:].mean(0) < 0.85 * theirs[:3].mean(0)).all()


@pytest.mark.parametrize("name", MODELS)
def test_losses_in_float64(reference, monkeypatch, exact_hf, name):
    """One batch a step, because micro-batches are weighed in float32."""
    ours, theirs, differ = curves(reference, monkeypatch, name, "rtd", torch.float64, steps=6, joined=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert differ == 0
