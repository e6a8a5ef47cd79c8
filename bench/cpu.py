"""Times and peak memory on the CPU against Hugging Face's eager attention: ``python -m bench.cpu``.

What the variants are is said in ``models``. Two series of shapes: one sequence of each length, and as many sequences as
make the longest length's number of tokens; for an encoder also one very short sequence, where it is the overhead of
every call that counts. Results go to bench/results/cpu/, after every row.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from . import models, timing

MEMORY_LENGTH = 4096
SHORT = {"attention": [], "encoder": [(1, 16)]}  # batch and length
UNITS = {
    "attention": "Milliseconds of one DeBERTa-v3-base attention module with its projections, medians.",
    "encoder": f"Milliseconds of {models.ENCODER_LAYERS} whole DeBERTa-v3-base layers, medians.",
    "memory": "Peak resident MiB above the start, each in a process of its own. The mask and the relative positions "
    "that Hugging Face's encoder makes are there at the start of an attention module; an encoder's own count.",
}
LEGEND = (
    "eager: Hugging Face; patched: the same after deberta_fast.patch; native: this package's modules; plain: "
    "scaled_dot_product_attention without position terms or mask. float32, dropout off, nothing masked; forward "
    "without gradients. Higher ratios are better."
)


def main(arguments: list[str] | None = None) -> None:
    arguments = _arguments(arguments)
    lengths, threads = sorted(arguments.lengths), arguments.threads
    shapes = [(1, length) for length in lengths] + [(lengths[-1] // n, n) for n in lengths]
    times = [
        (level, count, passes, batch, length)
        for level in arguments.levels
        for count in threads
        for passes in models.PASSES
        for batch, length in dict.fromkeys(SHORT[level] + shapes)
    ]
    peaks = [(level, passes) for level in arguments.levels for passes in models.PASSES if arguments.memory_length]
    timing.provenance()
    tables: dict[str, list[dict]] = {}
    with tqdm(total=len(times) + len(peaks), unit="row") as progress:

        def keep(name: str, row: dict) -> None:
            tables.setdefault(name, []).append(row)
            timing.save(name, tables[name], arguments.out, f"{UNITS[name]} {LEGEND}")
            progress.update()

        for level, count, passes, batch, length in times:
            progress.set_description(f"{level} {passes} {batch}x{length}, {count} thread(s)")
            torch.set_num_threads(count)
            keep(level, time_row(level, count, passes, batch, length, arguments.seconds))
        torch.set_num_threads(threads[-1])
        for level, passes in peaks:
            progress.set_description(f"{level} {passes} {arguments.memory_length}, memory")
            keep("memory", memory_row(level, passes, arguments.memory_length))
    for name, rows in tables.items():
        print(f"\n{name}: {UNITS[name]}\n\n{timing.markdown(rows)}")
    print(f"\n{LEGEND}\nWritten to {arguments.out}")


def time_row(level: str, threads: int, passes: str, batch: int, length: int, seconds: float) -> dict:
    taken = timing.medians(models.calls(level, passes, batch, length), seconds)
    return {
        "pass": passes,
        "threads": threads,
        "batch": batch,
        "length": length,
        **{f"{variant} ms": 1000 * taken[variant] for variant in models.VARIANTS},
        "eager/patched": taken["eager"] / taken["patched"],
        "eager/native": taken["eager"] / taken["native"],
        "eager/plain": taken["eager"] / taken["plain"],
    }


def memory_row(level: str, passes: str, length: int) -> dict:
    peak = {
        variant: timing.peak_memory(models.measured, level, variant, passes, 1, length)[0] / timing.MIB
        for variant in models.VARIANTS
    }
    return {
        "what": level,
        "pass": passes,
        "batch": 1,
        "length": length,
        **{f"{variant} MiB": peak[variant] for variant in models.VARIANTS},
        "eager/patched": peak["eager"] / peak["patched"],
        "eager/native": peak["eager"] / peak["native"],
    }


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a look in half a minute: short, one thread, kept in build/"
    )
    parser.add_argument("--lengths", type=_positive, nargs="+", metavar="L")
    parser.add_argument("--threads", type=_positive, nargs="+", metavar="N")
    parser.add_argument("--levels", choices=models.LEVELS, nargs="+")
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
    arguments.levels = arguments.levels or (models.LEVELS[:1] if arguments.quick else models.LEVELS)
    return arguments


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


if __name__ == "__main__":
    main()
