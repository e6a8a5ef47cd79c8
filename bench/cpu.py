"""Times and peak memory on the CPU against Hugging Face's eager attention: ``python -m bench.cpu``.

``variants.layer`` describes the variants. Two series of shapes: one sequence of each length, and as many sequences as
make the longest length's number of tokens; for an encoder also one very short sequence, where overhead dominates.
Results go to bench/results/cpu/, after every row.
"""

import argparse
import itertools
from collections.abc import Callable

import torch
from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder

from . import models, timing
from .device import Table
from .variants import Entry, call_of, described
from .variants.layer import ATTENTION, ENCODER, Layer

PASSES = ("forward", "forward+backward")
ENCODER_LAYERS = 2
VARIANTS = ("eager", "patched", "native", "plain")
LEVELS: dict[str, dict[str, Entry]] = {
    "attention": dict(zip(VARIANTS, (ATTENTION[x] for x in ("hf-eager", "patched-mask", "native", "plain")))),
    "encoder": ENCODER,
}
SHORT = {"attention": [], "encoder": [(1, 16)]}  # more shapes: batch and length
LEGEND = " float32, dropout off, nothing masked; forward without gradients. Higher ratios are better."
NOTES = {
    "attention": "Milliseconds of one DeBERTa-v3-base attention module with its projections, medians."
    + described(LEVELS["attention"], VARIANTS)
    + LEGEND,
    "encoder": f"Milliseconds of {ENCODER_LAYERS} whole DeBERTa-v3-base layers, medians."
    + described(ENCODER, VARIANTS)
    + LEGEND,
    "memory": "Peak resident MiB above the start, each in its own process. The start of an attention module includes "
    "the mask and the relative positions that Hugging Face's encoder makes; an encoder's own count." + LEGEND,
}


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    lengths = sorted(options.lengths)
    shapes = [(1, length) for length in lengths] + [(lengths[-1] // n, n) for n in lengths]
    for level in options.levels:
        table = Table(level, options.out, NOTES[level])
        for threads, passes in itertools.product(options.threads, options.passes):
            for batch, length in dict.fromkeys(SHORT[level] + shapes):
                table.add(time_row(level, threads, passes, batch, length, options.seconds))
    if options.memory_length:
        table = Table("memory", options.out, NOTES["memory"])
        for level, passes in itertools.product(options.levels, options.passes):
            table.add(memory_row(level, options.threads[-1], passes, options.memory_length))


def time_row(level: str, threads: int, passes: str, batch: int, length: int, seconds: float) -> dict:
    torch.set_num_threads(threads)
    taken = timing.medians(calls(level, passes, batch, length), seconds)
    row = {"pass": passes, "threads": threads, "batch": batch, "length": length}
    row |= {f"{variant} ms": 1000 * taken[variant] for variant in VARIANTS}
    return row | {f"eager/{variant}": taken["eager"] / taken[variant] for variant in VARIANTS[1:]}


def memory_row(level: str, threads: int, passes: str, length: int) -> dict:
    torch.set_num_threads(threads)
    peak = {x: timing.peak_memory(measured, level, x, passes, 1, length)[0] / timing.MIB for x in VARIANTS}
    row = {"what": level, "pass": passes, "batch": 1, "length": length}
    row |= {f"{variant} MiB": peak[variant] for variant in VARIANTS}
    return row | {f"eager/{variant}": peak["eager"] / peak[variant] for variant in ("patched", "native")}


def calls(level: str, passes: str, batch: int, length: int) -> dict[str, Callable[[], object]]:
    """Returns a call without arguments for each variant, all on the same weights and random input.

    Args:
        level: "attention", the module with its projections, or "encoder", ENCODER_LAYERS whole layers.
        passes: "forward", without gradients, or "forward+backward", with those of input, weights and positions.
    """
    layer = Layer(_encoder(level), batch, length)
    return {variant: _call(level, variant, layer, passes) for variant in VARIANTS}


def measured(level: str, variant: str, passes: str, batch: int, length: int) -> list[Callable[[], object]]:
    """Returns one call for ``timing.peak_memory``, after one over a few tokens, which makes the weights' gradients."""
    encoder = _encoder(level)
    _call(level, variant, Layer(encoder, 1, 8), passes)()
    return [_call(level, variant, Layer(encoder, batch, length), passes)]


def _encoder(level: str) -> DebertaV2Encoder:
    return models.encoder_v3_base(1 if level == "attention" else ENCODER_LAYERS)


def _call(level: str, variant: str, layer: Layer, passes: str) -> Callable[[], object]:
    _, forward = LEVELS[level][variant].build(layer, passes)
    return call_of(forward, passes, layer.gradient).run


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = timing.parser("cpu", __doc__)
    parser.add_argument("--lengths", type=timing.positive, nargs="+", metavar="L")
    parser.add_argument("--threads", type=timing.positive, nargs="+", metavar="N")
    parser.add_argument("--levels", choices=LEVELS, nargs="+")
    parser.add_argument("--passes", choices=PASSES, nargs="+", default=PASSES)
    parser.add_argument("--memory-length", type=int, metavar="L", help="length of the memory rows; 0 for none")
    whole = dict(lengths=[128, 512, 2048], threads=[1, 2], levels=list(LEVELS), memory_length=4096, seconds=10.0)
    quick = dict(lengths=[128, 512], threads=[1], levels=["attention"], memory_length=1024)
    return timing.complete(parser.parse_args(arguments), whole, quick)


if __name__ == "__main__":
    main()
