"""Times and peak memory on the CPU against Hugging Face's eager attention: ``python -m bench.cpu``.

What the variants are is said in ``variants.layer``. Two series of shapes: one sequence of each length, and as many
sequences as make the longest length's number of tokens; for an encoder also one very short sequence, where it is the
overhead of every call that counts. Results go to bench/results/cpu/, after every row.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from . import models, timing
from .variants import Entry, call_of, described
from .variants.layer import ATTENTION, ENCODER, Layer

PASSES = ("forward", "forward+backward")
ENCODER_LAYERS = 2
MEMORY_LENGTH = 4096
VARIANTS = ("eager", "patched", "native", "plain")
LEVELS: dict[str, dict[str, Entry]] = {
    "attention": dict(zip(VARIANTS, (ATTENTION[x] for x in ("hf-eager", "patched-mask", "native", "plain")))),
    "encoder": ENCODER,
}
SHORT = {"attention": [], "encoder": [(1, 16)]}  # batch and length
LEGEND = " float32, dropout off, nothing masked; forward without gradients. Higher ratios are better."
NOTES = {
    "attention": "Milliseconds of one DeBERTa-v3-base attention module with its projections, medians."
    + described(LEVELS["attention"], VARIANTS)
    + LEGEND,
    "encoder": f"Milliseconds of {ENCODER_LAYERS} whole DeBERTa-v3-base layers, medians."
    + described(ENCODER, VARIANTS)
    + LEGEND,
    "memory": "Peak resident MiB above the start, each in a process of its own. The mask and the relative positions "
    "that Hugging Face's encoder makes are there at the start of an attention module; an encoder's own count." + LEGEND,
}


def main(arguments: list[str] | None = None) -> None:
    options = _arguments(arguments)
    lengths, memory_length = sorted(options.lengths), options.memory_length
    shapes = [(1, length) for length in lengths] + [(lengths[-1] // n, n) for n in lengths]
    jobs = []
    for level in options.levels:
        for threads in options.threads:
            for passes in PASSES:
                for batch, length in dict.fromkeys(SHORT[level] + shapes):
                    make = functools.partial(time_rows, level, threads, passes, batch, length, options.seconds)
                    jobs.append((level, f"{level} {passes} {batch}x{length}, {threads} thread(s)", make))
    for level in options.levels if memory_length else ():
        for passes in PASSES:
            make = functools.partial(memory_rows, level, options.threads[-1], passes, memory_length)
            jobs.append(("memory", f"{level} {passes} {memory_length}, memory", make))
    timing.fill(jobs, NOTES, options.out)


def time_rows(level: str, threads: int, passes: str, batch: int, length: int, seconds: float) -> list[dict]:
    torch.set_num_threads(threads)
    taken = timing.medians(calls(level, passes, batch, length), seconds)
    row = {
        "pass": passes,
        "threads": threads,
        "batch": batch,
        "length": length,
        **{f"{variant} ms": 1000 * taken[variant] for variant in VARIANTS},
        "eager/patched": taken["eager"] / taken["patched"],
        "eager/native": taken["eager"] / taken["native"],
        "eager/plain": taken["eager"] / taken["plain"],
    }
    return [row]


def memory_rows(level: str, threads: int, passes: str, length: int) -> list[dict]:
    torch.set_num_threads(threads)
    peak = {
        variant: timing.peak_memory(measured, level, variant, passes, 1, length)[0] / timing.MIB for variant in VARIANTS
    }
    row = {
        "what": level,
        "pass": passes,
        "batch": 1,
        "length": length,
        **{f"{variant} MiB": peak[variant] for variant in VARIANTS},
        "eager/patched": peak["eager"] / peak["patched"],
        "eager/native": peak["eager"] / peak["native"],
    }
    return [row]


def calls(level: str, passes: str, batch: int, length: int) -> dict[str, Callable[[], object]]:
    """A call without arguments for each variant, all on one set of weights and one random input.

    Args:
        level: "attention", the module with its projections, or "encoder", ENCODER_LAYERS whole layers.
        passes: "forward", without gradients, or "forward+backward", with those of input, weights and positions.
    """
    layer = Layer(_encoder(level), batch, length)
    return {variant: _call(level, variant, layer, passes) for variant in VARIANTS}


def measured(level: str, variant: str, passes: str, batch: int, length: int) -> list[Callable[[], object]]:
    """For ``timing.peak_memory``: the one call, after the same over a few tokens. Inputs and .grad are there before."""
    encoder = _encoder(level)
    _call(level, variant, Layer(encoder, 1, 8), passes)()
    return [_call(level, variant, Layer(encoder, batch, length), passes)]


def _encoder(level: str):
    return models.encoder_v3_base(1 if level == "attention" else ENCODER_LAYERS)


def _call(level: str, variant: str, layer: Layer, passes: str) -> Callable[[], object]:
    _, forward = LEVELS[level][variant].build(layer, passes)
    return call_of(forward, passes, layer.gradient).run


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a look in half a minute: short, one thread, kept in build/"
    )
    parser.add_argument("--lengths", type=_positive, nargs="+", metavar="L")
    parser.add_argument("--threads", type=_positive, nargs="+", metavar="N")
    parser.add_argument("--levels", choices=LEVELS, nargs="+")
    parser.add_argument("--memory-length", type=int, metavar="L", help="length of the memory rows; 0 for none")
    parser.add_argument("--seconds", type=float, help="time a row aims at; never fewer than 5 rounds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    arguments = parser.parse_args(arguments)
    results = timing.REPOSITORY / "bench" / "results" / "cpu"
    whole = dict(lengths=[128, 512, 2048], threads=[1, 2], memory_length=MEMORY_LENGTH, seconds=10.0, out=results)
    quick = dict(lengths=[128, 512], threads=[1], memory_length=1024, seconds=0.5, out=Path("build/bench"))
    for name, value in (quick if arguments.quick else whole).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.levels = arguments.levels or (["attention"] if arguments.quick else list(LEVELS))
    return arguments


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


if __name__ == "__main__":
    main()
