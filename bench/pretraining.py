"""Steps of replaced-token detection, packed and padded, on the CPU or a GPU: ``python -m bench.pretraining``.

Both variants start from the same weights and make the same steps: this package's ``Phases.step`` on packed sequences,
and ``pretraining_reference`` on a padded batch of the same sequences. They take turns. Results go to
bench/results/cpu/ or the GPU's folder, after every length.
"""

import argparse
import itertools
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoConfig

from deberta_fast import DebertaV2Config
from deberta_fast.checkpoint import to_hf
from deberta_fast.pretraining import objectives
from deberta_fast.pretraining.batches import packed
from deberta_fast.pretraining.parallel import Place
from deberta_fast.pretraining.phases import Phases
from deberta_fast.pretraining.rows import Row
from deberta_fast.pretraining.settings import Data, Replaced, Settings, Training
from deberta_fast.pretraining.sharing import ReplacedTokenModels

from . import models, timing
from .device import Call, Device, Table
from .pretraining_reference import Discriminator, Generator, Padded, Reference, Text, load, padded
from .variants.model import SCORES_HELD, draw_weights

BATCHES = 4  # different batches, which the steps take in turn
MASKED = 0.15
MEDIAN, SPREAD = 200, 0.8  # of the documents' lengths in tokens, log-normal
MASK, FIRST = 4, 5  # the id of [MASK], and the first one of ordinary tokens
QUICK = dict(hidden_size=64, num_attention_heads=2, intermediate_size=96, position_buckets=32)
# Relative difference of the two losses of the first step. Rounding of bfloat16 also changes some of the tokens drawn.
ALLOWED = {"fp32": 1e-4, "bf16": 0.02}
TARGET = 3.0
NOTES = (
    "A step of replaced-token detection as in DeBERTaV3: generator with enhanced mask decoder, its AdamW step, tokens "
    "drawn, discriminator with gradient-disentangled embeddings, its AdamW step; clipping, no dropout, random weights. "
    "Generator of {generator} layers, discriminator of {layers}, {hidden_size} wide, {num_attention_heads} heads, "
    "{vocab_size} words, {precision}. packed: this package's Phases.step on packed sequences. hf: Hugging Face's eager "
    "DebertaV2Model on the same sequences, padded to the batch's longest, with the generator's last layer run only "
    "twice and torch's fused AdamW (bench/pretraining_reference.py). Documents: lengths are log-normal with a median "
    f"of {MEDIAN} tokens, sigma of the logarithm {SPREAD}; they are cut into sequences of at most the length, and the "
    f"last one so that a batch holds exactly its tokens; {100 * MASKED:.0f} % of each sequence are masked. The steps "
    f"take {BATCHES} batches in turn, in the order of the documents. fill: mean share of tokens in hf's batches. ms: "
    "medians of interleaved steps, data on the device. tokens/s: real tokens, no padding. x hf: times as fast as hf. "
    "difference: relative, the larger one of both losses of the first step, from hf's at equal noise of the tokens "
    f"drawn; what differs by more than {{allowed:g}} is not timed. Target at 512: x hf of {TARGET:g}."
)


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    device = Device(options.device)
    device.most = max(device.most, options.steps)
    shape = _shape(options)
    notes = NOTES.format(
        **shape, generator=options.layers // 2, layers=options.layers, precision=options.precision,
        allowed=ALLOWED[options.precision],
    )  # fmt: skip
    table = Table(options.name, options.out, notes)
    for length in options.lengths:
        table.add(*measure(length, shape, device, options))


def measure(length: int, shape: dict, device: Device, options: argparse.Namespace) -> list[dict]:
    """Measures a row for each variant."""
    batches = texts(length, options.tokens, shape["vocab_size"])
    rectangles = [padded(batch) for batch in batches]
    fill = sum(float(x.attention_mask.float().mean()) for x in rectangles) / len(rectangles)
    settings = settings_of(length, shape, options)
    torch.manual_seed(0)
    with torch.device(options.device):
        own = ReplacedTokenModels(DebertaV2Config(**shape), options.layers // 2).train()
    draw_weights(own)
    first: dict[str, list[float]] = {}
    differences: dict[str, float] = {}

    def build(name: str) -> Call:
        if not device.is_gpu:
            _refuse_what_does_not_fit(name, own, rectangles, shape, options.layers)
        step = VARIANTS[name](own, settings, batches if name == "packed" else rectangles, options.device)
        torch.manual_seed(1)  # of the noise
        first[name] = step()
        differences[name] = _difference(first, name, options.precision)
        return Call(step)

    # hf comes first, because it copies the weights before packed's first step changes them.
    builds = {name: (lambda name=name: build(name)) for name in VARIANTS}
    taken = device.measure(builds, options.seconds, queued=False, fewest=options.steps, warmup=1)
    rows = []
    for name, outcome in taken.items():
        row = {"length": length, "variant": name, "tokens": options.tokens, "fill": fill if name == "hf" else 1.0}
        if mine := outcome.seconds:
            row |= {"ms": 1000 * mine, "tokens/s": options.tokens / mine}
            if reference := taken["hf"].seconds:
                row["x hf"] = reference / mine
        row |= {"steps": outcome.runs or None, "difference": differences.get(name)}
        rows.append(row | {"error": outcome.error and f"not run: {outcome.error}"})
    return rows


def texts(length: int, tokens: int, vocabulary: int) -> list[list[Text]]:
    """Draws ``BATCHES`` batches of ``tokens`` tokens each; the module's notes say how."""
    random = np.random.default_rng(length)
    batches = []
    for _ in range(BATCHES):
        lengths: list[int] = []
        left, rest = tokens, 0
        while left > 0:
            rest = rest or max(2, round(MEDIAN * float(np.exp(SPREAD * random.standard_normal()))))
            lengths.append(min(rest, length, left))
            rest, left = rest - lengths[-1], left - lengths[-1]
        batches.append([_text(size, vocabulary, random) for size in lengths])
    return batches


def _text(size: int, vocabulary: int, random: np.random.Generator) -> Text:
    ids = random.integers(FIRST, vocabulary, size)
    masked = np.zeros(size, bool)
    masked[random.permutation(size)[: max(1, round(MASKED * size))]] = True
    return Text(*map(torch.from_numpy, (ids, np.where(masked, MASK, ids), masked)))


def packed_step(own: ReplacedTokenModels, settings: Settings, batches: list[list[Text]], device: str) -> Callable:
    phases = Phases(own, settings, Place(torch.device(device)))
    turns = itertools.cycle([_packed(batch).to(torch.device(device)) for batch in batches])

    def step() -> list[float]:
        sums = phases.step([next(turns)])
        return [float(sums["mlm_loss"] / sums["masked"]), float(sums["rtd_loss"] / sums["tokens"])]

    return step


def _packed(batch: list[Text]) -> objectives.MaskedBatch:
    ids, hidden_ids, masked = (torch.cat(x).numpy() for x in zip(*batch))
    ends = np.cumsum([len(text.input_ids) for text in batch]).astype(np.int32)
    return packed([(Row(ids, ends), hidden_ids, np.flatnonzero(masked))])


def hf_step(own: ReplacedTokenModels, settings: Settings, batches: list[Padded], device: str) -> Callable:
    made = []
    for kind, model in ((Generator, own.generator), (Discriminator, own.discriminator)):
        config = model.config
        values = settings.model | {"num_hidden_layers": config.num_hidden_layers}
        with torch.device(device):
            made.append(kind(AutoConfig.for_model(config.model_type, **values)).train())
        named = to_hf(model.state_dict(), version=2, heads=config.num_attention_heads, legacy=False)
        load(made[-1], named)
    reference = Reference(*made, settings, objectives.draw, fused=True)
    turns = itertools.cycle([Padded(*(x.to(device) for x in batch)) for batch in batches])

    def step() -> list[float]:
        losses = reference.step(next(turns))
        return [float(losses.language), float(losses.replaced)]

    return step


VARIANTS = {"hf": hf_step, "packed": packed_step}


def settings_of(length: int, shape: dict, options: argparse.Namespace) -> Settings:
    training = Training(steps=10**6, warmup_steps=10**4, precision=options.precision, device=options.device)
    return Settings(model=shape, training=training, rtd=Replaced(), data=Data(length=length))


def _difference(first: dict[str, list[float]], name: str, precision: str) -> float | None:
    """Compares the losses of a first step with hf's. Raises ArithmeticError if they differ by more than rounding."""
    if "hf" not in first:
        return None
    found = max(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(first[name], first["hf"], strict=True))
    if not found < ALLOWED[precision]:
        raise ArithmeticError(f"differs by {found:.2g} from what it should be")
    return found


def _refuse_what_does_not_fit(name: str, own, rectangles: list[Padded], shape: dict, layers: int) -> None:
    """Raises MemoryError, because Linux would kill the process."""
    needed = 16 * sum(x.numel() for x in own.parameters())  # with gradients and AdamW's moments
    if name == "hf":
        at_once, by_layer = SCORES_HELD["forward+backward"]
        rows, length = max((x.input_ids.shape for x in rectangles), key=lambda x: x[0] * x[1] ** 2)
        needed += int((at_once + by_layer * layers) * rows * length**2 * shape["num_attention_heads"] * 4)
    free = timing.free_memory()
    if needed > 0.8 * free:
        raise MemoryError(f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")


def _shape(options: argparse.Namespace) -> dict:
    shape = models.V3_BASE | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0)
    shape |= {"num_hidden_layers": options.layers, "vocab_size": options.vocab}
    shape |= {"max_position_embeddings": max(512, *options.lengths)}
    return shape | (QUICK if options.quick else {})


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = timing.parser("pretraining", __doc__)
    parser.add_argument("--lengths", type=timing.positive, nargs="+", metavar="L", help="most tokens of a sequence")
    parser.add_argument("--tokens", type=timing.positive, metavar="N", help="in a batch, without padding")
    parser.add_argument("--layers", type=timing.positive, metavar="N", help="of the discriminator, 2 or more")
    parser.add_argument("--vocab", type=timing.positive, metavar="V", help=f"words, more than {FIRST}")
    parser.add_argument("--steps", type=timing.positive, metavar="N", help="of each variant, at least")
    parser.add_argument("--precision", choices=ALLOWED, help="bf16 is autocast, and the default on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="pretraining", help="of the results")
    options = parser.parse_args(arguments)
    gpu = torch.device(options.device).type == "cuda"
    whole = dict(lengths=[512, 128], layers=12, vocab=128100, steps=5, seconds=0.0, out=timing.results_folder())
    whole |= dict(tokens=16384, precision="bf16") if gpu else dict(tokens=2048, precision="fp32")
    quick = dict(lengths=[96, 32], layers=2, vocab=500, steps=2, tokens=256, seconds=0.0)
    options = timing.complete(options, whole, quick)
    for name, least in (("layers", 2), ("vocab", FIRST + 1)):
        if getattr(options, name) < least:
            parser.error(f"argument --{name}: must be at least {least}, got {getattr(options, name)}")
    return options


if __name__ == "__main__":
    main()
